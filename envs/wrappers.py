"""The preprocessing stack of the founding document (docs: grey, 84 x 84, stacked), from Gymnasium's own wrappers."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict
from gymnasium.wrappers import FrameStackObservation, GrayscaleObservation, ResizeObservation, TransformObservation

from dreamenv.config import check


def extract_rgb(env: gym.Env, key: str = "rgb") -> gym.Env:
    """Replace dict observations by their entry `key`; other observations pass unchanged."""
    space = env.observation_space
    if not isinstance(space, Dict):
        return env
    check(key in space.spaces, f"observation key {key!r}: there are {', '.join(space.spaces)}")

    def pick(observation: Any) -> Any:
        return observation[key]

    return TransformObservation(env, pick, space[key])


def to_float(env: gym.Env) -> gym.Env:
    """uint8 0..255 -> float32 in [0, 1]."""
    space = env.observation_space
    check(isinstance(space, Box) and space.dtype == np.uint8, f"observation space {space}: expected uint8 Box")
    assert isinstance(space, Box)

    def scale(observation: np.ndarray) -> np.ndarray:
        return observation.astype(np.float32) / np.float32(255)

    return TransformObservation(env, scale, Box(0.0, 1.0, space.shape, np.float32))


def grayscale_stack(env: gym.Env, size: int = 84, frames: int = 4) -> gym.Env:
    """Dict -> rgb, grayscale, resize, float in [0, 1], stack: float32 (frames, size, size), the newest last."""
    check(size >= 1, f"size {size}: must be >= 1")
    check(frames >= 1, f"frames {frames}: must be >= 1")
    env = GrayscaleObservation(extract_rgb(env))
    return FrameStackObservation(to_float(ResizeObservation(env, (size, size))), frames, padding_type="reset")
