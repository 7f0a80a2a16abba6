"""`DreamVectorEnv`: N dreams side by side, the one implementation of dreaming as an environment."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from dreamenv.actions import NUM_ACTIONS, check_actions, keys_to_action
from dreamenv.bundle import Bundle, load_bundle, resolve_bundle
from dreamenv.config import check, from_dict
from dreamenv.errors import ConfigError, ResetError, SnapshotError
from dreamenv.flow import SamplerConfig
from dreamenv.noise import branch_stream, draw_step, reset_generator
from dreamenv.resets import as_array, check_mask, check_options, check_seeds
from dreamenv.snapshot import pack, unpack
from dreamenv.types import State, Transition

_SEED_LIMIT = 2**64
_RESET_OPTIONS = ("start", "frames", "actions", "reset_mask")


class DreamVectorEnv(VectorEnv):
    """A batch of imagined games; only the observation and action spaces of the real one, none of its code.

    Observations are uint8 (N, 64, 64, 3), actions integers (N,) in 0..14, rewards float64 (N,) of the game's own
    magnitudes. Infos (all per environment): `uncertainty` (the model's own estimate of its root mean squared latent
    error), `dream_step`, `expected_reward`, `reward_probability` (of any but 0), `end_probability`, and `diverged` /
    `uncertain` where that truncated it.

    Args:
        num_envs: batch size.
        game: which embedded bundle.
        bundle: a bundle folder instead.
        device: "auto", "cpu", "cuda" ...
        sampler: `SamplerConfig` or a mapping of its fields, e.g. {"nfe": 2, "temperature": 0.8}.
        autoreset_mode: SAME_STEP (default), NEXT_STEP or DISABLED, as Gymnasium defines them.
        render_mode: None or "rgb_array".
        exact: run environment by environment, so that what one dreams does not depend on the batch at all;
            the default differs by rounding between batch sizes.
        truncate_above: end an episode as truncated once `uncertainty` exceeds this.
        precision: "fp32", "bf16", or "auto": bf16 where the hardware has it, see `dreamenv.bundle.pick_precision`.

    Attributes:
        sampler: may be replaced at any time.
        seconds: spent so far in the networks' steps ("imagine") and in drawing frames ("decode").

    Raises:
        ConfigError: an argument outside its range.
        BundleError: the bundle is missing or damaged.
    """

    metadata: dict[str, Any] = {
        "render_modes": ["rgb_array"], "render_fps": 15, "autoreset_mode": AutoresetMode.SAME_STEP,
    }  # fmt: skip

    def __init__(
        self,
        num_envs: int = 1,
        game: str = "coinrun",
        bundle: str | Path | Bundle | None = None,
        device: str = "auto",
        sampler: SamplerConfig | dict[str, Any] | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        exact: bool = False,
        truncate_above: float | None = None,
        precision: str = "auto",
    ) -> None:
        check(isinstance(num_envs, int) and not isinstance(num_envs, bool) and num_envs >= 1,
              f"num_envs {num_envs!r}: must be an integer >= 1")
        check(render_mode in (None, "rgb_array"), f"render_mode {render_mode!r}: must be None or 'rgb_array'")
        number = isinstance(truncate_above, (int, float)) and not isinstance(truncate_above, bool)
        check(truncate_above is None or (number and truncate_above > 0),
              f"truncate_above {truncate_above!r}: must be > 0 or None")
        check(isinstance(exact, bool), f"exact {exact!r}: must be True or False")
        try:
            self.autoreset_mode = AutoresetMode(autoreset_mode)
        except ValueError:
            modes = ", ".join(repr(m.value) for m in AutoresetMode)
            raise ConfigError(f"autoreset_mode {autoreset_mode!r}: must be one of {modes}") from None
        if not isinstance(bundle, Bundle):
            bundle = load_bundle(resolve_bundle(bundle, game), device, precision)
        if sampler is None:
            sampler = SamplerConfig()
        elif not isinstance(sampler, SamplerConfig):
            sampler = from_dict(SamplerConfig, sampler, "sampler")
        self.bundle = bundle
        self.sampler = sampler
        self.seconds = {"imagine": 0.0, "decode": 0.0}
        self.exact = exact
        self.truncate_above = truncate_above
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = Box(0, 255, (64, 64, 3), np.uint8)
        self.single_action_space = Discrete(NUM_ACTIONS)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        model = bundle.world_model
        k, (c, h, w) = model.context, model.latent_shape
        latents = torch.zeros(num_envs, k, c, h, w, device=model.device)
        actions = torch.zeros(num_envs, k - 1, dtype=torch.int64, device=model.device)
        self._state = State(latents, actions, model.dynamics.recall(latents))
        self._frames = np.zeros((num_envs, 64, 64, 3), np.uint8)
        self._seeds = np.zeros(num_envs, np.uint64)
        self._streams = np.zeros(num_envs, np.uint64)
        self._episodes = np.zeros(num_envs, np.int64)
        self._steps = np.zeros(num_envs, np.int64)
        self._starts = np.full(num_envs, -1, np.int64)
        self._finished = np.zeros(num_envs, bool)
        self._started, self._draw = False, True
        self._bank: dict[int, tuple[State, np.ndarray]] = {}

    # -- Gymnasium -----------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start new episodes.

        Args:
            seed: one int (environment i gets seed + i), one int or None for each, or None for the next episode
                under the same seed. Two environments with one seed and the same actions give the same bytes.
            options: `start`: index into the bundle's bank, one per environment, or "random" (default);
                `frames` uint8 (N, T, 64, 64, 3) and `actions` (N, T - 1): dream on from real history;
                `reset_mask` bool (N,): reset only these.

        Returns:
            uint8 observations (N, 64, 64, 3) and infos.

        Raises:
            ResetError: a seed or option of the wrong type, shape or range; the state is unchanged.
        """
        options = check_options(options, _RESET_OPTIONS)
        seeds = check_seeds(seed, self.num_envs, _SEED_LIMIT)
        mask = check_mask(options, self.num_envs, self._started)
        chosen, history = self._check_start(options)
        if isinstance(seed, (int, np.integer)):
            super().reset(seed=int(seed))
        fresh = None if self._started else self.np_random.integers(_SEED_LIMIT, size=self.num_envs, dtype=np.uint64)
        for i in np.flatnonzero(mask):
            if seeds[i] is not None or fresh is not None:
                self._seeds[i] = seeds[i] if fresh is None or seeds[i] is not None else fresh[i]
                self._episodes[i], self._streams[i] = 0, 0
            else:
                self._episodes[i] += 1
            if history is None:
                self._begin(int(i), None if chosen is None else int(chosen[i]))
            else:
                state = self.bundle.world_model.start(history[0][i : i + 1], history[1][i : i + 1])
                frame = self.bundle.world_model.decode(state.latents[:, -1])[0].numpy()
                self._place(int(i), -1, state, frame)
        self._started = True
        return self._frames.copy(), self._infos(np.zeros(self.num_envs, np.float64))

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Imagine one step of every environment.

        Raises:
            InvalidActionError: see `dreamenv.actions.check_actions`; the state is unchanged.
            ResetError: before the first reset, or (DISABLED mode) a finished environment was not reset.
        """
        actions = check_actions(actions, self.num_envs)
        if not self._started:
            raise ResetError("step() before reset(): call reset() first")
        resetting = self._finished.copy()
        if resetting.any() and self.autoreset_mode is AutoresetMode.DISABLED:
            i = int(np.flatnonzero(resetting)[0])
            raise ResetError(f"environment {i} is finished: reset it first with options={{'reset_mask': ...}}")

        began = time.perf_counter()
        imagined, uniforms = self._imagine(actions)
        probabilities = imagined.log_probabilities.exp().double().cpu().numpy()
        model = self.bundle.world_model
        if self.sampler.temperature == 0:
            outcome = probabilities.argmax(1)
        else:
            outcome = (probabilities.cumsum(1) < uniforms[:, None]).sum(1).clip(max=probabilities.shape[1] - 1)
        rewards, terminated = model.rewards[outcome], model.terminated[outcome]
        uncertainty = imagined.uncertainty.double().cpu().numpy()

        latents = imagined.state.latents[:, -1]
        diverged = self.bundle.limits.exceeded(latents).cpu().numpy()
        if diverged.any():  # keep the last sound latent, so that no frame is ever drawn from an unsound one
            bad = torch.as_tensor(diverged, device=latents.device)
            imagined = replace(imagined, state=State.where(bad, self._state, imagined.state))
            uncertainty = np.where(diverged, np.inf, uncertainty)
        doubtful = np.zeros(self.num_envs, bool) if self.truncate_above is None else uncertainty > self.truncate_above

        self._state = imagined.state
        drawing = time.perf_counter()
        if self._draw:
            self._frames = self._decode(imagined.state.latents[:, -1])
        self.seconds["decode"] += time.perf_counter() - drawing
        self.seconds["imagine"] += drawing - began
        self._steps += 1
        truncated = ((self._steps >= self.bundle.game.max_steps) | diverged | doubtful) & ~terminated
        details = {
            "expected_reward": probabilities @ model.rewards, "reward_probability": probabilities @ (model.rewards != 0),
            "end_probability": probabilities @ model.terminated, "diverged": diverged, "uncertain": doubtful,
        }  # fmt: skip
        for i in np.flatnonzero(resetting):  # NEXT_STEP: this call was the reset, the action is ignored
            self._episodes[i] += 1
            self._begin(int(i), None)
            rewards[i], uncertainty[i], terminated[i], truncated[i] = 0.0, 0.0, False, False
            for values in details.values():
                values[i] = 0
        self._finished = terminated | truncated
        infos = self._infos(uncertainty, **details)
        if self.autoreset_mode is AutoresetMode.SAME_STEP and self._finished.any():
            infos = self._autoreset_now(infos)
        return self._frames.copy(), rewards, terminated, truncated, infos

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Return one uint8 (64, 64, 3) frame per environment, or None without a render mode."""
        if self.render_mode is None:
            gym.logger.warn("render() without a render mode: make the env with render_mode='rgb_array'")
            return None
        return tuple(self._frames.copy())

    def get_keys_to_action(self) -> dict[tuple[int, ...], int]:
        """Return key-code combinations -> action, as `gymnasium.utils.play` wants them."""
        return keys_to_action()

    # -- snapshots -----------------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        """Return the whole batch's state as bytes that `restore` accepts, in another process too.

        Raises:
            ResetError: before the first reset.
        """
        if not self._started:
            raise ResetError("snapshot() before reset(): call reset() first")
        arrays = {f.name: getattr(self._state, f.name).cpu().numpy() for f in fields(State)}
        arrays |= {name: getattr(self, f"_{name}") for name in _COUNTERS}
        return pack("dream", {"bundle": self.bundle.identity, "num_envs": self.num_envs}, arrays)

    def restore(self, data: bytes) -> np.ndarray:
        """Return to a snapshot and its observations, uint8 (N, 64, 64, 3).

        Raises:
            SnapshotError: damaged bytes, another bundle, or another number of environments.
        """
        arrays = self._unpack(data)
        if len(arrays["frames"]) != self.num_envs:
            raise SnapshotError(f"snapshot of {len(arrays['frames'])} environments cannot be restored into "
                                f"{self.num_envs}; make as many, or use branch()")  # fmt: skip
        device = self.bundle.world_model.device
        self._state = State(*(torch.from_numpy(arrays[f.name]).to(device) for f in fields(State)))
        for name in _COUNTERS:
            setattr(self, f"_{name}", arrays[name].copy())
        self._started = True
        return self._frames.copy()

    def branch(self, data: bytes, n: int, index: int = 0) -> DreamVectorEnv:
        """Fan one moment out into n futures: a new vector env whose environments all stand at the same moment.

        Branch 0 goes on as the original would; the others draw other noise. Everything else is as in this env.

        Args:
            data: a snapshot.
            n: number of futures.
            index: which environment of the snapshot.

        Raises:
            SnapshotError: damaged bytes, another bundle, or no such environment.
            ConfigError: n < 1.
        """
        arrays = self._unpack(data)
        if not isinstance(index, (int, np.integer)) or not 0 <= index < len(arrays["frames"]):
            raise SnapshotError(f"index {index}: the snapshot holds environments 0..{len(arrays['frames']) - 1}")
        envs = self._like(n)
        fanned = {k: np.repeat(v[index : index + 1], n, 0) for k, v in arrays.items()}
        parent = int(arrays["streams"][index])
        fanned["streams"] = np.array([branch_stream(parent, k) for k in range(n)], np.uint64)
        envs.restore(pack("dream", {"bundle": self.bundle.identity, "num_envs": n}, fanned))
        return envs

    def select(self, rows: Any, draw: bool = True) -> DreamVectorEnv:
        """Return a new vector env of some of this one's environments, which go on there as they would have here.

        So whoever plays an episode of each need not go on with those that have ended, and who plays without looking at
        the pictures need not have them drawn, which is a third of a step.

        Args:
            rows: integers (n,), which of them, n >= 1.
            draw: whether the new one, and whatever is selected or branched from it, draws what it dreams; if not, it goes on
                showing the pictures of now, or of a later start.

        Raises:
            ResetError: before the first reset.
            ConfigError: no environment, or one that does not exist.
        """
        if not self._started:
            raise ResetError("select() before reset(): call reset() first")
        rows = np.asarray(rows)
        if rows.ndim != 1 or not rows.size or rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= self.num_envs:
            raise ConfigError(f"rows {rows.tolist()}: expected one or more integers in 0..{self.num_envs - 1}")
        envs = self._like(len(rows))
        envs._state, envs._bank, envs._started = self._state[torch.from_numpy(rows.astype(np.int64))], self._bank, True
        envs._draw = self._draw and draw
        for name in _COUNTERS:
            setattr(envs, f"_{name}", getattr(self, f"_{name}")[rows])
        return envs

    # -- inside --------------------------------------------------------------------------------------------------

    def _like(self, n: int) -> DreamVectorEnv:
        envs = DreamVectorEnv(n, bundle=self.bundle, sampler=self.sampler, autoreset_mode=self.autoreset_mode,
                              render_mode=self.render_mode, exact=self.exact, truncate_above=self.truncate_above)  # fmt: skip
        envs._draw = self._draw
        return envs

    def _imagine(self, actions: np.ndarray) -> tuple[Transition, np.ndarray]:
        """One model step of every environment, and the uniforms (N,) that decide the outcomes."""
        model = self.bundle.world_model
        shape = model.latent_shape if self.sampler.stochastic else None
        keys = zip(self._seeds, self._streams, self._episodes, self._steps, strict=True)
        draws = [draw_step(int(s), int(b), int(e), int(t), shape) for s, b, e, t in keys]
        uniforms = np.array([u for u, _ in draws])
        noise = None if shape is None else np.stack([cast(np.ndarray, x) for _, x in draws])
        if not self.exact:
            return model.step(self._state, actions, noise, self.sampler), uniforms
        each = [slice(i, i + 1) for i in range(self.num_envs)]
        steps = [model.step(self._state[s], actions[s], None if noise is None else noise[s], self.sampler) for s in each]
        return Transition.cat(steps), uniforms

    def _decode(self, latents: torch.Tensor) -> np.ndarray:
        model = self.bundle.world_model
        if not self.exact:
            return model.decode(latents).numpy()
        return torch.cat([model.decode(latents[i : i + 1]) for i in range(self.num_envs)]).numpy()

    def _begin(self, i: int, start: int | None) -> None:
        """Put environment i at a start of the bank, drawn from its seed and episode if not given."""
        if start is None:
            size = len(self.bundle.starts.frames)
            start = int(reset_generator(int(self._seeds[i]), int(self._episodes[i])).integers(size))
        if start not in self._bank:  # one at a time, so that a start looks the same in a batch of any size
            model, bank, at = self.bundle.world_model, self.bundle.starts, slice(start, start + 1)
            state = model.start(bank.frames[at], bank.actions[at])
            self._bank[start] = state, model.decode(state.latents[:, -1])[0].numpy()
        self._place(i, start, *self._bank[start])

    def _place(self, i: int, start: int, state: State, frame: np.ndarray) -> None:
        with torch.inference_mode():  # in place: every step makes new tensors, so nobody else holds these
            for f in fields(State):
                getattr(self._state, f.name)[i] = getattr(state, f.name)[0]
        self._frames[i] = frame
        self._starts[i], self._steps[i], self._finished[i] = start, 0, False

    def _autoreset_now(self, infos: dict[str, Any]) -> dict[str, Any]:
        done = self._finished.copy()
        final = np.full(self.num_envs, None, dtype=object)
        final_info = {k: np.where(done, v, np.zeros_like(v)) for k, v in infos.items() if not k.startswith("_")}
        final_info |= {f"_{k}": done for k in list(final_info)}
        for i in np.flatnonzero(done):
            final[i] = self._frames[i].copy()
            self._episodes[i] += 1
            self._begin(int(i), None)
        fresh = self._infos(np.where(done, 0.0, infos["uncertainty"]),
                            **{k: np.where(done, np.zeros_like(infos[k]), infos[k]) for k in _DETAILS})
        return fresh | {"final_obs": final, "_final_obs": done, "final_info": final_info, "_final_info": done}

    def _infos(self, uncertainty: np.ndarray, **details: np.ndarray) -> dict[str, Any]:
        every = np.ones(self.num_envs, bool)
        infos = {"uncertainty": uncertainty, "dream_step": self._steps.copy(), "start": self._starts.copy(), **details}
        return infos | {f"_{k}": every.copy() for k in list(infos)}

    def _unpack(self, data: bytes) -> dict[str, np.ndarray]:
        meta, arrays = unpack("dream", data)
        if meta["bundle"] != self.bundle.identity:
            raise SnapshotError(f"snapshot of bundle {meta['bundle'][:12]}, this env dreams with "
                                f"{self.bundle.identity[:12]}; load the bundle it was taken with")  # fmt: skip
        return arrays

    def _check_start(self, options: dict[str, Any]) -> tuple[np.ndarray | None, tuple[np.ndarray, np.ndarray] | None]:
        n, start = self.num_envs, options.get("start")
        if "frames" in options:
            if start is not None:
                raise ResetError("options 'start' and 'frames' exclude each other: give one")
            return None, check_history(options["frames"], options.get("actions"), n)
        if "actions" in options:
            raise ResetError("option 'actions' without 'frames': give the frames they lead between")
        if start is None or (isinstance(start, str) and start == "random"):
            return None, None
        size = len(self.bundle.starts.frames)
        try:
            chosen = np.broadcast_to(as_array(start, "start"), (n,))
        except ValueError:
            raise ResetError(f"start {start!r}: expected one index or {n} of them") from None
        if chosen.dtype.kind not in "iu" or (chosen < 0).any() or (chosen >= size).any():
            raise ResetError(f"start {start!r}: expected integers in 0..{size - 1}, or 'random'")
        return chosen, None


_DETAILS = ("expected_reward", "reward_probability", "end_probability", "diverged", "uncertain")
_COUNTERS = ("frames", "seeds", "streams", "episodes", "steps", "starts", "finished")


def check_history(frames: Any, actions: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return real history as uint8 (N, T, 64, 64, 3) and int64 (N, T - 1).

    Raises:
        ResetError: another dtype or shape, T < 1, or an action outside 0..14.
    """
    frames = as_array(frames, "frames")
    shaped = frames.ndim == 5 and frames.shape[0] == n and frames.shape[2:] == (64, 64, 3) and frames.shape[1] >= 1
    if frames.dtype != np.uint8 or not shaped:
        raise ResetError(f"frames of dtype {frames.dtype} and shape {frames.shape}: expected uint8 ({n}, T >= 1, 64, 64, 3)")
    t = frames.shape[1]
    actions = np.zeros((n, 0), np.int64) if actions is None else as_array(actions, "actions")
    if actions.size == 0:
        actions = actions.reshape(n, 0).astype(np.int64)
    if actions.shape != (n, t - 1) or actions.dtype.kind not in "iu":
        raise ResetError(f"actions of dtype {actions.dtype} and shape {actions.shape}: expected integers ({n}, {t - 1})")
    if ((actions < 0) | (actions >= NUM_ACTIONS)).any():
        raise ResetError(f"actions {actions.min()}..{actions.max()}: expected 0..{NUM_ACTIONS - 1}")
    return frames, actions.astype(np.int64)
