"""Terms: one loss a file, with its settings beside it."""
