"""Agents that live in both worlds: the Stable-Baselines3 adapter, training, evaluation."""

import dreamenv  # noqa: F401 - before torch, whose threads it keeps from spinning
