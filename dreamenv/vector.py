"""`DreamVectorEnv`: N dreams side by side, the one implementation of dreaming as an environment."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from dreamenv.branching import Branching
from dreamenv.bundle import Bundle, check_mode, latent_space, load_bundle, resolve_bundle
from dreamenv.config import check, from_dict, load_yaml, whole
from dreamenv.contract.noise import draw_step, reset_generator
from dreamenv.contract.resets import check_mask, check_options, check_seeds, check_start
from dreamenv.contract.world import MAX_ENVS
from dreamenv.device import own_settings, side_by_side
from dreamenv.flow import SamplerConfig
from dreamenv.models.interface import State
from dreamenv.types import Transition

T = TypeVar("T")
SEED_LIMIT = 2**64
_KEPT_STARTS = 64
"""So many starts stay encoded."""
_PART = 8
"""A batch is shared out among cores by so many environments: fewer are not worth a core."""
OBSERVATIONS = ("pixels", "latent")
_RESET_OPTIONS = ("start", "frames", "actions", "reset_mask")


class DreamVectorEnv(Branching):
    """A batch of imagined games: the real one's spaces, or latents in place of frames, and none of its code.

    Observations are uint8 (N, 64, 64, 3), or latents float32 (N, C, H, W); actions are integers (N,) in 0..14, rewards
    float64 (N,) of the game's own magnitudes. Infos (all per environment): `uncertainty` (the model's own estimate of
    its root mean squared latent error), `dream_step`, `expected_reward`, `reward_probability` (of any but 0),
    `end_probability`, and `diverged` / `uncertain` where that truncated it.

    Args:
        num_envs: batch size.
        game: which embedded bundle; of a bundle of several games, which game.
        bundle: a bundle folder instead.
        device: "auto", "cpu", "cuda" ...
        sampler: `SamplerConfig`, a mapping of its fields, e.g. {"nfe": 2, "temperature": 0.8}, or a YAML file of one.
        autoreset_mode: NEXT_STEP (default), SAME_STEP or DISABLED, as Gymnasium defines them.
        render_mode: None or "rgb_array".
        exact: run environment by environment, so that what one dreams depends neither on the batch nor on the number of
            torch's threads; the default may differ by rounding between them.
        truncate_above: end an episode as truncated once `uncertainty` exceeds this.
        precision: "fp32", "bf16", or "auto": bf16 where the hardware has it, see `dreamenv.device.pick_precision`.
        max_episode_steps: truncate episodes after so many steps; None leaves the game's own limit.
        distribution_mode: Procgen's difficulty, which decides the embedded bundle; None is easy, or that of `bundle`.
        observations: "pixels", or "latent": what the model keeps of a picture, for agents that need no picture. Nothing
            is drawn then, but by `render` and `snapshot`. `dreamenv.wrappers.LatentObservation` does so for games.

    Attributes:
        seconds: spent so far in the networks' steps ("imagine") and in drawing frames ("decode").

    Raises:
        ConfigError: an argument outside its range.
        BundleError: the bundle is missing or damaged.
    """

    def __init__(
        self,
        num_envs: int = 1,
        game: str = "coinrun",
        bundle: str | Path | Bundle | None = None,
        device: str = "auto",
        sampler: SamplerConfig | dict[str, Any] | str | Path | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        exact: bool = False,
        truncate_above: float | None = None,
        precision: str = "auto",
        max_episode_steps: int | None = None,
        distribution_mode: str | None = None,
        observations: str = "pixels",
    ) -> None:
        number = isinstance(truncate_above, (int, float)) and not isinstance(truncate_above, bool)
        check(
            truncate_above is None or (number and truncate_above > 0),
            f"truncate_above {truncate_above!r}: must be > 0 or None",
        )
        check(isinstance(exact, bool), f"exact {exact!r}: must be True or False")
        named = isinstance(observations, str) and observations in OBSERVATIONS
        check(named, f"observations {observations!r}: must be one of {', '.join(OBSERVATIONS)}")
        num_envs = whole(num_envs, "num_envs", 1, MAX_ENVS)
        if not isinstance(bundle, Bundle):
            bundle = load_bundle(resolve_bundle(bundle, game, distribution_mode), device, precision, game)
        check_mode(bundle.game.distribution_mode, distribution_mode)
        frame, modes = bundle.world_model.frame_shape, tuple(AutoresetMode)
        super().__init__(num_envs, frame, autoreset_mode, modes, render_mode, max_episode_steps)
        self.bundle, self.exact, self.sampler, self.observations = bundle, exact, sampler, observations
        if observations == "latent":
            self.single_observation_space = latent_space(bundle)
            self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.seconds = {"imagine": 0.0, "decode": 0.0}
        self._threads = 1
        self.truncate_above = truncate_above
        limit = bundle.game.max_steps
        self._max_steps = limit if self.max_episode_steps is None else min(limit, self.max_episode_steps)
        with self._settings():
            self._state = bundle.world_model.blank(num_envs)
        self._seeds = np.zeros(num_envs, np.uint64)
        self._streams = np.zeros(num_envs, np.uint64)
        self._episodes = np.zeros(num_envs, np.int64)
        self._steps = np.zeros(num_envs, np.int64)
        self._starts = np.full(num_envs, -1, np.int64)
        self._finished = np.zeros(num_envs, bool)
        self._started, self._draw = False, observations == "pixels"
        self._bank: dict[int, tuple[State, np.ndarray]] = {}

    @property
    def sampler(self) -> SamplerConfig:
        """How the next latent is drawn; may be replaced at any time, by a mapping of its fields too."""
        return self._sampler

    @sampler.setter
    def sampler(self, sampler: SamplerConfig | dict[str, Any] | str | Path | None) -> None:
        if isinstance(sampler, str | Path):
            sampler = load_yaml(sampler)
        if not isinstance(sampler, SamplerConfig):
            sampler = from_dict(SamplerConfig, {} if sampler is None else sampler, "sampler")
        self._sampler = sampler

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
            observations and infos.

        Raises:
            ResetError: a seed or option of the wrong type, shape or range; the state is unchanged.
        """
        self._check_open("reset")
        options = check_options(options, _RESET_OPTIONS)
        seeds = check_seeds(seed, self.num_envs, SEED_LIMIT)
        mask = check_mask(options, self.num_envs, self._started)
        bank, model = self.bundle.starts, self.bundle.world_model
        chosen, history = check_start(options, self.num_envs, len(bank.frames), model.frame_shape)
        begun: dict[int, tuple[int, State, np.ndarray]] = {}
        with self._settings():
            if history is not None:  # one at a time, so that a start looks the same in a batch of any size
                for i in np.flatnonzero(mask):
                    begun[int(i)] = -1, *self._look(history[0][i : i + 1], history[1][i : i + 1])
        if np.isscalar(seed) or isinstance(seed, np.ndarray) and seed.ndim == 0:
            super().reset(seed=seeds[0])
        fresh = None if self._started else self.np_random.integers(SEED_LIMIT, size=self.num_envs, dtype=np.uint64)
        with self._settings():
            for i in map(int, np.flatnonzero(mask)):
                if seeds[i] is not None or fresh is not None:
                    self._seeds[i] = seeds[i] if fresh is None or seeds[i] is not None else fresh[i]
                    self._episodes[i], self._streams[i] = 0, 0
                else:
                    self._episodes[i] += 1
                if i in begun:
                    self._place(i, *begun[i])
                else:
                    self._begin(i, None if chosen is None else int(chosen[i]))
        self._started = True
        return self._shown(), self._infos(np.zeros(self.num_envs, np.float64))

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Imagine one step of every environment.

        Raises:
            InvalidActionError: see `dreamenv.contract.actions.check_actions`; the state is unchanged.
            ResetError: before the first reset, or (DISABLED mode) a finished environment was not reset.
        """
        actions = self._check_step(actions)
        self._threads = torch.get_num_threads()
        with self._settings():
            return self._step(actions)

    def _step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        resetting = self._finished.copy()
        began = time.perf_counter()
        imagined, uniforms = self._imagine(actions)
        rewards, terminated, details = self._outcomes(imagined, uniforms)
        imagined, uncertainty, diverged = self._guard(imagined)
        self._state = imagined.state
        drawing = time.perf_counter()
        if self._draw:
            self._frames = self._render(imagined.state)
        self.seconds["decode"] += time.perf_counter() - drawing
        self.seconds["imagine"] += drawing - began
        self._steps += 1
        limit = self.truncate_above
        doubtful = np.zeros(self.num_envs, bool) if limit is None else uncertainty > limit
        truncated = ((self._steps >= self._max_steps) | diverged | doubtful) & ~terminated
        details |= {"diverged": diverged, "uncertain": doubtful}
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
        return self._shown(), rewards, terminated, truncated, infos

    def _shown(self) -> np.ndarray:
        """The observations of now."""
        if self.observations == "pixels":
            return self._frames.copy()
        return self._state.latents[:, -1].float().cpu().numpy().copy()

    def _settings(self) -> AbstractContextManager[None]:
        """Torch as this class wants it: one thread for one environment, which gains nothing from more."""
        alone = self.num_envs == 1 or self.exact or self._split()
        return own_settings(self.bundle.world_model.device, 1 if alone else None)

    def _split(self) -> bool:
        """Whether cores get their own parts of the batch."""
        return self.num_envs >= 2 * _PART and self.bundle.world_model.device.type == "cpu"

    def _outcomes(
        self, imagined: Transition, uniforms: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Rewards float64 (N,), ends bool (N,), and what the head expected, for `info`."""
        probabilities = imagined.log_probabilities.exp().double().cpu().numpy()
        model = self.bundle.world_model
        if self.sampler.temperature == 0:
            outcome = probabilities.argmax(1)
        else:
            outcome = (probabilities.cumsum(1) < uniforms[:, None]).sum(1).clip(max=probabilities.shape[1] - 1)
        details = {
            "expected_reward": probabilities @ model.rewards,
            "reward_probability": probabilities @ (model.rewards != 0),
            "end_probability": probabilities @ model.terminated,
        }
        return model.rewards[outcome], model.terminated[outcome], details

    def _guard(self, imagined: Transition) -> tuple[Transition, np.ndarray, np.ndarray]:
        """Keep the last sound state where a latent left the trained range, so that no frame is drawn of an unsound one.

        Returns:
            The transition, its uncertainty float64 (N,), infinite where it diverged, and bool (N,), where it did.
        """
        latents = imagined.state.latents[:, -1]
        uncertainty = imagined.uncertainty.double().cpu().numpy()
        diverged = self.bundle.limits.exceeded(latents).cpu().numpy()
        if diverged.any():
            bad = torch.as_tensor(diverged, device=latents.device)
            imagined = replace(imagined, state=State.where(bad, self._state, imagined.state))
            uncertainty = np.where(diverged, np.inf, uncertainty)
        return imagined, uncertainty, diverged

    def _imagine(self, actions: np.ndarray) -> tuple[Transition, np.ndarray]:
        """One model step of every environment, and the uniforms (N,) that decide the outcomes."""
        model = self.bundle.world_model
        shape = model.latent_shape if self.sampler.stochastic(model.dynamics) else None
        keys = zip(self._seeds, self._streams, self._episodes, self._steps, strict=True)
        draws = [draw_step(int(s), int(b), int(e), int(t), shape) for s, b, e, t in keys]
        uniforms = np.array([u for u, _ in draws])
        noise = None if shape is None else np.stack([x for _, x in draws])

        def imagine(part: slice) -> Transition:
            own = None if noise is None else noise[part]
            return model.step(self._state.rows(part), actions[part], own, self.sampler)

        return Transition.cat(self._each(imagine)), uniforms

    def _render(self, state: State) -> np.ndarray:
        model = self.bundle.world_model
        return torch.cat(self._each(lambda part: model.render(state.rows(part)))).numpy()

    def _each(self, work: Callable[[slice], T]) -> list[T]:
        """`work` on what is stepped as one batch: each environment if `exact`, else a part for each core."""
        n, threads = self.num_envs, self._threads
        if self.exact:
            return side_by_side(work, [slice(i, i + 1) for i in range(n)], min(n, threads), 1)
        count = min(threads, n // _PART) if self._split() else 1
        ends = [n // _PART * k // count * _PART for k in range(count)]
        return side_by_side(work, [slice(a, b) for a, b in itertools.pairwise([*ends, n])], count, threads // count)

    def _begin(self, i: int, start: int | None) -> None:
        """Put environment i at a start of the bank, drawn from its seed and episode if not given."""
        if start is None:
            size = len(self.bundle.starts.frames)
            start = int(reset_generator(int(self._seeds[i]), int(self._episodes[i])).integers(size))
        if start not in self._bank:
            while len(self._bank) >= _KEPT_STARTS:
                del self._bank[next(iter(self._bank))]
            bank, at = self.bundle.starts, slice(start, start + 1)
            self._bank[start] = self._look(bank.frames[at], bank.actions[at])
        self._place(i, start, *self._bank[start])

    def _look(self, frames: np.ndarray, actions: np.ndarray) -> tuple[State, np.ndarray]:
        """The state after a history (1, T, h, w, c), and how the codec draws it."""
        model = self.bundle.world_model
        state = model.start(frames, actions)
        drawn = self.observations == "pixels"
        return state, model.render(state)[0].numpy() if drawn else np.zeros(model.frame_shape, np.uint8)

    def _place(self, i: int, start: int, state: State, frame: np.ndarray) -> None:
        with torch.inference_mode():  # in place: every step makes new tensors, so nobody else holds these
            self._state.put(i, state)
        self._frames[i] = frame
        self._starts[i], self._steps[i], self._finished[i] = start, 0, False

    def _autoreset_now(self, infos: dict[str, Any]) -> dict[str, Any]:
        done = self._finished.copy()
        final, last = np.full(self.num_envs, None, dtype=object), self._shown()
        final_info = {k: np.where(done, v, np.zeros_like(v)) for k, v in infos.items() if not k.startswith("_")}
        final_info |= {f"_{k}": done for k in list(final_info)}
        for i in np.flatnonzero(done):
            final[i] = last[i].copy()
            self._episodes[i] += 1
            self._begin(int(i), None)
        fresh = self._infos(
            np.where(done, 0.0, infos["uncertainty"]),
            **{k: np.where(done, np.zeros_like(infos[k]), infos[k]) for k in _DETAILS},
        )
        return fresh | {"final_obs": final, "_final_obs": done, "final_info": final_info, "_final_info": done}

    def _infos(self, uncertainty: np.ndarray, **details: np.ndarray) -> dict[str, Any]:
        infos = {"uncertainty": uncertainty, "dream_step": self._steps.copy(), "start": self._starts.copy(), **details}
        return self._batched(infos)


_DETAILS = ("expected_reward", "reward_probability", "end_probability", "diverged", "uncertain")
