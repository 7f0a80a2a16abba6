"""What several tests of playing use."""

from __future__ import annotations

import gymnasium as gym
import numpy as np

from dreamenv.contract.actions import NAMES

RIGHT = NAMES.index("right")
UP = NAMES.index("up")


def real_frames(level: int, actions: list[int]) -> list[np.ndarray]:
    env = gym.make("envs:RealProcgen-v0", num_levels=10000)
    frames = [env.reset(options={"level": level})[0], *[env.step(a)[0] for a in actions]]
    env.close()
    return frames
