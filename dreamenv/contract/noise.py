"""Counter-based randomness (Philox 4x64, Salmon et al. 2011), keyed by environment, episode and step.

Nothing depends on the global RNG, on the batch index, or on what was drawn before.
"""

from __future__ import annotations

import hashlib

import numpy as np

_STEP, _RESET = 0, 1


def philox(key: tuple[int, int], counter: tuple[int, int, int, int] = (0, 0, 0, 0)) -> np.random.Generator:
    """Generator of one key and counter, all of them integers in 0 .. 2^64 - 1."""
    # as uint64: NumPy would turn a list with entries on both sides of 2^63 into floats, and keys into one another
    bits = np.random.Philox(counter=np.array(counter, np.uint64), key=np.array(key, np.uint64))
    return np.random.Generator(bits)


def draw_step(
    seed: int, stream: int, episode: int, step: int, shape: tuple[int, ...] | None
) -> tuple[float, np.ndarray]:
    """One step's randomness: the uniform that decides the outcome, and the latent noise.

    Args:
        seed: the environment's seed, 0 .. 2^64 - 1.
        stream: which branch of a snapshot (0 is the unbranched future).
        episode: episodes since the seed was set.
        step: steps since the episode began.
        shape: of the standard normal float32 noise; None draws none, which is an empty array.
    """
    generator = philox((seed, stream), (0, _STEP, step, episode))
    uniform = generator.random()
    return uniform, generator.standard_normal((0,) if shape is None else shape, np.float32)


def reset_generator(seed: int, episode: int) -> np.random.Generator:
    """Generator of one episode's start."""
    return philox((seed, 0), (0, _RESET, 0, episode))


def branch_stream(stream: int, branch: int) -> int:
    """The stream of a branch: branch 0 keeps its parent's, the others get new ones of 64 bits."""
    if branch == 0:
        return stream
    return int.from_bytes(hashlib.sha256(f"{stream}/{branch}".encode()).digest()[:8], "little")
