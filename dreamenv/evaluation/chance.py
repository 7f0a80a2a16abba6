"""What chance leaves to know: the real game run again from the same moment, with the same actions and other numbers."""

from __future__ import annotations

from contextlib import closing
from itertools import islice, permutations
from typing import Any, NamedTuple

import numpy as np

from dreamenv.bundle import GameFacts
from dreamenv.config import check
from dreamenv.contract.frames import NATIVE
from dreamenv.contract.games import get_game
from dreamenv.contract.noise import philox
from dreamenv.evaluation.clips import HELD_OUT, moments, real_envs
from dreamenv.evaluation.metrics import psnr, squared_error, still_pixels
from dreamenv.evaluation.open_loop import horizons_within
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

    Real moments are continued several times by the same actions, each time with other random numbers. The best
    prediction is the mean of all futures, and its squared error is their variance. So no model does better on such
    moments. It may have to do worse: what the game has decided but no picture shows yet, such as what will enter a
    level, is the same in all runs.

    The moments are not those of the clips. An episode must not end within `steps` in any run, so calm moments count for
    more than they are.

    Args:
        game: which.
        count: moments.
        steps: how far they are continued.
        levels: first level and number of levels.
        policy: who plays. It must not look at the pictures, lest the actions tell what the first run's chance was.
        seed: decides levels, actions and random numbers.
        runs: continuations of each moment, R >= 2.
        frame: (H, W, C) of a picture.

    Returns:
        Of each of `HORIZONS` that is reached: `chance_psnr_h` of the best prediction in dB, 100 where all runs are the
        same; `chance_copy_psnr_h` of copying the moment's picture; and `chance_psnr_still_h` of one run in what stands
        still in another. The last is no bound, for what stands still is chosen by what happened. It is what a perfect
        simulator scores that draws its own random numbers. `chance_moments`: how many were found, fewer than `count`
        where episodes seldom last so long.

    Raises:
        ConfigError: `count` or `steps` < 1, more steps than an episode has, `runs` < 2, a negative seed, or a policy
            that looks.
        PolicyError: an unknown policy.
    """
    check(count >= 1 and steps >= 1, f"moments {count} of {steps} steps: must both be >= 1")
    check(runs >= 2, f"runs {runs}: must be >= 2")
    check(seed >= 0, f"seed {seed}: must be >= 0")
    most = game.max_steps
    check(steps < most, f"steps {steps}: an episode of {game.name} has {most} at most; ask for fewer")
    looks = make_policy(policy, np.asarray(get_game(game.name).bias)).looks
    check(not looks, f"policy {policy}: goes by what it sees; take one that does not, such as mix")
    horizons = horizons_within(steps)
    found: list[Errors] = []
    rng, share = philox((seed, 0xC4A2CE)), -(-count // 10)
    with closing(real_envs(game.name, min(32, count), levels, game.distribution_mode, frame)) as envs:
        for moment in islice(moments(envs, policy, rng, 1, _SPACING), _ROUNDS):
            futures, whole = _futures(envs, moment.state, policy, steps, runs, rng)
            kept = rng.permutation(np.flatnonzero(whole))[:share]
            found += [_errors(futures[:, i], moment.past[i], horizons) for i in kept]
            if len(found) >= count:
                break
    return _figures(found[:count], horizons)


def _figures(found: list[Errors], horizons: np.ndarray) -> dict[str, float]:
    """The figures of what was found, in dB."""
    figures: dict[str, float] = {"chance_moments": len(found)}
    if not found:
        return figures
    best, copied, wrong, still = (np.mean(column, 0) for column in zip(*found, strict=True))
    for i, h in enumerate(horizons.tolist()):
        figures |= {f"chance_psnr_{h}": float(psnr(best[i])), f"chance_copy_psnr_{h}": float(psnr(copied[i]))}
        if still[i] > 0:
            figures[f"chance_psnr_still_{h}"] = float(psnr(wrong[i] / still[i]))
    return figures


def _futures(
    envs: Any, state: bytes, policy: str, steps: int, runs: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 (R, N, T, *frame) of a moment's continuations, and bool (N,): whether no run ends an episode.

    The first is the game's own; the others take its actions.
    """
    actor, actions = make_policy(policy, np.asarray(envs.unwrapped.game.bias)), []
    n = envs.num_envs
    futures = np.empty((runs, n, steps, *envs.single_observation_space.shape), np.uint8)
    whole = np.ones(n, bool)
    for run in range(runs):
        frames, first = envs.unwrapped.restore(state), np.ones(n, bool)
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


class Errors(NamedTuple):
    """How far one moment's futures are apart, float64 (H,) each.

    Attributes:
        best: mean squared error of the best prediction.
        copied: mean squared error of the moment's own picture.
        wrong: summed squared error of a run over the pixels that stand still in another, mean of all pairs.
        still: how many these are.
    """

    best: np.ndarray
    copied: np.ndarray
    wrong: np.ndarray
    still: np.ndarray


def _errors(futures: np.ndarray, last: np.ndarray, horizons: np.ndarray) -> Errors:
    """Of futures uint8 (R, T, *frame) at some steps, of a moment whose picture is `last` (1, *frame)."""
    still = still_pixels(futures, np.broadcast_to(last[None], (len(futures), *last.shape)))[:, horizons - 1]
    shown = futures[:, horizons - 1]
    variance = (shown / 255.0).var(0, ddof=1).mean((1, 2, 3))
    copied = squared_error(last[None], shown).mean((0, 2, 3))
    pairs = permutations(range(len(futures)), 2)
    wrong = np.mean([(squared_error(shown[a], shown[b]) * still[b]).sum((1, 2)) for a, b in pairs], 0)
    return Errors(variance, copied, wrong, still.sum((2, 3)).mean(0))
