"""Paired open-loop fidelity: real clips, and the dream of each from its context under its own actions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dreamenv.config import to_dict
from dreamenv.evaluation.closed_loop import Episodes
from dreamenv.evaluation.controllability import Branches
from dreamenv.evaluation.imagine import open_loop
from dreamenv.evaluation.metrics import (
    detail,
    frame_psnr,
    moving_pixels,
    psnr,
    rare_pixels,
    spearman,
    squared_error,
    ssim,
    still_pixels,
)
from dreamenv.evaluation.outcomes import OutcomeScores
from dreamenv.evaluation.perceptual import feature_distance, features, frechet_distance
from dreamenv.flow import SamplerConfig
from dreamenv.types import Clips
from dreamenv.world_model import WorldModel

HORIZONS = (1, 5, 10, 30, 50, 100)


FRAMES = 10
"""How many frames GenieRedux's published PSNR is the mean of."""


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
        episodes: policy -> (real, dreamt) episodes; endless: see `dreamenv.evaluation.stability.endless`.
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
        samples: dreams of each clip, for the best and the mean; by two evaluations where the sampler draws no samples.
        encoded: of how many of the first clips the autoencoder's ceiling is; all by default.
    """
    k = clips.context
    real, before, last = clips.frames[:, k:], clips.frames[:, k - 1 : -1], clips.frames[:, k - 1 : k]
    dream, uncertainty = open_loop(model, clips, sampler, seed)
    steps = horizons_within(clips.horizon)
    truth = real[:, steps - 1]
    ceiling = np.stack([model.decode(model.encode(frames)).numpy() for frames in truth[:encoded]])
    whole = {"dream": dream, "copy last frame": np.broadcast_to(last, real.shape)}
    if sampler.nfe > 1:
        whole["deterministic predictor"] = open_loop(model, clips, SamplerConfig(nfe=1, temperature=0.0), seed)[0]
    error = squared_error(dream, real)
    floor = squared_error(ceiling, truth[:encoded])
    curves = {name: np.asarray(psnr(squared_error(frames, real).mean((0, 2, 3)))) for name, frames in whole.items()}
    curves["autoencoder ceiling"] = np.full(clips.horizon, psnr(floor.mean()))
    rows = {name: frames[:, steps - 1] for name, frames in whole.items()} | {"autoencoder ceiling": ceiling}
    rare, moving = rare_pixels(truth, frequencies), moving_pixels(truth, before[:, steps - 1])
    table = _table(rows, steps, truth, rare, moving, still_pixels(real, last)[:, steps - 1])
    figures: dict[str, Any] = {
        "clips": len(real),
        "context": k,
        **to_dict(sampler),
        "uncertainty_error_spearman": spearman(uncertainty[:, 0], error.mean((2, 3))[:, 0]),
        "psnr_frames": float(frame_psnr(error[:, :FRAMES]).mean()),
        "autoencoder_psnr": float(psnr(floor.mean())),
        "autoencoder_psnr_rare": _masked_psnr(floor, rare[:encoded]),
        "autoencoder_ssim": float(ssim(ceiling, truth[:encoded]).mean()),
    }
    for row in table:
        figures |= {_figure(row, name): v for name, v in row.items() if name not in ("what", "step")}
    drawn = sampler if sampler.stochastic(model.dynamics) else replace(sampler, nfe=2, solver="euler", temperature=1.0)
    if drawn.stochastic(model.dynamics) and samples > 1:
        figures |= _spread(model, clips, drawn, seed, samples)
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
    at = horizons_within(result.clips.horizon).tolist()
    truth = {step: features(real[:clips, step - 1])[0] for step in at}
    for row in result.table:
        frames = result.rows[row["what"]][:clips, at.index(row["step"])]
        row["perceptual"] = float(feature_distance(features(frames)[0], truth[row["step"]]).mean())
        result.figures[_figure(row, "perceptual")] = row["perceptual"]
    steps = np.arange(later - 1, result.clips.horizon, later)
    if len(steps) * len(real) > 1:
        worlds = (x[: 2 * clips, steps].reshape(-1, *real.shape[2:]) for x in (real, result.dream))
        result.figures["frechet"] = frechet_distance(*(features(frames)[1] for frames in worlds))


def horizons_within(steps: int) -> np.ndarray:
    """Those of `HORIZONS` that so many steps reach, int64 (H,), in ascending order."""
    return np.array([h for h in HORIZONS if h <= steps], np.int64)


def _table(rows: dict[str, np.ndarray], steps: np.ndarray, *beside: np.ndarray) -> list[dict[str, Any]]:
    """A row for each of what is compared and each step, of frames (n, steps, ...); `beside` are those of `_row`."""
    return [
        {"what": name, "step": int(step)} | _row(frames[:, i], *(x[: len(frames), i] for x in beside))
        for name, frames in rows.items()
        for i, step in enumerate(steps)
    ]


def _row(
    frames: np.ndarray, real: np.ndarray, rare: np.ndarray, moving: np.ndarray, still: np.ndarray
) -> dict[str, Any]:
    """Figures of frames uint8 (N, 64, 64, 3) beside the real ones; masks (N, 64, 64)."""
    error = squared_error(frames, real)
    return {
        "mse": float(error.mean()),
        "psnr": float(psnr(error.mean())),
        "psnr_mean": float(frame_psnr(error).mean()),
        "ssim": float(ssim(frames, real).mean()),
        "psnr_moving": _masked_psnr(error, moving),
        "psnr_still": _masked_psnr(error, still),
        "psnr_rare": _masked_psnr(error, rare),
        "detail": float(detail(frames).mean() / max(detail(real).mean(), 1e-9)),
    }


def _masked_psnr(error: np.ndarray, which: np.ndarray) -> float | None:
    return float(psnr(error[which].mean())) if which.any() else None


def _spread(model: WorldModel, clips: Clips, sampler: SamplerConfig, seed: int, samples: int) -> dict[str, float]:
    """Best and mean of several samples of each clip, the one the model is surest of, and how far they are apart."""
    horizon = min(clips.horizon, 10)
    k = clips.context
    short = Clips(clips.frames[:, : k + horizon], clips.actions[:, : k - 1 + horizon], clips.level_seeds, k)
    dreams = [open_loop(model, short, sampler, seed + (s << 32)) for s in range(samples)]
    drawn, doubts = [frames for frames, _ in dreams], np.stack([doubt.mean(1) for _, doubt in dreams])  # (S, N)
    errors = np.stack([squared_error(d, short.frames[:, k:]).mean((2, 3)) for d in drawn])  # (S, N, H)
    apart = [squared_error(a, b)[:, -1].mean() for i, a in enumerate(drawn) for b in drawn[i + 1 :]]
    return {
        "samples": samples,
        "samples_nfe": sampler.nfe,
        "samples_horizon": horizon,
        "samples_mean_psnr": float(psnr(errors[:, :, -1].mean())),
        "samples_best_psnr": float(psnr(errors[:, :, -1].min(0).mean())),
        "samples_selected_psnr": float(psnr(errors[doubts.argmin(0), np.arange(len(short.frames)), -1].mean())),
        "samples_diversity": float(np.mean(apart)),
    }
