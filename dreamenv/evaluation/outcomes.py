"""What the outcome head says at real moments, and how right it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dreamenv.config import check
from dreamenv.contract.actions import NOOP
from dreamenv.evaluation.imagine import step_noise
from dreamenv.evaluation.metrics import average_precision, calibration_curve, calibration_error, confusion_matrix
from dreamenv.flow import SamplerConfig
from dreamenv.types import Segment
from dreamenv.world_model import WorldModel


@dataclass(frozen=True)
class OutcomeScores:
    """What the outcome head said at M real moments, and what happened.

    Attributes:
        probabilities: float64 (M, outcomes).
        rewards: (M,) real rewards; terminated: bool (M,) real ends.
        weights: float64 (M,), how many real steps each stands for.
    """

    probabilities: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    weights: np.ndarray


def outcome_scores(
    model: WorldModel,
    play: Segment,
    sampler: SamplerConfig,
    drift: int = 0,
    negatives: int = 20000,
    seed: int = 0,
    batch: int = 64,
    events: int = 20000,
) -> OutcomeScores:
    """Score the outcome head at rewarded or terminal steps, and at a sample of the others.

    Args:
        model: the world model.
        play: real games.
        sampler: how the dream is drawn.
        drift: steps that the dream went on alone, under the real actions, before the head is asked; 0 asks it on the
            real context.
        negatives: how many uneventful steps.
        seed: decides which, and the noise.
        batch: rows at once.
        events: how many rewarded or terminal steps at most.

    Raises:
        ConfigError: no episode is as long as `drift`.
    """
    n, t = play.first.shape
    first = play.first.copy()
    first[:, 0] = True
    start = np.maximum.accumulate(np.where(first, np.arange(t), 0), axis=1)
    possible = np.arange(t) - start >= drift
    check(bool(possible.any()), f"drift {drift}: no episode was that long; ask for less, or play more steps")
    event = ((play.rewards != 0) | play.terminated) & possible
    common = np.argwhere(~event & possible)
    rng, rare = np.random.default_rng(seed), np.argwhere(event)
    kept = rng.permutation(len(common))[:negatives]
    found = np.arange(len(rare)) if len(rare) <= events else np.sort(rng.permutation(len(rare))[:events])
    chosen = np.concatenate([rare[found], common[kept]])
    weights = np.full(len(chosen), len(rare) / max(len(found), 1))
    weights[len(found) :] = len(common) / max(len(kept), 1)
    probabilities = np.empty((len(chosen), len(model.rewards)))
    for at in range(0, len(chosen), batch):
        rows = slice(at, min(at + batch, len(chosen)))
        env, now = chosen[rows].T
        raw = now[:, None] - drift + np.arange(-model.context + 1, 1)
        index = np.maximum(raw, start[env, now][:, None])
        history = np.where(raw == index, play.actions[env[:, None], index], NOOP)[:, :-1]
        state = model.start(play.frames[env[:, None], index], history)
        for d in range(drift):
            noise = step_noise(model, sampler, seed, np.arange(rows.start, rows.stop), d)
            state = model.step(state, play.actions[env, now - drift + d], noise, sampler).state
        probabilities[rows] = model.outcomes(state, play.actions[env, now]).exp().double().cpu().numpy()
    env, now = chosen.T
    return OutcomeScores(probabilities, play.rewards[env, now], play.terminated[env, now], weights)


def outcome_figures(model: WorldModel, scores: OutcomeScores, prefix: str = "", death: bool = True) -> dict[str, Any]:
    """Average precision (None without events), base rate, events and calibration of rewards, death and the end.

    Of rewards it is that of any at all, and of each magnitude.

    Args:
        model: the world model.
        scores: what its head said; the named rewards are the game's own magnitudes.
        prefix: of the figures' names.
        death: whether the game has deaths, which are terminal steps without reward.
    """
    p, weights = scores.probabilities, scores.weights
    figures: dict[str, Any] = {}

    def add(name: str, score: np.ndarray, positive: np.ndarray) -> None:
        figures[f"{name}_ap"] = average_precision(score, positive, weights) if positive.any() else None
        figures[f"{name}_calibration_error"] = calibration_error(score, positive, weights)
        figures[f"{name}_base_rate"] = float((weights * positive).sum() / weights.sum())
        figures[f"{name}_events"] = int(positive.sum())

    add("reward", p @ (model.rewards != 0), scores.rewards != 0)
    for value in np.unique(model.rewards[model.rewards != 0]):
        add(f"reward_{value:g}", p @ (model.rewards == value), scores.rewards == np.float32(value))
    if death:
        add("death", p @ (model.terminated & (model.rewards == 0)), scores.terminated & (scores.rewards == 0))
    end = p @ model.terminated
    add("end", end, scores.terminated)
    likely = end >= 0.05  # nearly all steps are surely uneventful; this is the error where it matters
    figures["end_calibration_error_likely"] = (
        calibration_error(end[likely], scores.terminated[likely], weights[likely]) if likely.any() else 0.0
    )
    return {f"{prefix}{k}": v for k, v in figures.items()}


def outcome_confusion(model: WorldModel, scores: OutcomeScores) -> np.ndarray:
    """Real steps by (actual, most likely) outcome, float64 (outcomes, outcomes), rows actual.

    Steps with an outcome that the head does not know are left out.
    """
    actual = np.full(len(scores.rewards), -1)
    for i, (reward, end) in enumerate(zip(model.rewards, model.terminated, strict=True)):
        actual[(scores.rewards == np.float32(reward)) & (scores.terminated == end)] = i
    known = actual >= 0
    return confusion_matrix(
        actual[known], scores.probabilities[known].argmax(1), len(model.rewards), scores.weights[known]
    )


def outcome_curve(model: WorldModel, scores: OutcomeScores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Calibration curve of the end of an episode, see `dreamenv.evaluation.metrics.calibration_curve`."""
    return calibration_curve(scores.probabilities @ model.terminated, scores.terminated, scores.weights)
