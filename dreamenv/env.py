"""`DreamEnv`: the N = 1 view of `DreamVectorEnv`."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from dreamenv.actions import check_action, keys_to_action
from dreamenv.bundle import Bundle
from dreamenv.errors import ResetError
from dreamenv.resets import as_array, check_options
from dreamenv.vector import DreamVectorEnv


class DreamEnv(gym.Env):
    """One imagined game, with the real one's spaces, rewards and episode ends.

    Takes `DreamVectorEnv`'s arguments but `num_envs` and `autoreset_mode`.

    Example:
        >>> import gymnasium as gym, dreamenv
        >>> env = gym.make("DreamProcgen-v0", game="coinrun")
        >>> observation, info = env.reset(seed=0)
        >>> observation, reward, terminated, truncated, info = env.step(7)
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(self, game: str = "coinrun", **kwargs: Any) -> None:
        self.vector = DreamVectorEnv(1, game, autoreset_mode=AutoresetMode.DISABLED, **kwargs)
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space
        self.render_mode = self.vector.render_mode

    @property
    def bundle(self) -> Bundle:
        """The bundle that dreams."""
        return self.vector.bundle

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: decides everything that follows.
            options: `start`: index into the bank or "random"; or `frames` uint8 (T, 64, 64, 3) with `actions`
                (T - 1,): dream on from real history.

        Returns:
            uint8 observation (64, 64, 3) and info.

        Raises:
            ResetError: a seed or option of the wrong type, shape or range; the state is unchanged.
        """
        options = check_options(options, ("start", "frames", "actions"))
        if "frames" in options:
            options["frames"] = as_array(options["frames"], "frames")[None]
            if options.get("actions") is not None:
                options["actions"] = as_array(options["actions"], "actions")[None]
        elif "start" in options and as_array(options["start"], "start").ndim > 0:
            raise ResetError(f"start {options['start']!r}: expected one index, or 'random'")
        first = seed is None and not self.vector._started
        seeds = [int(self.np_random.integers(2**63))] if first else [seed]
        frames, infos = self.vector.reset(seed=seeds, options=options)
        super().reset(seed=seed)
        return frames[0], _single(infos)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Imagine one step.

        Raises:
            InvalidActionError: not an integer in 0..14; the state is unchanged.
            ResetError: before the first reset, or the episode is over.
        """
        frames, rewards, terminated, truncated, infos = self.vector.step(np.array([check_action(action)]))
        return frames[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0]), _single(infos)

    def render(self) -> np.ndarray | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the current frame, uint8 (64, 64, 3)."""
        frames = self.vector.render()
        return None if frames is None else frames[0]

    def snapshot(self) -> bytes:
        """Return the state as bytes that `restore` accepts, in another process too."""
        return self.vector.snapshot()

    def restore(self, data: bytes) -> np.ndarray:
        """Return to a snapshot and its observation, uint8 (64, 64, 3)."""
        return self.vector.restore(data)[0]

    def branch(self, data: bytes, n: int) -> DreamVectorEnv:
        """Fan one moment out into n futures; see `DreamVectorEnv.branch`."""
        return self.vector.branch(data, n)

    def get_keys_to_action(self) -> dict[tuple[int, ...], int]:
        """Return key-code combinations -> action, as `gymnasium.utils.play` wants them."""
        return keys_to_action()


def _single(infos: dict[str, Any]) -> dict[str, Any]:
    return {k: v[0].item() for k, v in infos.items() if not k.startswith("_")}
