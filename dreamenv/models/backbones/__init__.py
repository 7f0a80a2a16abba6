"""Backbones: the parts of dynamics that mix cells."""
