"""Measures of a bundle against the real game, and how they are shown."""
