"""Geometry of the family whose latents lie on the level's own grid; only that family imports it."""
