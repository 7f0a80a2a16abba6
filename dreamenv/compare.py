"""Measures a bundle against the real game on held-out levels."""

from __future__ import annotations

from typing import Any

import numpy as np

from dreamenv.bundle import Bundle
from dreamenv.flow import SamplerConfig
from dreamenv.metrics import average_precision, calibration_error, colour_frequencies, psnr, rare_pixels, squared_error
from dreamenv.rollout import cut_clips, open_loop, outcome_scores
from dreamenv.types import Clips, Segment

HORIZONS = (1, 5, 10, 30, 50, 100)


def compare_open_loop(bundle: Bundle, clips: Clips, frequencies: np.ndarray, sampler: SamplerConfig,
                      seed: int = 0) -> dict[str, Any]:  # fmt: skip
    """Paired open-loop fidelity on real clips.

    PSNR is that of the mean squared error over all clips (stricter than the mean of each clip's PSNR, which is
    given as `psnr_mean`).

    Args:
        bundle: the bundle.
        clips: real clips on held-out levels.
        frequencies: `colour_frequencies` of many real frames; they say which colours are rare.
        sampler: how the dream is drawn.
        seed: decides its noise.

    Returns:
        `figures` (flat, JSON-able), `curves` (name -> float (H,) PSNR per step) and `frames` uint8 (N, H, 64, 64, 3).
    """
    k, model = clips.context, bundle.world_model
    real, last = clips.frames[:, k:], clips.frames[:, k - 1 : k]
    dream, uncertainty = open_loop(bundle, clips, sampler, seed)
    ceiling = np.empty_like(real)
    for i, frames in enumerate(real):
        ceiling[i] = model.decode(model.encode(frames)).numpy()
    error, still, floor = (squared_error(x, real) for x in (dream, np.broadcast_to(last, real.shape), ceiling))
    per_clip = error.mean((2, 3))
    rare = rare_pixels(real, frequencies)
    curves = {name: psnr(e.mean((0, 2, 3))) for name, e in
              {"dream": error, "copy last frame": still, "autoencoder ceiling": floor}.items()}  # fmt: skip

    def rare_psnr(e: np.ndarray, which: np.ndarray) -> float | None:
        return float(psnr(e[which].mean())) if which.any() else None

    figures: dict[str, Any] = {
        "clips": len(real), "context": k, "nfe": sampler.nfe, "solver": sampler.solver,
        "autoencoder_psnr": float(psnr(floor.mean())), "autoencoder_psnr_rare": rare_psnr(floor, rare),
    }  # fmt: skip
    for h in (h for h in HORIZONS if h <= clips.horizon):
        at = h - 1
        figures |= {
            f"psnr_{h}": float(curves["dream"][at]), f"psnr_mean_{h}": float(psnr(per_clip[:, at]).clip(max=60).mean()),
            f"psnr_rare_{h}": rare_psnr(error[:, at], rare[:, at]),
            f"copy_psnr_{h}": float(curves["copy last frame"][at]),
        }  # fmt: skip
    rank = np.argsort(np.argsort(np.stack([uncertainty[:, 0], per_clip[:, 0]]), axis=1), axis=1)
    figures["uncertainty_error_spearman"] = float(np.corrcoef(rank)[0, 1]) if len(real) > 2 else 0.0
    return {"figures": figures, "curves": curves, "frames": dream}


def compare_outcomes(bundle: Bundle, play: Segment) -> dict[str, Any]:
    """Reward and termination heads on real contexts: average precision, base rate and calibration error.

    Death is a terminal step without reward; the named rewards are the game's own magnitudes.
    """
    model = bundle.world_model
    probabilities, rewards, terminated, weights = outcome_scores(bundle, play)
    figures: dict[str, Any] = {"steps": int(play.first.size)}

    def add(name: str, scores: np.ndarray, positive: np.ndarray) -> None:
        figures[f"{name}_ap"] = average_precision(scores, positive, weights)
        figures[f"{name}_base_rate"] = float((weights * positive).sum() / weights.sum())
        figures[f"{name}_events"] = int(positive.sum())

    for value in np.unique(model.rewards[model.rewards != 0]):
        add(f"reward_{value:g}", probabilities @ (model.rewards == value), rewards == np.float32(value))
    add("death", probabilities @ (model.terminated & (model.rewards == 0)), terminated & (rewards == 0))
    end = probabilities @ model.terminated
    add("end", end, terminated)
    figures["end_calibration_error"] = calibration_error(end, terminated, weights)
    likely = end >= 0.05  # nearly all steps are surely uneventful; this is the error where it matters
    figures["end_calibration_error_likely"] = (
        calibration_error(end[likely], terminated[likely], weights[likely]) if likely.any() else 0.0
    )
    return figures


def compare(bundle: Bundle, play: Segment, clips: int, horizon: int, sampler: SamplerConfig, seed: int = 0) -> dict[str, Any]:
    """All measures; see `compare_open_loop` (whose result this extends) and `compare_outcomes`."""
    frequencies = colour_frequencies(play.frames[:, :: max(play.frames.shape[1] // 128, 1)])
    chosen = cut_clips(play, clips, bundle.world_model.context, horizon, seed)
    result = compare_open_loop(bundle, chosen, frequencies, sampler, seed)
    result["figures"] |= compare_outcomes(bundle, play)
    return result
