"""Real clips and the dream's open-loop continuation of them: same start, same actions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from dreamenv.config import check
from dreamenv.contract.frames import NATIVE
from dreamenv.contract.noise import philox
from dreamenv.data.windows import HELD_OUT_FROM, Windows
from dreamenv.policies.simple import make_policy
from dreamenv.types import Clips, Segment

HELD_OUT = (HELD_OUT_FROM, 1000)
"""First level and number of the held-out levels; no model or agent ever trains on them."""


def parse_levels(text: str) -> tuple[int, int]:
    """Parse "FIRST:END" into the first level and the number of levels.

    Raises:
        ConfigError: not two integers, or an empty or negative range.
    """
    first, colon, end = text.partition(":")
    check(
        bool(colon) and first.isdecimal() and end.isdecimal() and int(first) < int(end),
        f"levels {text!r}: expected FIRST:END with FIRST < END, such as 10000:11000",
    )
    return int(first), int(end) - int(first)


def real_envs(
    game: str, num_envs: int, levels: tuple[int, int], distribution_mode: str, frame: tuple[int, int, int] = NATIVE
) -> Any:
    """The real game in SAME_STEP mode (needs procgen).

    Args:
        game: which.
        num_envs: how many.
        levels: the first one, and how many.
        distribution_mode: Procgen's difficulty.
        frame: (H, W, C) of an observation.
    """
    return gym.make_vec(
        "envs:RealProcgen-v0",
        num_envs=num_envs,
        game=game,
        start_level=levels[0],
        num_levels=levels[1],
        distribution_mode=distribution_mode,
        autoreset_mode="SameStep",
        frame_shape=frame,
    )


@dataclass(frozen=True)
class Moment:
    """Where a batch of real games stands.

    Attributes:
        state: `envs.unwrapped.restore` returns to it.
        past: uint8 (N, K, *frame), the last K frames.
        history: int64 (N, K - 1), the actions between them.
        age: int64 (N,), steps since the episode began.
        past_whole: bool (N,), whether all K frames are of one episode.
    """

    state: bytes
    past: np.ndarray
    history: np.ndarray
    age: np.ndarray
    past_whole: np.ndarray


def moments(envs: Any, policy: str, rng: np.random.Generator, context: int, spacing: int) -> Iterator[Moment]:
    """Play on for ever, and stop every `spacing` steps.

    If you step the games yourself, restore the moment before you ask for the next one.

    Args:
        envs: of `real_envs`.
        policy: who plays.
        rng: decides levels and actions.
        context: frames of the past, K; there are fewer where so many were not played yet.
        spacing: steps from one moment to the next.

    Yields:
        The moments.

    Raises:
        PolicyError: an unknown policy.
    """
    actor = make_policy(policy, np.asarray(envs.unwrapped.game.bias))
    frames, _ = envs.reset(seed=rng.integers(2**31 - 1, size=envs.num_envs).tolist())
    age, first = np.zeros(envs.num_envs, np.int64), np.ones(envs.num_envs, bool)
    past, taken = [frames], []
    while True:
        for _ in range(spacing):
            chosen = actor.act(frames, first, rng)
            frames, _, terminated, truncated, _ = envs.step(chosen)
            first = terminated | truncated
            age = np.where(first, 0, age + 1)
            past, taken = [*past, frames][-context:], [*taken, chosen][-context + 1 :] if context > 1 else []
        history = np.stack(taken, 1) if taken else np.zeros((envs.num_envs, 0), np.int64)
        whole = (age >= context - 1) & (len(past) == context)
        yield Moment(envs.unwrapped.snapshot(), np.stack(past, 1), history, age, whole)


def play_real(
    game: str,
    steps: int,
    num_envs: int = 32,
    policy: str = "mix",
    levels: tuple[int, int] = HELD_OUT,
    distribution_mode: str = "easy",
    seed: int = 0,
    frame: tuple[int, int, int] = NATIVE,
) -> Segment:
    """Play the real game for `steps` steps in each of `num_envs` environments (needs procgen).

    Raises:
        ConfigError: `steps` < 1, `seed` < 0, or what the environment refuses.
    """
    check(steps >= 1, f"steps {steps}: must be >= 1")
    check(0 <= seed < 2**63, f"seed {seed}: must be in 0..2^63-1")
    envs = real_envs(game, num_envs, levels, distribution_mode, frame)
    actor = make_policy(policy, np.asarray(envs.unwrapped.game.bias))
    rng = philox((seed, 0xC11B5))
    frames, infos = envs.reset(seed=rng.integers(2**31 - 1, size=num_envs).tolist())
    first = np.ones(num_envs, bool)
    rows: list[tuple[np.ndarray, ...]] = []
    for _ in range(steps):
        actions = actor.act(frames, first, rng)
        following, rewards, terminated, truncated, after = envs.step(actions)
        rows.append((frames, actions, rewards.astype(np.float32), terminated, truncated, first, infos["level_seed"]))
        frames, infos, first = following, after, terminated | truncated
    envs.close()
    return Segment(*(np.stack(column, 1) for column in zip(*rows, strict=True)))


def cut_clips(play: Segment, count: int, context: int, horizon: int, seed: int = 0) -> Clips:
    """Cut `count` random clips out of played games.

    Raises:
        ConfigError: the games hold fewer such windows.
    """
    check(count >= 1, f"clips {count}: must be >= 1")
    check(horizon >= 1, f"horizon {horizon}: must be >= 1")
    n, t = play.first.shape
    first = play.first.copy()
    first[:, 0] = True
    windows = Windows([first.reshape(-1)], context + horizon)
    check(
        len(windows) >= count,
        f"clips {count}: only {len(windows)} windows of {context + horizon} steps were played; "
        "ask for fewer clips or a shorter horizon",
    )
    chosen = np.sort(np.random.default_rng(seed).choice(len(windows), count, replace=False))
    start = windows.start[chosen]
    indices = start[:, None] + np.arange(context + horizon)
    frames = play.frames.reshape(n * t, *play.frames.shape[2:])[indices]
    return Clips(frames, play.actions.reshape(-1)[indices[:, :-1]], play.level_seeds.reshape(-1)[start], context)
