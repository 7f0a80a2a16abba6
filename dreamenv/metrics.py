"""Fidelity measures, pure functions of frames, scores and labels."""

from __future__ import annotations

import numpy as np

COLOUR_LEVELS = 16
RARE_FREQUENCY = 8e-4
"""A colour is rare if fewer than 0.08 % of all pixels fall into its bin (16 levels a channel)."""


def psnr(mse: float | np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of a mean squared error of values in [0, 1]; 100 dB where it is zero."""
    return -10 * np.log10(np.maximum(mse, 1e-10))


def squared_error(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared error float32 of uint8 frames (..., 64, 64, 3) on the [0, 1] scale, averaged over channels."""
    return (((a.astype(np.float32) - b.astype(np.float32)) / 255) ** 2).mean(-1)


def colour_bins(frames: np.ndarray) -> np.ndarray:
    """Frames uint8 (..., 3) -> colour bin int16 (...) in 0..4095."""
    levels = frames.astype(np.int16) // (256 // COLOUR_LEVELS)
    return (levels[..., 0] * COLOUR_LEVELS + levels[..., 1]) * COLOUR_LEVELS + levels[..., 2]


def colour_frequencies(frames: np.ndarray) -> np.ndarray:
    """Share of pixels in each of the 4096 colour bins, float64 (4096,), over uint8 frames (..., 3)."""
    bins = colour_bins(frames)
    return np.bincount(bins.ravel(), minlength=COLOUR_LEVELS**3) / max(bins.size, 1)


def rare_pixels(frames: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Bool (..., 64, 64): pixels of uint8 `frames` (..., 64, 64, 3) whose colour is rare by `colour_frequencies`."""
    return (frequencies < RARE_FREQUENCY)[colour_bins(frames)]


def average_precision(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Area under the precision-recall curve, sum of (R_n - R_(n-1)) * P_n; ties share one threshold.

    Args:
        scores: float (N,), higher means more likely.
        positive: bool (N,).
        weights: float (N,), how many samples each stands for.

    Returns:
        A value in [0, 1]; 0 if nothing is positive.
    """
    weights = np.ones(len(scores)) if weights is None else np.asarray(weights, float)
    order = np.argsort(-np.asarray(scores, float), kind="stable")
    sorted_scores = np.asarray(scores, float)[order]
    hits = np.cumsum(np.asarray(positive, float)[order] * weights[order])
    seen = np.cumsum(weights[order])
    if not len(hits) or hits[-1] == 0:
        return 0.0
    ends = np.append(np.flatnonzero(np.diff(sorted_scores)), len(hits) - 1)
    recall = hits[ends] / hits[-1]
    return float(np.sum(np.diff(np.concatenate([[0.0], recall])) * hits[ends] / seen[ends]))


def calibration_error(probabilities: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None,
                      bins: int = 15) -> float:  # fmt: skip
    """Expected calibration error (Naeini et al. 2015): mean |confidence - frequency| over equal-width bins."""
    weights = np.ones(len(probabilities)) if weights is None else np.asarray(weights, float)
    which = np.clip((np.asarray(probabilities) * bins).astype(int), 0, bins - 1)
    confidence = np.bincount(which, weights * probabilities, bins)
    frequency = np.bincount(which, weights * np.asarray(positive, float), bins)
    return float(np.abs(confidence - frequency).sum() / weights.sum())
