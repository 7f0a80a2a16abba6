"""`DreamEnv`: the N = 1 view of `DreamVectorEnv`."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from dreamenv.bundle import Bundle
from dreamenv.contract.resets import as_array, check_options, check_seeds
from dreamenv.contract.single import SingleView, split_infos
from dreamenv.errors import ResetError
from dreamenv.vector import SEED_LIMIT, DreamVectorEnv


class DreamEnv(SingleView):
    """One imagined game, with the real one's spaces, rewards and episode ends.

    Takes `DreamVectorEnv`'s arguments but `num_envs` and `autoreset_mode`.

    Example:
        >>> import gymnasium as gym, dreamenv
        >>> env = gym.make("DreamProcgen-v0", game="coinrun")
        >>> observation, info = env.reset(seed=0)
        >>> observation, reward, terminated, truncated, info = env.step(7)
    """

    def __init__(self, game: str = "coinrun", **kwargs: Any) -> None:
        super().__init__(DreamVectorEnv(1, game, autoreset_mode=AutoresetMode.DISABLED, **kwargs))

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
        (seed,) = check_seeds([seed], 1, SEED_LIMIT)
        generator = copy.deepcopy(self.np_random) if seed is None and not self.vector._started else None
        seeds = [seed] if generator is None else [int(generator.integers(2**63))]
        frames, infos = self.vector.reset(seed=seeds, options=options)
        if generator is not None:
            self.np_random = generator
        super().reset(seed=seed)
        return frames[0], split_infos(infos, 1)[0]

    def branch(self, data: bytes, n: int) -> DreamVectorEnv:
        """Fan one moment out into n futures; see `DreamVectorEnv.branch`."""
        return self.vector.branch(data, n)
