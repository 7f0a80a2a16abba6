"""Heads: what an action earns and whether it ends the episode."""
