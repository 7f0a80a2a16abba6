"""Training: one loop, one short module per model, and the pipeline from the real game to a bundle."""
