"""Wrappers of batches that Gymnasium has for single environments only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from dreamenv.bundle import Bundle, latent_space
from dreamenv.config import check, whole
from dreamenv.contract.actions import NOOP
from dreamenv.contract.snapshot import check_arrays, check_range, pack, unpack
from dreamenv.errors import SnapshotError
from dreamenv.history import LatentHistory


class FrameStackObservation(VectorWrapper):
    """Each environment's last frames as one observation, as `gymnasium.wrappers.FrameStackObservation` of each would.

    Observations are (N, K, ...): the oldest frame first, and after a reset the first frame K times. All autoreset modes
    work; in SAME_STEP mode `final_obs` is stacked too.

    Args:
        env: a vector environment whose observations are arrays, of these worlds or any other.
        stack_size: K, how many frames.

    Raises:
        ConfigError: K < 1, or observations that are no arrays.

    Example:
        >>> envs = gym.make_vec("DreamProcgen-v0", num_envs=8)
        >>> envs = FrameStackObservation(envs, 4)
        >>> envs.observation_space.shape
        (8, 4, 64, 64, 3)
    """

    def __init__(self, env: VectorEnv, stack_size: int) -> None:
        super().__init__(env)
        size = whole(stack_size, "stack_size", 1, 1024)
        frame = env.single_observation_space
        check(isinstance(frame, Box), f"observation space {frame}: only arrays (Box) can be stacked")
        assert isinstance(frame, Box)
        low, high = (np.repeat(x[None], size, 0) for x in (frame.low, frame.high))
        self.single_observation_space = Box(low, high, dtype=frame.dtype.type)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        self._stack = np.zeros((env.num_envs, size, *(frame.shape or ())), frame.dtype)
        self._over = np.zeros(env.num_envs, bool)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """See the environment's own; where `options["reset_mask"]` is False the frames stay."""
        mask = _mask(options, self.num_envs)
        frames, infos = self.env.reset(seed=seed, options=options)
        self._fill(frames, mask)
        self._over = self._over & ~mask
        return self._stack.copy(), infos

    def step(self, actions: Any) -> tuple[np.ndarray, Any, Any, Any, dict[str, Any]]:
        """See the environment's own."""
        frames, rewards, terminated, truncated, infos = self.env.step(actions)
        mode, over = self.env.metadata.get("autoreset_mode"), np.asarray(terminated) | np.asarray(truncated)
        before = self._stack
        self._stack = np.concatenate([before[:, 1:], np.asarray(frames)[:, None]], 1)
        if mode is AutoresetMode.SAME_STEP:
            self._fill(frames, over)
            if "final_obs" in infos:
                final = np.full(self.num_envs, None, object)
                for i in np.flatnonzero(infos["_final_obs"]):
                    final[i] = np.concatenate([before[i, 1:], infos["final_obs"][i][None]])
                infos = infos | {"final_obs": final}
        elif mode is AutoresetMode.NEXT_STEP:
            self._fill(frames, self._over)
        self._over = over
        return self._stack.copy(), rewards, terminated, truncated, infos

    def _fill(self, frames: np.ndarray, which: np.ndarray) -> None:
        self._stack[which] = np.asarray(frames)[which][:, None]


def _mask(options: dict[str, Any] | None, n: int) -> np.ndarray:
    """Which environments a reset is of, bool (N,); asked before it, for some take the mask out of the options."""
    return np.array((options or {}).get("reset_mask", np.ones(n, bool)))


class LatentObservation(VectorWrapper):
    """A world model's latents of the pictures that a game shows, in their place.

    An agent that learnt in dreams with `observations="latent"` plays the game through this: what it sees are the
    latents float32 (N, C, H, W) with which a dream of the same history would begin.

    Args:
        env: a vector environment whose observations are the bundle's frames, such as `RealProcgenVectorEnv`.
        bundle: whose codec looks at them.

    Raises:
        ConfigError: observations of another shape.

    Example:
        >>> envs = LatentObservation(gym.make_vec("envs:RealProcgen-v0", num_envs=8), load_bundle("bundle"))
    """

    def __init__(self, env: VectorEnv, bundle: Bundle) -> None:
        super().__init__(env)
        frame, wanted = env.single_observation_space.shape, bundle.world_model.frame_shape
        check(frame == wanted, f"observations {frame}: this bundle looks at {wanted}")
        self.single_observation_space = latent_space(bundle)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        self._seen = LatentHistory(bundle.world_model, env.num_envs)
        self._over, self._latents = np.zeros(env.num_envs, bool), bundle.latents

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """See the environment's own."""
        mask = _mask(options, self.num_envs)
        frames, infos = self.env.reset(seed=seed, options=options)
        self._seen.forget(mask)
        self._seen.look(np.asarray(frames), np.full(self.num_envs, NOOP), mask)
        self._over = self._over & ~mask
        return self._seen.latents(), infos

    def step(self, actions: Any) -> tuple[np.ndarray, Any, Any, Any, dict[str, Any]]:
        """See the environment's own."""
        frames, rewards, terminated, truncated, infos = self.env.step(actions)
        frames, taken = np.asarray(frames), np.asarray(actions)
        mode, over = self.env.metadata.get("autoreset_mode"), np.asarray(terminated) | np.asarray(truncated)
        fresh = over if mode is AutoresetMode.SAME_STEP else self._over & (mode is AutoresetMode.NEXT_STEP)
        if mode is AutoresetMode.SAME_STEP and "final_obs" in infos:
            final, last = np.full(self.num_envs, None, object), np.asarray(infos["_final_obs"])
            pictures = np.stack([infos["final_obs"][i] if last[i] else frames[i] for i in range(self.num_envs)])
            self._seen.look(pictures, taken, last)
            shown = self._seen.latents()
            for i in np.flatnonzero(last):
                final[i] = shown[i]
            infos = infos | {"final_obs": final}
        self._seen.forget(fresh)
        self._seen.look(frames, taken)
        self._over = over
        return self._seen.latents(), rewards, terminated, truncated, infos

    def snapshot(self) -> bytes:
        """The environments' own snapshot, and what was seen before it."""
        own: Any = self.env.unwrapped
        inner = np.frombuffer(own.snapshot(), np.uint8)
        return pack("latents", {"latents": self._latents}, self._seen.arrays() | {"over": self._over, "inner": inner})

    def restore(self, data: bytes) -> np.ndarray:
        """Return to a snapshot and its observations, latents float32 (N, C, H, W).

        Raises:
            SnapshotError: damaged bytes, of another model, or of another number of environments.
        """
        own: Any = self.env.unwrapped
        meta, arrays = unpack("latents", data)
        if meta.get("latents") != self._latents:
            raise SnapshotError("snapshot: shows the latents of another model; take it again with this one")
        known = self._seen.arrays() | {"over": self._over, "inner": arrays.get("inner", self._over)}
        check_arrays(arrays, {name: (value.shape, str(value.dtype)) for name, value in known.items()})
        if arrays["inner"].dtype != np.uint8 or not np.isfinite(arrays["latents"]).all():
            raise SnapshotError("snapshot: is of no environment that shows latents; take it again")
        check_range("known", arrays["known"], 1, len(arrays["latents"][0]))
        own.restore(arrays["inner"].tobytes())
        self._seen.take(arrays)
        self._over = arrays["over"].copy()
        return self._seen.latents()


class TerminalValue(VectorWrapper):
    """Ends an episode where it is cut off, and pays with its last reward what its last observation was still worth.

    Dreams are best while they are short, but what an agent does in sixteen steps often pays much later. A critic that
    knows the real game says how much; the agent that learns needs no value of its own there, so the episode counts as
    terminated. A terminal value function as in plan online, learn offline (Lowrey et al. 2019).

    Args:
        env: a vector environment; in SAME_STEP mode its infos must have `final_obs`.
        values: expected discounted returns (B,) of observations (B, ...), in the game's own rewards, such as
            `ImpalaAgent.values`.
        discount: of the step between the last action and that observation.

    Raises:
        ConfigError: a discount outside 0..1.

    Example:
        >>> envs = gym.make_vec("DreamProcgen-v0", num_envs=64, max_episode_steps=16)
        >>> envs = TerminalValue(envs, load_agent("runs/critic/agent").values)
    """

    def __init__(self, env: VectorEnv, values: Callable[[np.ndarray], np.ndarray], discount: float = 0.99) -> None:
        super().__init__(env)
        sound = isinstance(discount, (int, float)) and not isinstance(discount, bool) and 0 <= discount <= 1
        check(sound, f"discount {discount!r}: must be in 0..1")
        self.values, self.discount = values, discount

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """See the environment's own; `paid` in the infos is what the dream paid.

        Raises:
            ConfigError: an episode was cut off and the environment does not show its last observation.
        """
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        terminated, truncated = np.asarray(terminated), np.asarray(truncated)
        told, cut = _paid(rewards, infos), truncated & ~terminated
        rewards = np.array(rewards, np.float64)
        if cut.any():
            last = observations
            if self.env.metadata.get("autoreset_mode") is AutoresetMode.SAME_STEP:
                check("final_obs" in infos, "env: shows no final_obs, the last observation of what is cut off")
                last = infos["final_obs"]
            rewards[cut] += self.discount * self.values(np.stack([last[i] for i in np.flatnonzero(cut)]))
        return observations, rewards, terminated | cut, truncated & ~cut, infos | told


def _paid(rewards: np.ndarray, infos: dict[str, Any]) -> dict[str, Any]:
    """Infos that keep what an environment paid before wrappers change it, those of ended episodes too."""
    if "paid" in infos:
        return {}
    told: dict[str, Any] = {"paid": rewards, "_paid": np.ones(len(rewards), bool)}
    if "final_info" in infos:
        over = infos["_final_info"]
        told["final_info"] = infos["final_info"] | {"paid": np.where(over, rewards, 0.0), "_paid": over}
    return told


class UncertaintyPenalty(VectorWrapper):
    """Rewards less the dream's own estimate of its error, so that an agent gains nothing where the dream is unsure.

    The penalty of model-based offline policy optimisation (MOPO, Yu et al. 2020). A dream that diverged has an infinite
    error; its last step costs what the largest finite one so far did.

    Args:
        env: dreams, which say their `uncertainty`.
        weight: what an error of 1 costs, in the game's own rewards.

    Raises:
        ConfigError: a weight below 0.
    """

    def __init__(self, env: VectorEnv, weight: float) -> None:
        super().__init__(env)
        sound = isinstance(weight, (int, float)) and not isinstance(weight, bool) and 0 <= weight < np.inf
        check(sound, f"weight {weight!r}: must be a number, >= 0 and finite")
        self.weight, self._most = weight, 0.0

    def step(self, actions: Any) -> tuple[Any, np.ndarray, Any, Any, dict[str, Any]]:
        """See the environment's own; `paid` in the infos is what the dream paid.

        Raises:
            ConfigError: the environment says no `uncertainty`.
        """
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        check("uncertainty" in infos, "env: its infos have no uncertainty; only dreams can be penalised")
        error, told = np.array(infos["uncertainty"], np.float64), _paid(rewards, infos)
        if "final_info" in infos:  # where an episode ended, what is beside it is of the next one
            error = np.where(infos["_final_info"], infos["final_info"]["uncertainty"], error)
        sound = np.isfinite(error)
        self._most = max(self._most, error[sound].max(initial=0.0))
        cost = self.weight * np.where(sound, error, self._most)
        return observations, rewards - cost, terminated, truncated, infos | told

    def snapshot(self) -> bytes:
        """The dreams' own snapshot, and the largest error so far."""
        own: Any = self.env.unwrapped
        return pack("penalty", {"most": self._most}, {"inner": np.frombuffer(own.snapshot(), np.uint8)})

    def restore(self, data: bytes) -> np.ndarray:
        """Return to a snapshot and its observations.

        Raises:
            SnapshotError: damaged bytes, of another model, or of another number of environments.
        """
        own: Any = self.env.unwrapped
        meta, arrays = unpack("penalty", data)
        inner, most = arrays.get("inner", np.zeros(0)), meta.get("most")
        if inner.dtype != np.uint8 or not isinstance(most, float) or not 0 <= most < np.inf:
            raise SnapshotError("snapshot: is of no penalised dreams; take it again")
        observations = own.restore(inner.tobytes())
        self._most = most
        return observations
