"""Policies played in both worlds from the same levels: is a policy's value in the dream its value in the game?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from dreamenv.bundle import Bundle, GameFacts, bundled_agent
from dreamenv.config import check
from dreamenv.contract.actions import COMBOS, NAMES
from dreamenv.contract.games import get_game
from dreamenv.contract.noise import philox
from dreamenv.evaluation.clips import HELD_OUT, real_envs
from dreamenv.evaluation.controllability import distinct_actions
from dreamenv.evaluation.metrics import interval, pearson, spearman
from dreamenv.flow import SamplerConfig
from dreamenv.policies.simple import VectorPolicy, make_policy
from dreamenv.vector import DreamVectorEnv

_HELD = 7  # actions
_OTHERS = ("random", "sticky", "held", "biased", "mix")
_BUNDLED = tuple(f"bundled:{epsilon:g}" for epsilon in (0.9, 0.75, 0.6, 0.5, 0.4, 0.25, 0.1)) + ("bundled",)


def standard_policies(game: GameFacts) -> tuple[str, ...]:
    """Policies of different skill for a game, by which a dream is judged: about twenty, where an agent ships.

    No key and the game's seven likeliest actions held, five players that learn nothing, and the agent that ships with
    the bundle, alone and at random from a tenth to nine tenths of the time. The likeliest actions are those that the
    game's biased player takes most, each meaning once.
    """
    bias = get_game(game.name).bias
    useful = sorted(distinct_actions(game).tolist(), key=lambda a: (-bias[a], len(COMBOS[a]), a))
    held = [NAMES[a] for a in useful if game.action_meanings[a] != "nothing"][:_HELD]
    return tuple(f"hold:{name}" for name in ("noop", *held)) + _OTHERS + _BUNDLED


@dataclass(frozen=True)
class Episodes:
    """One episode of each of N environments, cut off at a step limit.

    Attributes:
        returns: float64 (N,); lengths: int64 (N,); ended: bool (N,), whether it terminated before the limit.
    """

    returns: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray


def play_episodes(
    envs: Any, frames: np.ndarray, policy: VectorPolicy, limit: int, rng: np.random.Generator, films: int = 0
) -> tuple[Episodes, list[np.ndarray]]:
    """Play every environment of a vector env, which stands at `frames` uint8 (N, 64, 64, 3), to its end or `limit`.

    Dreams are played in copies, and the env handed in stays where it stands. Those that have ended are dropped, none
    begins anew, and none is drawn if nobody looks. The real game is stepped on in SAME_STEP mode.

    Returns:
        The episodes, and of the first `films` the frames before each step, uint8 (T, 64, 64, 3).
    """
    n, frames = len(frames), frames.copy()
    playing = np.arange(n)  # whom the environments of `envs` belong to
    running, first = np.ones(n, bool), np.ones(n, bool)
    returns, lengths, ended = np.zeros(n), np.zeros(n, np.int64), np.zeros(n, bool)
    film: list[np.ndarray] = []
    drawn = policy.looks or films > 0
    if isinstance(envs, DreamVectorEnv):
        envs = envs.select(playing, drawn)
        envs.autoreset_mode = AutoresetMode.DISABLED
    for _ in range(limit):
        film.append(frames[:films].copy())
        actions = policy.act(frames, first, rng)
        frames[playing], rewards, terminated, truncated, _ = envs.step(actions[playing])
        going = running[playing]
        returns[playing] += np.where(going, rewards, 0)
        lengths[playing] += going
        ended[playing] |= going & terminated
        running[playing] &= ~(terminated | truncated)
        first[:] = False
        first[playing] = terminated | truncated
        if not running.any():
            break
        if isinstance(envs, DreamVectorEnv) and running.sum() < len(playing):
            envs, playing = envs.select(np.flatnonzero(running[playing]), drawn), np.flatnonzero(running)
    return Episodes(returns, lengths, ended), [np.stack(film, 1)[i, : lengths[i]] for i in range(min(films, n))]


def play_both(
    bundle: Bundle,
    policies: tuple[str, ...] | None = None,
    episodes: int = 20,
    limit: int | None = None,
    sampler: SamplerConfig | None = None,
    levels: tuple[int, int] = HELD_OUT,
    seed: int = 0,
) -> dict[str, tuple[Episodes, Episodes]]:
    """Play policies in the real game and in the dream of it, from the same first frames (needs procgen).

    Args:
        bundle: the bundle.
        policies: specifications, see `dreamenv.policies.simple.make_policy`; "bundled" is the agent that ships with the
            bundle, "bundled:EPSILON" the same at random so often, and both are left out where none ships. None: those
            of `standard_policies`.
        episodes: how many each, one per level.
        limit: steps after which an episode is cut off, in both worlds; None is the game's own limit.
        sampler: how the dream is drawn.
        levels: first level and number of levels.
        seed: decides levels, actions and noise.

    Returns:
        specification -> (real episodes, dreamt episodes).

    Raises:
        ConfigError: `episodes` < 1, or `limit` outside 1 .. the game's own.
        PolicyError: an unknown policy.
    """
    policies = standard_policies(bundle.game) if policies is None else policies
    limit = bundle.game.max_steps if limit is None else limit
    check(episodes >= 1, f"episodes {episodes}: must be >= 1")
    check(1 <= limit <= bundle.game.max_steps, f"limit {limit}: must be in 1..{bundle.game.max_steps}")
    game, frame = bundle.game, bundle.world_model.frame_shape
    real = real_envs(game.name, episodes, levels, game.distribution_mode, frame)
    dream = DreamVectorEnv(episodes, bundle=bundle, sampler=sampler, autoreset_mode="SameStep")
    bias = np.asarray(real.unwrapped.game.bias)
    chosen = levels[0] + philox((seed, 0xC105ED)).choice(levels[1], episodes, replace=episodes > levels[1])
    out = {}
    agent = bundled_agent(bundle.folder, game.name)
    frames, _ = real.reset(seed=seed, options={"level": chosen})
    imagined, _ = dream.reset(seed=seed, options={"frames": frames[:, None]})
    for number, spec in enumerate(policies):
        name = spec
        if spec.partition(":")[0] == "bundled":
            if agent is None:
                continue
            name = f"agent:{agent}" + spec[len("bundled") :]
        frames, _ = real.reset(seed=seed, options={"level": chosen})
        out[spec] = tuple(
            play_episodes(envs, start, make_policy(name, bias), limit, philox((seed, number)))[0]
            for envs, start in ((real, frames), (dream, imagined))
        )
    real.close()
    return out  # pyright: ignore[reportReturnType]


def agreement(results: dict[str, tuple[Episodes, Episodes]], replicates: int = 2000, seed: int = 0) -> dict[str, Any]:
    """How well dream values predict real values over policies.

    Value is the mean return. Intervals are 95 % bootstrap intervals over episodes: each replicate draws levels anew,
    the same ones in both worlds.

    Returns:
        `pearson` and `spearman` (None where all values of one world are the same) and `mean_absolute_error`, each with
        `_ci`; and `policies`: per policy the mean return, episode length and success rate (a positive
        return) in both worlds, with `_ci` of the returns.
    """
    names = list(results)
    returns = np.stack([np.stack([e.returns for e in results[n]]) for n in names])  # (P, 2, E)
    draws = np.random.default_rng(seed).integers(returns.shape[2], size=(replicates, returns.shape[2]))
    means = returns[:, :, draws].mean(-1)  # (P, 2, R)
    value = returns.mean(-1)

    def figures(v: np.ndarray) -> tuple[float, float, float]:
        return pearson(v[:, 0], v[:, 1]), spearman(v[:, 0], v[:, 1]), float(np.abs(v[:, 0] - v[:, 1]).mean())

    replicated = np.array([figures(means[:, :, r]) for r in range(replicates)])
    out: dict[str, Any] = {}
    for i, key in enumerate(("pearson", "spearman", "mean_absolute_error")):
        out[key], out[f"{key}_ci"] = figures(value)[i], list(interval(replicated[:, i]))
    if not np.ptp(value, 0).all():
        out |= dict.fromkeys(("pearson", "pearson_ci", "spearman", "spearman_ci"))
    out["policies"] = [
        {"policy": name}
        | {
            f"{world}_{key}": figure
            for w, world in enumerate(("real", "dream"))
            for key, figure in (
                ("return", float(value[p, w])),
                ("return_ci", list(interval(means[p, w]))),
                ("length", float(results[name][w].lengths.mean())),
                ("success", float((results[name][w].returns > 0).mean())),
            )
        }
        for p, name in enumerate(names)
    ]
    return out
