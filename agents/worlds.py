"""The worlds an agent can live in, as SB3 environments: the real game, the dream, or some of both."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecMonitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvStepReturn

from agents.adapter import NativeVecEnv
from dreamenv.bundle import Bundle, Starts, check_mode, load_bundle, resolve_bundle
from dreamenv.config import check
from dreamenv.contract.frames import NATIVE, observe
from dreamenv.contract.games import get_game
from dreamenv.data import HELD_OUT_FROM, Dataset, Shard, Windows
from dreamenv.errors import ConfigError, DatasetError
from dreamenv.evaluation.clips import real_envs
from dreamenv.policies.agent import load_agent
from dreamenv.vector import DreamVectorEnv
from dreamenv.wrappers import LatentObservation, TerminalValue, UncertaintyPenalty

TRAIN_LEVELS = (0, HELD_OUT_FROM)
"""First level and number of the levels agents train on."""


def check_lengths(game: str, **lengths: int | None) -> None:
    """Raise `ConfigError`, naming it, for a number of steps that no episode of a game can have; None is none."""
    longest = get_game(game).max_steps
    for name, length in lengths.items():
        check(length is None or 1 <= length <= longest, f"{name} {length}: must be in 1..{longest} for {game}")


def real_world(
    game: str,
    num_envs: int,
    levels: tuple[int, int] = TRAIN_LEVELS,
    distribution_mode: str = "easy",
    frame: tuple[int, int, int] = NATIVE,
    seen_by: Bundle | None = None,
) -> NativeVecEnv:
    """The real game (needs procgen).

    Args:
        game: which.
        num_envs: how many.
        levels: the first one, and how many.
        distribution_mode: Procgen's difficulty.
        frame: (H, W, C) of an observation.
        seen_by: a bundle whose latents of the frames are the observations; None shows the frames.
    """
    if seen_by is None:
        return NativeVecEnv(real_envs(game, num_envs, levels, distribution_mode, frame))
    envs = real_envs(game, num_envs, levels, distribution_mode, seen_by.world_model.frame_shape)
    return NativeVecEnv(LatentObservation(envs, seen_by))


def dream_world(
    bundle: Bundle,
    num_envs: int,
    horizon: int | None = None,
    starts: Starts | None = None,
    penalty: float = 0.0,
    vote: Path | None = None,
    critic: Path | None = None,
    discount: float = 0.99,
    **options: Any,
) -> NativeVecEnv:
    """The dream.

    Args:
        bundle: the bundle.
        num_envs: how many.
        horizon: truncate after so many imagined steps; None leaves the game's own limit. Short dreams from diverse
            starts leave an agent little room to exploit the model's errors.
        starts: real contexts to dream from instead of the bundle's bank.
        penalty: how much of the dream's uncertainty is taken from its rewards, see `UncertaintyPenalty`.
        vote: bundle folder of a second model, whose disagreement is the dream's uncertainty, see `WorldModel`.
        critic: saved agent whose values say what a dream that is cut off was still worth, see `TerminalValue`.
        discount: of the agent that learns, for these values.
        options: for `DreamVectorEnv`, such as `sampler` and `truncate_above`.
    """
    if horizon is not None:
        if not 1 <= horizon <= bundle.game.max_steps:
            raise ConfigError(f"horizon {horizon}: must be in 1..{bundle.game.max_steps}")
        bundle = replace(bundle, game=replace(bundle.game, max_steps=horizon))
    if starts is not None:
        bundle = replace(bundle, starts=starts)
    if vote is not None:
        model = bundle.world_model
        second = load_bundle(vote, str(model.device), model.precision, bundle.game.name).world_model
        bundle = replace(bundle, world_model=model.with_second(second))
    envs = DreamVectorEnv(num_envs, bundle=bundle, autoreset_mode="SameStep", **options)
    paying = UncertaintyPenalty(envs, penalty) if penalty else envs
    if critic is None:
        return NativeVecEnv(paying)
    judge = load_agent(critic).to(bundle.world_model.device)
    facts = judge.facts.get("critic")
    told = facts.get("discount", discount) if isinstance(facts, dict) else discount
    check(told == discount, f"critic {critic}: discounts by {told}, the agent by {discount}; train one that does too")
    return NativeVecEnv(TerminalValue(paying, judge.values, discount))


def training_shards(dataset: Dataset, game: str) -> list[Shard]:
    """The shards of a dataset that are of one game.

    Raises:
        DatasetError: there are none, or they hold held-out levels.
    """
    shards = [shard for shard in dataset.shards if shard.game == game]
    if not shards:
        raise DatasetError(f"{dataset.folder}: is of {', '.join(dataset.games)}, not of {game}; collect that")
    if (highest := max(int(s.level_seeds.max()) for s in shards)) >= HELD_OUT_FROM:
        raise DatasetError(
            f"{dataset.folder}: holds level {highest}; levels from {HELD_OUT_FROM} on are held out, use others to train"
        )
    return shards


def dataset_starts(
    folder: Path,
    game: str,
    count: int,
    context: int,
    seed: int = 0,
    frame: tuple[int, int, int] = NATIVE,
    distribution_mode: str = "easy",
) -> Starts:
    """`count` real contexts drawn from anywhere in a dataset's episodes of a game, their frames as (H, W, C) `frame`.

    Raises:
        DatasetError: damaged, too short, of other games or another difficulty, or it holds held-out levels.
    """
    dataset = Dataset(folder)
    if game in dataset.modes and dataset.modes[game] != distribution_mode:
        raise DatasetError(
            f"{folder}: is of {game} in {dataset.modes[game]}, the dream in {distribution_mode}; collect that"
        )
    shards = training_shards(dataset, game)
    windows = Windows([s.first for s in shards], context)
    if not len(windows):
        raise DatasetError(f"{folder}: no episode has {context} consecutive frames; collect more")
    chosen = np.sort(np.random.default_rng(seed).choice(len(windows), min(count, len(windows)), replace=False))
    frames, actions, levels = [], [], []
    for shard, start in zip(windows.shard[chosen], windows.start[chosen], strict=True):
        part, rows = shards[shard], slice(start, start + context)
        frames.append(observe(part.frames[rows], frame))
        actions.append(part.actions[rows][:-1])
        levels.append(part.level_seeds[start])
    return Starts(np.stack(frames), np.stack(actions), np.array(levels, np.int32))


def make_world(
    world: str,
    game: str,
    num_envs: int,
    bundle: Path | None = None,
    device: str = "auto",
    data: Path | None = None,
    share: float = 0.5,
    observations: str = "pixels",
    distribution_mode: str | None = None,
    **options: Any,
) -> VecEnv:
    """Make the world called "real", "dream" or "mix" (of which `share` are dreams); see `TrainConfig` for the rest.

    Raises:
        ConfigError: another name, a mix without both, or another difficulty than the bundle's.
    """
    if world not in ("real", "dream", "mix"):
        raise ConfigError(f"world {world!r}: must be 'real', 'dream' or 'mix'")
    if world == "real" and bundle is None and observations == "pixels":
        return real_world(game, num_envs, distribution_mode=distribution_mode or "easy")
    loaded = load_bundle(resolve_bundle(bundle, game, distribution_mode), device, game=game)
    check_mode(loaded.game.distribution_mode, distribution_mode)
    seen_by = loaded if observations == "latent" else None
    if world == "real":
        shown = {"frame": loaded.world_model.frame_shape, "seen_by": seen_by}
        return real_world(game, num_envs, distribution_mode=loaded.game.distribution_mode, **shown)
    model = loaded.world_model
    where = {"frame": model.frame_shape, "distribution_mode": loaded.game.distribution_mode}
    starts = None if data is None else dataset_starts(data, loaded.game.name, 2000, model.context, **where)
    dreams = num_envs if world == "dream" else round(num_envs * share)
    if not 1 <= dreams <= num_envs or (world == "mix" and dreams == num_envs):
        raise ConfigError(f"share {share}: leaves {dreams} dreams of {num_envs} environments; a mix needs both worlds")
    dream = dream_world(loaded, dreams, starts=starts, observations=observations, **options)
    if world == "dream":
        return dream
    facts, shown = loaded.game, {"frame": loaded.world_model.frame_shape, "seen_by": seen_by}
    real = real_world(facts.name, num_envs - dreams, distribution_mode=facts.distribution_mode, **shown)
    return MixedVecEnv([dream, real])


class MixedVecEnv(VecEnv):
    """Several native batches as one, in order.

    Attributes:
        leaders: index of each batch's first environment.
    """

    def __init__(self, parts: list[NativeVecEnv]) -> None:
        self.parts = parts
        self.leaders = np.cumsum([0] + [p.num_envs for p in parts])[:-1].tolist()
        super().__init__(sum(p.num_envs for p in parts), parts[0].observation_space, parts[0].action_space)

    def reset(self) -> np.ndarray:
        """Reset every part; see `NativeVecEnv.reset`."""
        for part, at in zip(self.parts, self.leaders, strict=True):
            part._seeds, part._options = self._seeds[at : at + part.num_envs], self._options[at : at + part.num_envs]
        observations = [part.reset() for part in self.parts]
        self.reset_infos = [info for part in self.parts for info in part.reset_infos]
        self._reset_seeds()
        self._reset_options()
        return np.concatenate(observations)

    def step_async(self, actions: np.ndarray) -> None:
        """Hand each part its actions."""
        for part, at in zip(self.parts, self.leaders, strict=True):
            part.step_async(actions[at : at + part.num_envs])

    def step_wait(self) -> VecEnvStepReturn:
        """Step every part; see `NativeVecEnv.step_wait`."""
        steps = [part.step_wait() for part in self.parts]
        observations, rewards, dones = (np.concatenate([np.asarray(s[i]) for s in steps]) for i in range(3))
        self.reset_infos = [info for part in self.parts for info in part.reset_infos]
        return observations, rewards, dones, [info for s in steps for info in s[3]]

    def close(self) -> None:
        """Close every part."""
        for part in self.parts:
            part.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """See `NativeVecEnv.get_attr`."""
        every = [value for part in self.parts for value in part.get_attr(attr_name)]
        return [every[i] for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """See `NativeVecEnv.set_attr`."""
        if sorted(self._get_indices(indices)) != list(range(self.num_envs)):
            raise ConfigError(f"indices {indices}: the environments are batches; set {attr_name!r} for all of them")
        for part in self.parts:
            part.set_attr(attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the parts that hold the environments asked for, once each; see `NativeVecEnv.env_method`."""
        chosen = list(self._get_indices(indices))
        out: dict[int, Any] = {}
        for part, at in zip(self.parts, self.leaders, strict=True):
            own = [i for i in chosen if at <= i < at + part.num_envs]
            if own:
                results = part.env_method(method_name, *method_args, indices=[i - at for i in own], **method_kwargs)
                out |= dict(zip(own, results, strict=True))
        return [out[i] for i in chosen]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """See `NativeVecEnv.env_is_wrapped`."""
        return [False for _ in self._get_indices(indices)]


class TimedVecEnv(VecMonitor):
    """`VecMonitor` that also adds up the seconds spent in the environments.

    Attributes:
        seconds: spent in `step_wait` so far.
    """

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.seconds = 0.0

    def step_wait(self) -> Any:
        """See `VecMonitor.step_wait`."""
        began = time.perf_counter()
        result = super().step_wait()
        self.seconds += time.perf_counter() - began
        return result


def time_shares(envs: VecEnv, env: float, collecting: float, total: float) -> dict[str, float]:
    """Where the time went: `imagine` and `decode` (the dream's networks), the rest of `env`, `policy`, and `update`.

    `update` is all that is not collecting: gradients, and checkpoints between rollouts.
    """
    parts = [p.envs for p in envs.parts] if isinstance(envs, MixedVecEnv) else [cast(NativeVecEnv, envs).envs]
    dream = {"imagine": 0.0, "decode": 0.0}
    for part in parts:
        for name, seconds in getattr(part.unwrapped, "seconds", {}).items():
            dream[name] += seconds
    spent = dream | {"env": env - sum(dream.values()), "policy": collecting - env, "update": total - collecting}
    return {name: max(seconds, 0.0) / total for name, seconds in spent.items()}
