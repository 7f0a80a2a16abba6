"""The single environment of either world is its vector environment with one game: written once, here."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import numpy as np

from dreamenv.contract.actions import check_action, keys_to_action
from dreamenv.contract.games import SEED_LIMIT
from dreamenv.contract.resets import check_options, check_seeds
from dreamenv.contract.specs import JsonSpec


class SingleView(JsonSpec, gym.Env):  # pyright: ignore[reportIncompatibleVariableOverride]
    """N = 1 view of a vector environment in DISABLED autoreset mode; subclasses say which options `reset` has."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 15}
    _seed_limit = 2**63

    def __init__(self, vector: Any) -> None:
        self.vector = vector
        self.observation_space = vector.single_observation_space
        self.action_space = vector.single_action_space
        self.render_mode = vector.render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; a subclass says which options there are.

        Args:
            seed: decides everything that follows; None goes on to the next episode.
            options: see the subclass.

        Returns:
            observation, uint8 (64, 64, 3) unless the environment was asked for others, and info.

        Raises:
            ResetError: a seed or option of the wrong type, shape or range; the state is unchanged.
        """
        options = self._batch_options(options)
        scalar = seed[()] if isinstance(seed, np.ndarray) and seed.ndim == 0 else seed
        (seed,) = check_seeds([scalar], 1, self._seed_limit)
        generator, start = None, seed
        if seed is None and not self.vector._started:  # the very first one, which `np_random` decides
            generator = copy.deepcopy(self.np_random)
            start = int(generator.integers(SEED_LIMIT))
        frames, infos = self.vector.reset(seed=start, options=options)
        if generator is not None:
            self.np_random = generator
        super().reset(seed=seed)
        return frames[0], split_infos(infos, 1)[0]

    def _batch_options(self, options: Any) -> dict[str, Any]:
        """The options as the vector environment takes them; raises `ResetError`."""
        return check_options(options, ())

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Advance by one action.

        Returns:
            observation, reward in the game's own magnitude, terminated, truncated, info.

        Raises:
            InvalidActionError: not an integer in 0..14; the state is unchanged.
            ResetError: before the first reset, or the episode is over.
        """
        frames, rewards, terminated, truncated, infos = self.vector.step(np.array([check_action(action)]))
        return frames[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0]), split_infos(infos, 1)[0]

    def render(self) -> np.ndarray | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the current frame, uint8 (S, S, 3), or None without a render mode."""
        frames = self.vector.render()
        return None if frames is None else frames[0]

    def snapshot(self) -> bytes:
        """Return the state as bytes that `restore` accepts, in another process too: `env.unwrapped.snapshot()`."""
        return self.vector.snapshot()

    def restore(self, data: bytes, **options: Any) -> np.ndarray:
        """Return to a snapshot and its observation; see the vector environment's `restore`."""
        return self.vector.restore(data, **options)[0]

    def get_keys_to_action(self) -> dict[tuple[int, ...], int]:
        """Return key-code combinations -> action, as `gymnasium.utils.play` wants them."""
        return keys_to_action()

    def close(self) -> None:
        """Release what the vector environment holds."""
        self.vector.close()


def split_infos(infos: dict[str, Any], num_envs: int) -> list[dict[str, Any]]:
    """Batched infos (arrays with `_name` masks) as one plain dict for each environment."""
    out: list[dict[str, Any]] = [{} for _ in range(num_envs)]
    for name, values in infos.items():
        if name.startswith("_") or isinstance(values, dict):
            continue
        present = infos.get(f"_{name}", np.ones(num_envs, bool))
        for i in np.flatnonzero(present):
            value = values[i]
            out[i][name] = value.item() if isinstance(value, np.generic) else value
    return out
