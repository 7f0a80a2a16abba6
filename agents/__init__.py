"""Agents that live in both worlds: the Stable-Baselines3 adapter, training, evaluation."""
