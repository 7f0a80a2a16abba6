"""What the vector environments of both worlds share: spaces, rendering, keys, and checks of their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from dreamenv.config import check, whole
from dreamenv.contract.actions import NUM_ACTIONS, check_actions, keys_to_action
from dreamenv.contract.frames import as_rgb
from dreamenv.contract.specs import JsonSpec
from dreamenv.errors import ClosedError, ConfigError, ResetError

MAX_ENVS = 2**16


class WorldVectorEnv(JsonSpec, VectorEnv):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Base of both worlds' batches.

    A subclass keeps what it shows in `_frames`, uint8 (N, H, W, C), whether it was ever reset in `_started`, which
    environments are over and not yet reset in `_finished`, bool (N,), and names its arrays of state in `_counters`.

    Args:
        num_envs: batch size.
        frame: (H, W, C) of an observation.
        autoreset_mode: as Gymnasium defines them.
        modes: which of them this world has.
        render_mode: None or "rgb_array".
        max_episode_steps: truncate episodes after so many steps; None leaves the game's own limit.

    Raises:
        ConfigError: an argument outside its range.
    """

    _counters: tuple[str, ...] = ()
    _finished: np.ndarray
    _started = False
    metadata: dict[str, Any] = {
        "render_modes": ["rgb_array"],
        "render_fps": 15,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int,
        frame: tuple[int, int, int],
        autoreset_mode: AutoresetMode | str,
        modes: Sequence[AutoresetMode],
        render_mode: str | None,
        max_episode_steps: int | None = None,
    ) -> None:
        num_envs = whole(num_envs, "num_envs", 1, MAX_ENVS)
        self.max_episode_steps = None if max_episode_steps is None else whole(max_episode_steps, "max_episode_steps", 1)
        named = render_mode is None or isinstance(render_mode, str)
        check(named and render_mode in (None, "rgb_array"), f"render_mode {render_mode!r}: must be None or 'rgb_array'")
        known = {m.value: m for m in modes} | {m: m for m in modes}
        try:
            self.autoreset_mode = known[autoreset_mode]
        except (KeyError, TypeError):  # TypeError: not hashable
            names = ", ".join(repr(m.value) for m in modes)
            raise ConfigError(f"autoreset_mode {autoreset_mode!r}: must be one of {names}") from None
        self.num_envs, self.render_mode = num_envs, render_mode
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = Box(0, 255, frame, np.uint8)
        self.single_action_space = Discrete(NUM_ACTIONS)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._frames = np.zeros((num_envs, *frame), np.uint8)

    def _check_open(self, what: str) -> None:
        if self.closed:
            raise ClosedError(f"{what}() after close(): make the environment again")

    def _check_started(self, what: str) -> None:
        """Raise `ClosedError` after close, `ResetError` before the first reset."""
        self._check_open(what)
        if not self._started:
            raise ResetError(f"{what}() before reset(): call reset() first")

    def _check_step(self, actions: Any) -> np.ndarray:
        """The actions int64 (N,), if a step may be taken; raises before anything changes."""
        self._check_open("step")
        actions = check_actions(actions, self.num_envs)
        self._check_started("step")
        if self.autoreset_mode is AutoresetMode.DISABLED and self._finished.any():
            i = int(np.flatnonzero(self._finished)[0])
            raise ResetError(f"environment {i} is finished: reset it first with options={{'reset_mask': ...}}")
        return actions

    def _counter_arrays(self) -> dict[str, np.ndarray]:
        """What of the environments' state is plain arrays, by name."""
        return {name: getattr(self, f"_{name}") for name in self._counters}

    def _take_counters(self, arrays: dict[str, np.ndarray]) -> None:
        """Take over such arrays, which have been checked."""
        for name in self._counters:
            setattr(self, f"_{name}", arrays[name].copy())

    def _batched(self, infos: dict[str, np.ndarray]) -> dict[str, Any]:
        """Infos as Gymnasium's batches have them: each with a mask of the environments that it is of, here all."""
        return infos | {f"_{name}": np.ones(self.num_envs, bool) for name in infos}

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Return one uint8 frame (H, W, 3) per environment, or None without a render mode."""
        if self.render_mode is None:
            gym.logger.warn("render() without a render mode: make the env with render_mode='rgb_array'")
            return None
        return tuple(as_rgb(self._frames).copy())

    def get_keys_to_action(self) -> dict[tuple[int, ...], int]:
        """Return key-code combinations -> action, as `gymnasium.utils.play` wants them."""
        return keys_to_action()
