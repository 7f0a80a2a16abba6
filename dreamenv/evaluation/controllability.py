"""Does the dream do what it is told? Measures that set the actions, not only the frames, against the real game."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from dreamenv.bundle import GameFacts
from dreamenv.config import check
from dreamenv.contract.actions import COMBOS, NUM_ACTIONS
from dreamenv.contract.frames import NATIVE
from dreamenv.contract.noise import philox
from dreamenv.evaluation.clips import HELD_OUT, moments, real_envs
from dreamenv.evaluation.imagine import imagine, open_loop
from dreamenv.evaluation.metrics import psnr, squared_error
from dreamenv.flow import SamplerConfig
from dreamenv.types import Clips
from dreamenv.world_model import WorldModel

DELTA_STEP = 4
"""The step at which Genie states its delta-PSNR."""


def delta_psnr(model: WorldModel, clips: Clips, dream: np.ndarray, sampler: SamplerConfig, seed: int = 0) -> np.ndarray:
    """PSNR under the true actions minus PSNR under random ones, (H,) in dB (Genie, Bruce et al. 2024, section 3).

    Args:
        model: the world model.
        clips: real clips; as many steps are compared as `dream` has.
        dream: uint8 (N, H, 64, 64, 3), the dream of the clips under their true actions.
        sampler: how it was drawn.
        seed: decides the random actions and the noise.
    """
    k, horizon = clips.context, dream.shape[1]
    random = philox((seed, 0xAC7)).integers(NUM_ACTIONS, size=(len(dream), horizon))
    other, _ = imagine(model, clips.frames[:, :k], clips.actions[:, : k - 1], random, sampler, seed)
    real = clips.frames[:, k : k + horizon]
    return np.asarray(
        psnr(squared_error(dream, real).mean((0, 2, 3))) - psnr(squared_error(other, real).mean((0, 2, 3)))
    )


def action_shifts(
    model: WorldModel, clips: Clips, dream: np.ndarray, sampler: SamplerConfig, seed: int = 0, steps: int = 4
) -> dict[int, float]:
    """PSNR over the first steps when the dream is given each action one step late (-1), in time (0), one early (1).

    A model that was trained off by one dreams best under shifted actions.

    Args:
        model: the world model.
        clips: real clips, with a horizon beyond `steps`.
        dream: uint8 (N, H, 64, 64, 3) with H >= `steps`, the dream of the clips under their actions in time.
        sampler: how it was drawn.
        seed: decides its noise.
        steps: how many are compared.

    Returns:
        shift -> PSNR in dB of the mean squared error over clips and steps.

    Raises:
        ConfigError: the clips are too short.
    """
    k = clips.context
    check(clips.horizon > steps, f"steps {steps}: the clips have a horizon of {clips.horizon}, one more is needed")
    out = {}
    for shift in (-1, 0, 1):
        moved = np.concatenate([clips.actions[:, :1], clips.actions], 1)[:, 1 + shift :][:, : k - 1 + steps]
        shifted = Clips(clips.frames[:, : k + steps], moved, clips.level_seeds, k)
        shown = open_loop(model, shifted, sampler, seed)[0] if shift else dream[:, :steps]
        out[shift] = float(psnr(squared_error(shown, clips.frames[:, k : k + steps]).mean()))
    return out


def frame_shifts(clips: Clips, dream: np.ndarray, steps: int = 4) -> dict[int, float]:
    """PSNR in dB of the dream's first frames against real ones a step earlier (-1), the same (0), a step later (1).

    `dream` is uint8 (N, H, 64, 64, 3) with H >= `steps`; the clips' horizon must go beyond `steps`.
    """
    k = clips.context
    return {
        s: float(psnr(squared_error(dream[:, :steps], clips.frames[:, k + s : k + s + steps]).mean()))
        for s in (-1, 0, 1)
    }


@dataclass(frozen=True)
class Branches:
    """One real moment continued under every distinct action, N moments in all.

    Attributes:
        context: uint8 (N, K, 64, 64, 3); history: int64 (N, K - 1): the dream's start.
        actions: int64 (A,), one for each distinct meaning.
        real: uint8 (N, A, H, 64, 64, 3), the real game's frames while the action is held.
    """

    context: np.ndarray
    history: np.ndarray
    actions: np.ndarray
    real: np.ndarray


def distinct_actions(game: GameFacts) -> np.ndarray:
    """One action of each distinct meaning in the game, int64 (A,): no-op if it can be, else that of fewest keys."""
    by_keys = sorted(range(NUM_ACTIONS), key=lambda a: (len(COMBOS[a]), a), reverse=True)
    return np.array(sorted({game.action_meanings[a]: a for a in by_keys}.values()), np.int64)


def branch_real(
    game: GameFacts,
    count: int,
    context: int,
    steps: int,
    levels: tuple[int, int] = HELD_OUT,
    policy: str = "mix",
    seed: int = 0,
    spacing: int = 12,
    frame: tuple[int, int, int] = NATIVE,
) -> Branches:
    """Play the real game and, every now and then, branch it under each distinct action (needs procgen).

    Moments at which a branch or the context would leave the episode are passed over. They are spread over at least ten
    points of time, so that not all lie near the start of an episode.

    Raises:
        ConfigError: `count` or `steps` < 1, or branches so long that hardly any stays within its episode.
    """
    check(count >= 1 and steps >= 1, f"branches {count} of {steps} steps: must both be >= 1")
    actions = distinct_actions(game)
    with closing(real_envs(game.name, min(32, count), levels, game.distribution_mode, frame)) as envs:
        rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        found, rounds, share = 0, 0, -(-count // 10)
        rng = philox((seed, 0xB2A2C4))
        for moment in moments(envs, policy, rng, context, spacing):
            rounds += 1
            check(
                rounds < 50 or found >= rounds,
                f"branch_steps {steps}: only {found} branches stayed within their episodes; hold "
                "the actions for fewer steps",
            )
            usable = moment.past_whole & (moment.age + steps < envs.unwrapped.game.max_steps)
            if usable.any():
                real, whole = _branches_of(envs, moment.state, actions, steps)
                kept = rng.permutation(np.flatnonzero(usable & whole))[:share]
                rows.append((moment.past[kept], moment.history[kept], real[kept]))
                found += len(kept)
            if found >= count:
                break
    contexts, histories, reals = (np.concatenate(column)[:count] for column in zip(*rows, strict=True))
    return Branches(contexts, histories, actions, reals)


def _branches_of(envs: Any, moment: bytes, actions: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 (N, A, H, ...) of each action held from a moment, and bool (N,), where none ends the episode."""
    n = envs.num_envs
    real = np.empty((n, len(actions), steps, *envs.single_observation_space.shape), np.uint8)
    whole = np.ones(n, bool)
    for a, action in enumerate(actions):
        envs.unwrapped.restore(moment)
        for h in range(steps):
            real[:, a, h], _, terminated, truncated, _ = envs.step(np.full(n, action))
            whole &= ~(terminated | truncated)
    envs.unwrapped.restore(moment)
    return real, whole


def branch_dream(model: WorldModel, branches: Branches, sampler: SamplerConfig, seed: int = 0) -> np.ndarray:
    """The same branches, dreamt: uint8 (N, A, H, 64, 64, 3). All branches of a moment share their noise."""
    n, a, h = branches.real.shape[:3]
    keys = np.repeat(np.arange(n), a)
    held = np.tile(np.repeat(branches.actions[:, None], h, 1), (n, 1))
    dream, _ = imagine(
        model, np.repeat(branches.context, a, 0), np.repeat(branches.history, a, 0), held, sampler, seed, keys=keys
    )
    return dream.reshape(branches.real.shape)


def branch_accuracy(real: np.ndarray, dream: np.ndarray) -> dict[str, float]:
    """How often a dream branch's nearest real branch is its own.

    Real branches with the same picture (an action that changes nothing just now) count as one.

    Args:
        real: uint8 (N, A, 64, 64, 3), the real frames after each of A actions.
        dream: the dreamt ones.

    Returns:
        `accuracy`; `chance`, what guessing would score; `distinct`, the mean number of different real pictures.
    """
    n, a = real.shape[:2]
    same = (real[:, :, None] == real[:, None]).all((3, 4, 5))  # (N, A, A)
    distance = squared_error(dream[:, :, None], real[:, None]).mean((3, 4))
    nearest = distance.argmin(2)
    right = same[np.arange(n)[:, None], np.arange(a)[None], nearest]
    contested = ~same.all(2)  # where every action gives one picture there is nothing to tell apart
    chance = same.sum(2) / a
    return {
        "accuracy": float(right[contested].mean()) if contested.any() else 0.0,
        "chance": float(chance[contested].mean()) if contested.any() else 0.0,
        "distinct": float((1 / same.sum(2)).sum(1).mean()),
    }
