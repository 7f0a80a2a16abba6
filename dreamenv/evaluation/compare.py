"""Measures a bundle against the real game on held-out levels: every figure that its card and report show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dreamenv.bundle import Bundle, GameFacts
from dreamenv.config import check, to_dict
from dreamenv.evaluation.clips import (
    HELD_OUT,
    OutcomeScores,
    Remembering,
    cut_clips,
    imagine,
    open_loop,
    outcome_scores,
    play_real,
)
from dreamenv.evaluation.closed_loop import POLICIES, Episodes, agreement, endless, play_both
from dreamenv.evaluation.controllability import (
    DELTA_STEP,
    Branches,
    action_shifts,
    branch_accuracy,
    branch_dream,
    branch_real,
    delta_psnr,
    frame_shifts,
)
from dreamenv.evaluation.metrics import (
    average_precision,
    calibration_curve,
    calibration_error,
    colour_frequencies,
    confusion_matrix,
    detail,
    frame_psnr,
    moving_pixels,
    psnr,
    rare_pixels,
    spearman,
    squared_error,
    ssim,
)
from dreamenv.evaluation.perceptual import feature_distance, features, frechet_distance
from dreamenv.flow import SamplerConfig
from dreamenv.types import Clips
from dreamenv.world_model import WorldModel

HORIZONS = (1, 5, 10, 30, 50, 100)
_FRAMES = 10
"""How many frames GenieRedux's published PSNR is the mean of."""


@dataclass(frozen=True)
class CompareConfig:
    """How much is measured. The defaults take less than ten minutes on two cores."""

    clips: int = 256
    """Real clips to dream on from."""
    horizon: int = 50
    """Steps dreamt in each."""
    random_clips: int = 128
    """More of them, of ten steps, of a player whose every action is random."""
    examined: int = 64
    """How many of the first clips the perceptual distance looks at; the Fréchet distance and the autoencoder's ceiling
    are of twice as many."""
    policy: str = "mix"
    """Who plays the real game for clips, events and branches; see `dreamenv.policies.simple.make_policy`."""
    levels: tuple[int, int] = HELD_OUT
    """First level and number of levels."""
    steps: int = 30_000
    """Real steps played for clips and events."""
    samples: int = 3
    """Dreams of each clip when the sampler is stochastic: for the best, the mean and the spread."""
    branches: int = 128
    """Real moments branched under every distinct action."""
    branch_steps: int = 4
    """Steps each branch holds its action."""
    negatives: int = 2_000
    """Uneventful real steps at which the outcome head is asked; on drifted contexts an eighth."""
    drift: int = 10
    """Steps dreamt before the outcome head is asked on a drifted context."""
    policies: tuple[str, ...] = POLICIES
    """Policies played in both worlds; none skips it."""
    episodes: int = 40
    """Episodes of each policy in each world."""
    limit: int = 150
    """Steps after which these episodes are cut off, in both worlds."""
    endless_steps: int = 5000
    """Steps dreamt without a reset; 0 skips it."""
    endless_dreams: int = 1
    """How many dream so long."""
    seed: int = 0
    """Decides levels, actions and noise."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        for name in (
            "clips",
            "random_clips",
            "examined",
            "steps",
            "samples",
            "branches",
            "branch_steps",
            "negatives",
            "episodes",
            "limit",
            "endless_dreams",
        ):
            check(getattr(self, name) >= 1, f"{name} {getattr(self, name)}: must be >= 1")
        check(self.horizon >= 6, f"horizon {self.horizon}: must be >= 6")
        for name in ("drift", "endless_steps"):
            check(getattr(self, name) >= 0, f"{name} {getattr(self, name)}: must be >= 0")
        check(0 <= self.seed < 2**63, f"seed {self.seed}: must be in 0..2^63-1")

    def thorough(self) -> CompareConfig:
        """Twice as many steps, and so other clips; twice the negatives and so on, four long dreams. For cards."""
        names = ("random_clips", "examined", "steps", "negatives")
        twice = {name: 2 * getattr(self, name) for name in names}
        return replace(self, **twice, endless_dreams=4 * self.endless_dreams)

    def quick(self) -> CompareConfig:
        """Less of everything, with wider errors, and no closed loop, in which so few steps would tell nothing."""
        return replace(
            self,
            clips=min(self.clips, 16),
            random_clips=min(self.random_clips, 16),
            horizon=min(self.horizon, 30),
            steps=min(self.steps, 4_000),
            samples=1,
            negatives=min(self.negatives, 160),
            policies=(),
            branches=min(self.branches, 12),
            endless_steps=min(self.endless_steps, 100),
        )


@dataclass
class Comparison:
    """What was measured.

    Attributes:
        figures: flat and JSON-able; the card.
        table: rows of the open loop, one per (what, step).
        curves: name -> PSNR per step, float (H,).
        clips: the real clips; dream: that of each, uint8 (N, H, 64, 64, 3).
        rows: what is compared with the clips, or with the first n, at the steps of `HORIZONS`, uint8 (n, steps, 64, 64,
            3).
        outcomes: name -> scores, on real and on drifted contexts.
        branches: real branches and the dreamt ones, uint8 (N, A, H, 64, 64, 3).
        episodes: policy -> (real, dreamt) episodes; endless: see `dreamenv.evaluation.closed_loop.endless`.
    """

    figures: dict[str, Any]
    table: list[dict[str, Any]]
    curves: dict[str, np.ndarray]
    clips: Clips
    dream: np.ndarray
    rows: dict[str, np.ndarray]
    outcomes: dict[str, OutcomeScores] = field(default_factory=dict)
    branches: tuple[Branches, np.ndarray] | None = None
    episodes: dict[str, tuple[Episodes, Episodes]] = field(default_factory=dict)
    endless: dict[str, Any] | None = None


def compare_open_loop(
    model: WorldModel,
    clips: Clips,
    frequencies: np.ndarray,
    sampler: SamplerConfig,
    seed: int = 0,
    samples: int = 1,
    encoded: int | None = None,
) -> Comparison:
    """Paired open-loop fidelity on real clips.

    PSNR is that of the mean squared error over all clips, which the worst clips decide; `psnr_mean` is the mean of
    each clip's PSNR, capped at 60 dB, as papers usually state it, and `psnr_frames` that of all of the first ten frames
    of all clips, as GenieRedux states it (Kazemi et al. 2024; their published evaluation).

    Args:
        model: the world model.
        clips: real clips on held-out levels.
        frequencies: `colour_frequencies` of many real frames; they say which colours are rare.
        sampler: how the dream is drawn.
        seed: decides its noise.
        samples: dreams of each clip, if the sampler is stochastic.
        encoded: of how many of the first clips the autoencoder's ceiling is; all by default.
    """
    k = clips.context
    real, before, last = clips.frames[:, k:], clips.frames[:, k - 1 : -1], clips.frames[:, k - 1 : k]
    dream, uncertainty = open_loop(model, clips, sampler, seed)
    steps = _steps(clips)
    truth = real[:, steps - 1]
    ceiling = np.stack([model.decode(model.encode(frames)).numpy() for frames in truth[:encoded]])
    whole = {"dream": dream, "copy last frame": np.broadcast_to(last, real.shape)}
    if sampler.nfe > 1:
        whole["deterministic predictor"] = open_loop(model, clips, SamplerConfig(nfe=1), seed)[0]
    error = squared_error(dream, real)
    floor = squared_error(ceiling, truth[:encoded])
    curves = {name: np.asarray(psnr(squared_error(frames, real).mean((0, 2, 3)))) for name, frames in whole.items()}
    curves["autoencoder ceiling"] = np.full(clips.horizon, psnr(floor.mean()))
    rows = {name: frames[:, steps - 1] for name, frames in whole.items()} | {"autoencoder ceiling": ceiling}
    rare, moving = rare_pixels(truth, frequencies), moving_pixels(truth, before[:, steps - 1])
    table = [
        {"what": name, "step": int(step)} | _row(frames[:, i], *(x[: len(frames), i] for x in (truth, rare, moving)))
        for name, frames in rows.items()
        for i, step in enumerate(steps)
    ]
    per_clip = error.mean((2, 3))
    figures: dict[str, Any] = {
        "clips": len(real),
        "context": k,
        **to_dict(sampler),
        "uncertainty_error_spearman": spearman(uncertainty[:, 0], per_clip[:, 0]),
    }
    figures["psnr_frames"] = float(frame_psnr(error[:, :_FRAMES]).mean())
    figures |= {
        "autoencoder_psnr": float(psnr(floor.mean())),
        "autoencoder_psnr_rare": _masked_psnr(floor, rare[:encoded]),
        "autoencoder_ssim": float(ssim(ceiling, truth[:encoded]).mean()),
    }
    for row in table:
        figures |= {_figure(row, name): v for name, v in row.items() if name not in ("what", "step")}
    if sampler.stochastic and samples > 1:
        figures |= _spread(model, clips, dream, sampler, seed, samples)
    return Comparison(figures, table, curves, clips, dream, rows)


def _figure(row: dict[str, Any], name: str) -> str:
    """Name of a table's entry among the figures."""
    prefix = {
        "dream": "",
        "copy last frame": "copy_",
        "deterministic predictor": "predictor_",
        "autoencoder ceiling": "ceiling_",
    }
    return f"{prefix[row['what']]}{name}_{row['step']}"


def add_perceptual(result: Comparison, clips: int = 64, later: int = 10) -> None:
    """Add the perceptual distance of each row of the table, and the Fréchet distance of later frames.

    Args:
        result: extended in place: `perceptual` in the table and the figures (0 is equal, 2 the most), and `frechet`
            of the dream (>= 0, no unit).
        clips: how many clips are looked at.
        later: frames of every so many steps go into the Fréchet distance, over twice as many clips.
    """
    real = result.clips.frames[:, result.clips.context :]
    at = _steps(result.clips).tolist()
    truth = {step: features(real[:clips, step - 1])[0] for step in at}
    for row in result.table:
        frames = result.rows[row["what"]][:clips, at.index(row["step"])]
        row["perceptual"] = float(feature_distance(features(frames)[0], truth[row["step"]]).mean())
        result.figures[_figure(row, "perceptual")] = row["perceptual"]
    steps = np.arange(later - 1, result.clips.horizon, later)
    if len(steps) * len(real) > 1:
        worlds = (x[: 2 * clips, steps].reshape(-1, 64, 64, 3) for x in (real, result.dream))
        result.figures["frechet"] = frechet_distance(*(features(frames)[1] for frames in worlds))


def _steps(clips: Clips) -> np.ndarray:
    """Those of `HORIZONS` that the clips reach."""
    return np.array([h for h in HORIZONS if h <= clips.horizon])


def _row(frames: np.ndarray, real: np.ndarray, rare: np.ndarray, moving: np.ndarray) -> dict[str, Any]:
    """Figures of frames uint8 (N, 64, 64, 3) beside the real ones; masks (N, 64, 64)."""
    error = squared_error(frames, real)
    return {
        "mse": float(error.mean()),
        "psnr": float(psnr(error.mean())),
        "psnr_mean": float(frame_psnr(error).mean()),
        "ssim": float(ssim(frames, real).mean()),
        "psnr_moving": _masked_psnr(error, moving),
        "psnr_rare": _masked_psnr(error, rare),
        "detail": float(detail(frames).mean() / max(detail(real).mean(), 1e-9)),
    }


def _masked_psnr(error: np.ndarray, which: np.ndarray) -> float | None:
    return float(psnr(error[which].mean())) if which.any() else None


def _spread(
    model: WorldModel, clips: Clips, dream: np.ndarray, sampler: SamplerConfig, seed: int, samples: int
) -> dict[str, float]:
    """Best and mean of several samples of each clip, and how far apart they are (SEED phase 3)."""
    horizon = min(clips.horizon, 10)
    k = clips.context
    short = Clips(clips.frames[:, : k + horizon], clips.actions[:, : k - 1 + horizon], clips.level_seeds, k)
    drawn = [dream[:, :horizon]]
    drawn += [open_loop(model, short, sampler, seed + (s << 32))[0] for s in range(1, samples)]
    errors = np.stack([squared_error(d, short.frames[:, k:]).mean((2, 3)) for d in drawn])  # (S, N, H)
    apart = [squared_error(a, b)[:, -1].mean() for i, a in enumerate(drawn) for b in drawn[i + 1 :]]
    return {
        "samples_horizon": horizon,
        "samples_mean_psnr": float(psnr(errors[:, :, -1].mean())),
        "samples_best_psnr": float(psnr(errors[:, :, -1].min(0).mean())),
        "samples_diversity": float(np.mean(apart)),
    }


def _random_player(
    model: WorldModel, game: GameFacts, config: CompareConfig, sampler: SamplerConfig
) -> dict[str, float]:
    """Figures on clips of a player whose every action is random, so that none gives away the next."""
    seed = config.seed
    play = play_real(game.name, 150, 32, "random", config.levels, game.distribution_mode, seed)
    clips = cut_clips(play, config.random_clips, model.context, _FRAMES, seed)
    dream, _ = open_loop(model, clips, sampler, seed)
    real, k = clips.frames[:, model.context :], model.context
    error = squared_error(dream, real)
    single, _ = imagine(
        model, clips.frames[:, k - 1 : k], clips.actions[:, :0], clips.actions[:, k - 1 :], sampler, seed
    )
    delta = delta_psnr(model, clips, dream[:, :DELTA_STEP], sampler, seed)
    alone = squared_error(single, real)
    figures = {
        "random_delta_psnr_4": float(delta[DELTA_STEP - 1]),
        "random_psnr_frames": float(frame_psnr(error).mean()),
        f"random_one_frame_psnr_{_FRAMES}": float(psnr(alone[:, -1].mean())),
        "random_one_frame_psnr_frames": float(frame_psnr(alone).mean()),
    }
    for h in (1, _FRAMES):
        figures |= {
            f"random_psnr_{h}": float(psnr(error[:, h - 1].mean())),
            f"random_psnr_mean_{h}": float(frame_psnr(error[:, h - 1]).mean()),
        }
    figures |= {f"action_shift_{s}": v for s, v in action_shifts(model, clips, dream, sampler, seed).items()}
    return figures | {f"frame_shift_{s}": v for s, v in frame_shifts(clips, dream).items()}


def outcome_figures(model: WorldModel, scores: OutcomeScores, prefix: str = "") -> dict[str, Any]:
    """Average precision (None without events), base rate, events and calibration of rewards, death and the end.

    Death is a terminal step without reward; the named rewards are the game's own magnitudes.
    """
    p, weights = scores.probabilities, scores.weights
    figures: dict[str, Any] = {}

    def add(name: str, score: np.ndarray, positive: np.ndarray) -> None:
        figures[f"{name}_ap"] = average_precision(score, positive, weights) if positive.any() else None
        figures[f"{name}_calibration_error"] = calibration_error(score, positive, weights)
        figures[f"{name}_base_rate"] = float((weights * positive).sum() / weights.sum())
        figures[f"{name}_events"] = int(positive.sum())

    for value in np.unique(model.rewards[model.rewards != 0]):
        add(f"reward_{value:g}", p @ (model.rewards == value), scores.rewards == np.float32(value))
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


def compare(
    bundle: Bundle, config: CompareConfig, sampler: SamplerConfig, progress: Callable[[str], None] = lambda stage: None
) -> Comparison:
    """Measure everything (needs procgen); `progress` is told each stage as it begins.

    Raises:
        ConfigError: a value outside its range, or too few real steps for the clips.
        PolicyError: an unknown policy.
    """
    model, game, seed = Remembering(bundle.world_model), bundle.game, config.seed
    progress("playing the real game")
    play = play_real(game.name, -(-config.steps // 32), 32, config.policy, config.levels, game.distribution_mode, seed)
    frequencies = colour_frequencies(play.frames[:, :: max(play.frames.shape[1] // 128, 1)])
    clips = cut_clips(play, config.clips, model.context, config.horizon, seed)
    progress("open loop")
    result = compare_open_loop(model, clips, frequencies, sampler, seed, config.samples, 2 * config.examined)
    figures = result.figures
    progress("perceptual distance")
    add_perceptual(result, config.examined)
    progress("outcomes")
    result.outcomes["real"] = outcome_scores(bundle.world_model, play, sampler, negatives=config.negatives, seed=seed)
    figures |= outcome_figures(model, result.outcomes["real"]) | {"steps": int(play.first.size)}
    if config.drift:
        progress("outcomes after drift")
        asked = max(config.negatives // 8, 1)
        result.outcomes["drifted"] = outcome_scores(bundle.world_model, play, sampler, config.drift, asked, seed)
        figures |= outcome_figures(model, result.outcomes["drifted"], "drifted_") | {"drift": config.drift}
    progress("controllability")
    delta = delta_psnr(model, clips, result.dream[:, :DELTA_STEP], sampler, seed)
    figures |= {f"delta_psnr_{h}": float(delta[h - 1]) for h in (1, DELTA_STEP)}
    figures |= _random_player(model, game, config, sampler)
    for kind in ("action", "frame"):
        figures[f"{kind}_offset"] = max((-1, 0, 1), key=lambda s, kind=kind: figures[f"{kind}_shift_{s}"])
    progress("branches")
    real = branch_real(game, config.branches, model.context, config.branch_steps, config.levels, config.policy, seed)
    dreamt = branch_dream(model, real, sampler, seed)
    result.branches = real, dreamt
    figures |= {f"branch_{k}": v for k, v in branch_accuracy(real.real[:, :, -1], dreamt[:, :, -1]).items()}
    figures |= {"branches": len(dreamt), "branch_steps": config.branch_steps}
    if config.policies:
        progress("closed loop")
        result.episodes = play_both(
            bundle, config.policies, config.episodes, config.limit, sampler, config.levels, seed
        )
        figures |= {f"closed_loop_{k}": v for k, v in agreement(result.episodes, seed=seed).items()}
        figures |= {"closed_loop_episodes": config.episodes, "closed_loop_limit": config.limit}
    if config.endless_steps:
        progress("endless dream")
        result.endless = endless(bundle, clips, config.endless_steps, config.endless_dreams, sampler=sampler, seed=seed)
        figures |= {
            "endless_steps": config.endless_steps,
            "endless_dreams": config.endless_dreams,
            "endless_diverged": result.endless["diverged"],
            "endless_latent_rms": float(result.endless["latent_rms"][-1]),
            "endless_detail": float(result.endless["detail"][-1] / result.endless["real_detail"]),
        }
    return result
