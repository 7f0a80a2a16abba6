"""What chance leaves to know: the real game run again from the same moment, with the same actions and other numbers."""

from __future__ import annotations

from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np

from dreamenv.bundle import GameFacts
from dreamenv.config import check
from dreamenv.contract.frames import NATIVE
from dreamenv.contract.noise import philox
from dreamenv.evaluation.clips import HELD_OUT, moments, real_envs
from dreamenv.evaluation.metrics import psnr, squared_error, still_pixels
from dreamenv.evaluation.open_loop import HORIZONS
from dreamenv.policies.simple import make_policy

_SPACING, _ROUNDS = 12, 64  # steps between moments, and how many times a batch of games is looked at


def chance(
    game: GameFacts,
    count: int,
    steps: int,
    levels: tuple[int, int] = HELD_OUT,
    policy: str = "mix",
    seed: int = 0,
    runs: int = 4,
    frame: tuple[int, int, int] = NATIVE,
) -> dict[str, float]:
    """How well the game's future can be told by who knows the game, but not its random numbers (needs procgen).

    Real moments are continued `runs` times by the same actions, each time with other random numbers. What no picture
    shows but the game has decided already, such as what will enter a level, is the same in all of them, so a model that
    has only seen pictures may know less. Moments from which an episode ends within `steps` in any run are passed over.

    Args:
        game: which.
        count: moments.
        steps: how far they are continued.
        levels: first level and number of levels.
        policy: who plays.
        seed: decides levels, actions and random numbers.
        runs: continuations of each moment, R >= 2.
        frame: (H, W, C) of a picture.

    Returns:
        `chance_psnr_h`, for each of `HORIZONS` that is reached: of the best prediction in dB, the mean of all possible
        futures, whose squared error is the variance of the runs; a single other run is 3 dB worse.
        `chance_psnr_still_h`: of one run against another, in what stood still until then in that. 100 dB where the runs
        are the same. `chance_moments`: how many were found; of fewer than `count` where episodes seldom last so long.

    Raises:
        ConfigError: `count` or `steps` < 1, more steps than an episode has, or `runs` < 2.
    """
    check(count >= 1 and steps >= 1, f"moments {count} of {steps} steps: must both be >= 1")
    check(runs >= 2, f"runs {runs}: must be >= 2")
    check(
        steps < game.max_steps, f"steps {steps}: an episode of {game.name} has {game.max_steps} at most; ask for fewer"
    )
    at = np.array([h for h in HORIZONS if h <= steps])
    rng = philox((seed, 0xC4A2CE))
    errors: list[np.ndarray] = []  # of each moment and horizon: the variance, and the still pixels' error and number
    share = -(-count // 10)
    with closing(real_envs(game.name, min(32, count), levels, game.distribution_mode, frame)) as envs:
        for moment in islice(moments(envs, policy, rng, 1, _SPACING), _ROUNDS):
            futures, whole = _futures(envs, moment.state, policy, steps, runs, rng)
            usable = whole & (moment.age + steps < game.max_steps)
            for i in rng.permutation(np.flatnonzero(usable))[:share]:
                errors.append(_spread(futures[:, i], moment.past[i], at))
            if len(errors) >= count:
                break
    figures = {"chance_moments": float(len(errors[:count]))}
    if not errors:
        return figures
    variance, wrong, still = np.stack(errors[:count]).mean(0)  # (H,) each
    figures |= {f"chance_psnr_{h}": float(v) for h, v in zip(at, psnr(variance), strict=True)}
    kept = psnr(wrong / np.maximum(still, 1e-12))
    return figures | {f"chance_psnr_still_{h}": float(v) for h, v, n in zip(at, kept, still, strict=True) if n > 0}


def _futures(
    envs: Any, state: bytes, policy: str, steps: int, runs: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 (R, N, T, *frame) of a moment's continuations, and bool (N,): whether no run ends an episode.

    The first is the game's own; the others take its actions.
    """
    actor, actions = make_policy(policy, np.asarray(envs.unwrapped.game.bias)), []
    frames = envs.unwrapped.restore(state)
    futures = np.empty((runs, len(frames), steps, *frames.shape[1:]), np.uint8)
    whole = np.ones(len(frames), bool)
    for run in range(runs):
        frames, first = envs.unwrapped.restore(state), np.ones(len(frames), bool)
        if run:
            envs.unwrapped.reseed(int(rng.integers(2**63 - 1)))
        for step in range(steps):
            if not run:
                actions.append(actor.act(frames, first, rng))
            frames, _, terminated, truncated, _ = envs.step(actions[step])
            futures[run, :, step], first = frames, terminated | truncated
            whole &= ~first
    envs.unwrapped.restore(state)
    return futures, whole


def _spread(futures: np.ndarray, last: np.ndarray, at: np.ndarray) -> np.ndarray:
    """How far one moment's futures uint8 (R, T, ...) are apart at steps `at`, float64 (3, H); `last` is (1, ...).

    The squared error of the best prediction; the sum of squared errors of runs in what stands still in another; and how
    many pixels do, both over all pairs.
    """
    still = still_pixels(futures, np.broadcast_to(last[None], (len(futures), *last.shape)))[:, at - 1]
    shown = futures[:, at - 1]
    variance = (shown / 255.0).var(0, ddof=1).mean((1, 2, 3))
    pairs = [(a, b) for a in range(len(futures)) for b in range(len(futures)) if a != b]
    wrong = np.mean([(squared_error(shown[a], shown[b]) * still[b]).sum((1, 2)) for a, b in pairs], 0)
    return np.stack([variance, wrong, still.sum((2, 3)).mean(0)])
