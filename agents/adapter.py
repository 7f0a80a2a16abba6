"""Stable-Baselines3 on our native vector environments: one `VecEnv` for the dream and the real game."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvStepReturn

from dreamenv.contract.single import split_infos
from dreamenv.errors import ConfigError


class NativeVecEnv(VecEnv):
    """SB3's `VecEnv` over a Gymnasium `VectorEnv` that resets itself in the step that ends an episode.

    The batch stays one batch: a step is one call, not `num_envs` of them. `terminal_observation` is given where the
    world shows the terminal frame: the dream does, Procgen does not (its frame is the next level's already), and then
    the key is absent rather than wrong, and `TimeLimit.truncated` is False with it, so that no algorithm bootstraps
    from another level's frame.

    Args:
        envs: a vector environment in SAME_STEP autoreset mode, e.g.
            `gym.make_vec("DreamProcgen-v0", num_envs=64, autoreset_mode="SameStep")`.

    Raises:
        ConfigError: another autoreset mode.
    """

    def __init__(self, envs: VectorEnv) -> None:
        mode = envs.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ConfigError(f"autoreset_mode {mode}: SB3 needs SAME_STEP; make them with autoreset_mode='SameStep'")
        self.envs = envs
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)
        self._actions: np.ndarray | None = None

    def reset(self) -> np.ndarray:
        """Start new episodes with the seeds and options set before; returns their observations (N, ...)."""
        seeds: Any = list(self._seeds)
        observations, infos = self.envs.reset(seed=seeds, options=self._merged_options())
        self.reset_infos = split_infos(infos, self.num_envs)
        self._reset_seeds()
        self._reset_options()
        return observations.copy()

    def step_async(self, actions: np.ndarray) -> None:
        """Remember the actions for `step_wait`."""
        self._actions = np.asarray(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Take the step.

        Returns:
            observations (N, ...), float32 rewards (N,), bool dones (N,), and one info dict each.
        """
        observations, rewards, terminated, truncated, batched = self.envs.step(self._actions)
        dones = np.asarray(terminated | truncated)
        infos = split_infos(batched, self.num_envs)
        final = split_infos(batched["final_info"], self.num_envs) if dones.any() and "final_info" in batched else None
        for i in np.flatnonzero(dones):
            info = infos[i]
            ended = {} if final is None else final[i]
            last = info.pop("final_obs", None)
            info.pop("final_info", None)
            self.reset_infos[i] = info
            infos[i] = ended if last is None else ended | {"terminal_observation": last}
        for i, info in enumerate(infos):
            info["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i]) and "terminal_observation" in info
        return observations.copy(), np.array(rewards, np.float32), dones, infos

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """One uint8 (S, S, 3) picture for each environment."""
        if self.render_mode != "rgb_array":
            warnings.warn(f"The render mode is {self.render_mode}, not rgb_array: there are no images", stacklevel=2)
            return [None] * self.num_envs
        return [np.asarray(picture) for picture in self.envs.render() or ()]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The batch's attribute, once for each environment asked for."""
        value = (
            getattr(self.envs, attr_name) if hasattr(self.envs, attr_name) else getattr(self.envs.unwrapped, attr_name)
        )
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set the batch's attribute.

        Raises:
            ConfigError: `indices` names only some: a batch has one attribute for all.
        """
        if sorted(self._get_indices(indices)) != list(range(self.num_envs)):
            raise ConfigError(f"indices {indices}: the environments are one batch; set {attr_name!r} for all of them")
        setattr(self.envs.unwrapped, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the batch, once; a result with one entry per environment is handed out accordingly."""
        method = self.get_attr(method_name)[0]
        result = method(*method_args, **method_kwargs)
        each = isinstance(result, (tuple, list, np.ndarray)) and len(result) == self.num_envs
        return [result[i] if each else result for i in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Never: wrappers of single environments cannot be around a batch."""
        return [False for _ in self._get_indices(indices)]

    def _merged_options(self) -> dict[str, Any] | None:
        """One options dict for the batch, from one for each environment."""
        names = set().union(*self._options)
        for name in sorted(names):
            if not all(name in options for options in self._options):
                raise ConfigError(f"option {name!r} is set for some environments only: set it for all, or for none")
        merged: dict[str, Any] = {}
        for name in sorted(names):
            values = [options[name] for options in self._options]
            merged[name] = values[0] if isinstance(values[0], str) else np.stack([np.asarray(v) for v in values])
        return merged or None
