"""Counter-based randomness (Philox 4x64, Salmon et al. 2011), keyed by environment, episode and step.

Nothing depends on the global RNG, on the batch index, or on what was drawn before.
"""

from __future__ import annotations

import numpy as np

_STEP, _RESET = 0, 1


def step_generator(seed: int, stream: int, episode: int, step: int) -> np.random.Generator:
    """Generator of one step's draws: the outcome's uniform first, then the latent noise.

    Args:
        seed: the environment's seed, 0 .. 2^64 - 1.
        stream: which branch of a snapshot (0 is the unbranched future).
        episode: episodes since the seed was set.
        step: steps since the episode began.
    """
    return np.random.Generator(np.random.Philox(counter=[0, _STEP, step, episode], key=[seed, stream]))


def reset_generator(seed: int, episode: int) -> np.random.Generator:
    """Generator of one episode's start."""
    return np.random.Generator(np.random.Philox(counter=[0, _RESET, 0, episode], key=[seed, 0]))
