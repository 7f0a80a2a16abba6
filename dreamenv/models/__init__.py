"""Networks and their registry: `build_model({"type": ..., **config})`."""
