"""Dynamics: latents and an action -> the next latents."""
