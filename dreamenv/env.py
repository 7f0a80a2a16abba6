"""`DreamEnv`: the N = 1 view of `DreamVectorEnv`."""

from __future__ import annotations

from typing import Any

from gymnasium.vector import AutoresetMode

from dreamenv.bundle import Bundle
from dreamenv.contract.resets import as_array, check_options
from dreamenv.contract.single import SingleView
from dreamenv.errors import ResetError
from dreamenv.vector import SEED_LIMIT, DreamVectorEnv


class DreamEnv(SingleView):
    """One imagined game, with the real one's spaces, rewards and episode ends.

    Takes `DreamVectorEnv`'s arguments but `num_envs` and `autoreset_mode`. Options of `reset`: `start`, an index into
    the bundle's bank or "random"; or `frames` uint8 (T, 64, 64, 3) with `actions` (T - 1,), real history to go on from.

    Example:
        >>> import gymnasium as gym, dreamenv
        >>> env = gym.make("DreamProcgen-v0", game="coinrun")
        >>> observation, info = env.reset(seed=0)
        >>> observation, reward, terminated, truncated, info = env.step(7)
    """

    _seed_limit = SEED_LIMIT

    def __init__(self, game: str = "coinrun", **kwargs: Any) -> None:
        super().__init__(DreamVectorEnv(1, game, autoreset_mode=AutoresetMode.DISABLED, **kwargs))

    @property
    def bundle(self) -> Bundle:
        """The bundle that dreams."""
        return self.vector.bundle

    def _batch_options(self, options: Any) -> dict[str, Any]:
        options = check_options(options, ("start", "frames", "actions"))
        if "frames" in options:
            options["frames"] = as_array(options["frames"], "frames")[None]
            if options.get("actions") is not None:
                options["actions"] = as_array(options["actions"], "actions")[None]
        elif "start" in options and as_array(options["start"], "start").ndim > 0:
            raise ResetError(f"start {options['start']!r}: expected one index, or 'random'")
        return options

    def branch(self, data: bytes, n: int) -> DreamVectorEnv:
        """Branch one snapshot into n futures; see `DreamVectorEnv.branch`."""
        return self.vector.branch(data, n)
