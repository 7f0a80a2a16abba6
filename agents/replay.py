"""The keys that an agent pressed in a dream, pressed in the game: where do the two worlds part?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.evaluate import evaluate, policy_of
from dreamenv.bundle import load_bundle, resolve_bundle
from dreamenv.evaluation.clips import HELD_OUT, real_envs
from dreamenv.evaluation.metrics import interval, pearson
from dreamenv.policies.simple import VectorPolicy

GRACE = 5
"""Steps for which the last key is held on in the game, which may get there a little later than the dream."""
FATES = ("earns", "ends", "goes on")
"""How an episode fares: its return is above 0; it ends, and it is not; neither, in the dream until its step limit, in
the game until `GRACE` steps after the dream's last one."""


class _Recorded:
    """A player whose keys are written down."""

    def __init__(self, player: VectorPolicy) -> None:
        self._player, self.pressed = player, list[np.ndarray]()
        self.remembers, self.looks = player.remembers, player.looks

    def act(self, observations: np.ndarray, first: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """See `VectorPolicy.act`."""
        self.pressed.append(self._player.act(observations, first, rng))
        return self.pressed[-1]


@dataclass(frozen=True)
class Replays:
    """Dreams that the agent played, and what their keys do in the game.

    Attributes:
        levels: int64 (N,); lengths: int64 (N,), steps of each dream.
        dream, game: float64 (N,), returns in either world.
        dream_ended, game_ended: bool (N,), whether it terminated there.
        dream_films, game_films: of each, frames uint8 (steps, h, w, c) before each of the dream's steps.
    """

    levels: np.ndarray
    lengths: np.ndarray
    dream: np.ndarray
    game: np.ndarray
    dream_ended: np.ndarray
    game_ended: np.ndarray
    dream_films: list[np.ndarray]
    game_films: list[np.ndarray]

    def figures(self, seed: int = 0) -> dict[str, Any]:
        """What is paid for the same keys.

        Returns:
            How many dreams earned something, `dreams_paid`; of how many of these the game paid nothing,
            `dreams_paid_alone`; by how much more dreams pay, `same_keys_optimism` and its `_ci` (95 %); and
            `situations`: of `FATES`, how many dreams had the first and the game the second.
        """
        gap = optimism(self.game[:, None], self.dream[:, None], seed=seed)
        dream, game = _fates(self.dream, self.dream_ended), _fates(self.game, self.game_ended)
        kinds = list(enumerate(FATES))
        counts = {a: {b: int(((dream == i) & (game == j)).sum()) for j, b in kinds} for i, a in kinds}
        paid = counts[FATES[0]]
        alone = {"dreams_paid": sum(paid.values()), "dreams_paid_alone": sum(paid.values()) - paid[FATES[0]]}
        return alone | {f"same_keys_{name}": gap[name] for name in ("optimism", "optimism_ci")} | {"situations": counts}


def _fates(returns: np.ndarray, ended: np.ndarray) -> np.ndarray:
    """Which of `FATES` each episode had, int64 (N,)."""
    return np.where(returns > 0, 0, np.where(ended, 1, 2))


def replay(agent: str, game: str, bundle: Path | None, levels: int, limit: int, nfe: int = 1, seed: int = 0) -> Replays:
    """Let an agent play one dream of each level, at most 100, and press the same keys in the game.

    Rewards count until `GRACE` steps after the dream's last one, for which its last key is held.

    Args:
        agent: see `agents.evaluate.policy_of`.
        game: which one.
        bundle: folder of the dream's; the embedded one by default.
        levels: how many of the held-out ones.
        limit: steps after which a dream is cut off.
        nfe: network function evaluations of its steps.
        seed: decides actions and noise.

    Raises:
        ConfigError, PolicyError: a bad setting, or no such agent.
    """
    n, first = min(levels, 100), HELD_OUT[0]
    player = _Recorded(policy_of(agent, bundle, game))
    dreamt = evaluate(player, "dream", game, (first, first + n), n, bundle, nfe, seed, films=n, limit=limit)
    lengths, keys = dreamt.episodes.lengths, np.stack(player.pressed)
    facts = load_bundle(resolve_bundle(bundle, game), "cpu", game=game)
    mode, frame = facts.game.distribution_mode, facts.world_model.frame_shape
    envs = real_envs(game, n, (first, n), mode, frame)
    frames, _ = envs.reset(seed=seed, options={"level": dreamt.levels})
    returns, going, ended, film = np.zeros(n), np.ones(n, bool), np.zeros(n, bool), [frames.copy()]
    for t in range(int(lengths.max()) + GRACE):
        actions = keys[np.minimum(t, lengths - 1), np.arange(n)]
        frames, rewards, terminated, truncated, _ = envs.step(actions)
        going &= t < lengths + GRACE
        returns += np.where(going, rewards, 0)
        ended |= going & terminated
        going &= ~(terminated | truncated)
        film.append(np.where(going[:, None, None, None], frames, film[-1]))  # an end keeps the last picture
    envs.close()
    films = [film_of[:length] for film_of, length in zip(np.stack(film, 1), lengths, strict=True)]
    played = dreamt.episodes
    return Replays(dreamt.levels, lengths, played.returns, returns, played.ended, ended, dreamt.frames, films)


def optimism(real: np.ndarray, dream: np.ndarray, replicates: int = 10000, seed: int = 0) -> dict[str, Any]:
    """By how much the dream overestimates.

    Args:
        real: float64 (L, R), returns of R episodes on each of L levels.
        dream: the same in the dream.
        replicates: of the bootstrap, which draws levels anew.
        seed: decides them.

    Returns:
        Mean returns `real_return` and `dream_return`, their difference `optimism`, each with `_ci` (95 %), and the
        Pearson correlation `level_pearson` of the levels' mean returns (None if one world's do not differ).
    """
    value = np.stack([real.mean(1), dream.mean(1)])
    draws = np.random.default_rng(seed).integers(value.shape[1], size=(replicates, value.shape[1]))
    means = value[:, draws].mean(-1)
    rows = {
        "real_return": (value[0].mean(), means[0]),
        "dream_return": (value[1].mean(), means[1]),
        "optimism": ((value[1] - value[0]).mean(), means[1] - means[0]),
    }
    out: dict[str, Any] = {}
    for name, (mean, spread) in rows.items():
        out[name], out[f"{name}_ci"] = float(mean), list(interval(spread))
    out["level_pearson"] = float(pearson(value[0], value[1])) if value.std(1).min() > 0 else None
    return out
