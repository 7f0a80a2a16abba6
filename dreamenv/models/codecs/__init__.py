"""Codecs: frames <-> latents."""
