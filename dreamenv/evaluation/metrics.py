"""Fidelity measures, pure functions of frames, scores and labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

COLOUR_LEVELS = 16
RARE_FREQUENCY = 8e-4
"""A colour is rare if fewer than 0.08 % of all pixels fall into its bin (16 levels a channel)."""


def psnr(mse: float | np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of a mean squared error of values in [0, 1]; 100 dB where it is zero."""
    return -10 * np.log10(np.maximum(mse, 1e-10))


def frame_psnr(error: np.ndarray) -> np.ndarray:
    """PSNR in dB of each frame, float (...), of squared errors (..., 64, 64); at most 60 dB."""
    return np.asarray(psnr(error.mean((-2, -1)))).clip(max=60)


def squared_error(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared error float32 of uint8 frames (..., 64, 64, 3) on the [0, 1] scale, averaged over channels."""
    return (((a.astype(np.float32) - b.astype(np.float32)) / 255) ** 2).mean(-1)


def colour_bins(frames: Any) -> Any:
    """Frames uint8 (..., 3), an array or a tensor -> colour bin (...) in 0..4095, int16 or int64; grey: 0..255."""
    if frames.shape[-1] == 1:
        return frames[..., 0].long() if isinstance(frames, torch.Tensor) else frames[..., 0].astype(np.int16)
    levels = frames // (256 // COLOUR_LEVELS)
    wide = levels.long() if isinstance(levels, torch.Tensor) else levels.astype(np.int16)
    return (wide[..., 0] * COLOUR_LEVELS + wide[..., 1]) * COLOUR_LEVELS + wide[..., 2]


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
    ends = ends[seen[ends] > 0]  # samples that stand for nothing may come first
    recall = hits[ends] / hits[-1]
    return float(np.sum(np.diff(np.concatenate([[0.0], recall])) * hits[ends] / seen[ends]))


def calibration_curve(
    probabilities: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None, bins: int = 15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean confidence, frequency and weight of equal-width bins of the probability, each (bins,); NaN in empty bins."""
    weights = np.ones(len(probabilities)) if weights is None else np.asarray(weights, float)
    which = np.clip((np.asarray(probabilities) * bins).astype(int), 0, bins - 1)
    total = np.bincount(which, weights, bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(which, weights * probabilities, bins) / total
        frequency = np.bincount(which, weights * np.asarray(positive, float), bins) / total
    return confidence, frequency, total


def calibration_error(
    probabilities: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None, bins: int = 15
) -> float:
    """Expected calibration error (Naeini et al. 2015): mean |confidence - frequency| over equal-width bins."""
    confidence, frequency, total = calibration_curve(probabilities, positive, weights, bins)
    return float(np.nansum(np.abs(confidence - frequency) * total) / total.sum())


def confusion_matrix(
    actual: np.ndarray, predicted: np.ndarray, classes: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Weight of each (actual, predicted) pair of class indices (N,), float64 (classes, classes), rows actual."""
    pairs = np.asarray(actual) * classes + np.asarray(predicted)
    return np.bincount(pairs, weights, classes * classes).astype(float).reshape(classes, classes)


def ssim(a: np.ndarray, b: np.ndarray, batch: int = 512) -> np.ndarray:
    """Structural similarity of uint8 frames (..., h, w, c), float64 (...,), the mean over channels.

    Gaussian window of 11 pixels, sigma 1.5, K1 = 0.01, K2 = 0.03, borders left out (Wang et al. 2004).
    """
    shape = a.shape[:-3]
    flat_a, flat_b = (x.reshape(-1, *x.shape[-3:]) for x in (a, b))
    offsets = torch.arange(11, dtype=torch.float32) - 5
    kernel = torch.exp(-(offsets**2) / (2 * 1.5**2))
    kernel = kernel / kernel.sum()

    def blur(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(x, kernel.view(1, 1, 11, 1)), kernel.view(1, 1, 1, 11))

    out = np.empty(len(flat_a))
    for at in range(0, len(flat_a), batch):
        x, y = (
            torch.from_numpy(np.ascontiguousarray(z[at : at + batch])).movedim(-1, 1).flatten(0, 1)[:, None].float()
            / 255
            for z in (flat_a, flat_b)
        )
        mean_x, mean_y = blur(x), blur(y)
        var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
        covariance = blur(x * y) - mean_x * mean_y
        c1, c2 = 0.01**2, 0.03**2
        value = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        value = value / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
        out[at : at + batch] = value.mean((1, 2, 3)).view(-1, a.shape[-1]).mean(1).double().numpy()
    return out.reshape(shape)


def moving_pixels(frames: np.ndarray, previous: np.ndarray, threshold: int = 12) -> np.ndarray:
    """Bool (..., 64, 64): pixels of uint8 frames (..., 64, 64, 3) that differ from `previous` by over `threshold`."""
    return np.abs(frames.astype(np.int16) - previous.astype(np.int16)).max(-1) > threshold


def still_pixels(frames: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Bool (N, T, 64, 64): pixels of uint8 frames (N, T, 64, 64, C) that are as in `last` (N, 1, ...) up to then."""
    return np.logical_and.accumulate((frames == last).all(-1), axis=1)


def detail(frames: np.ndarray) -> np.ndarray:
    """Mean absolute difference of neighbouring pixels, float64 (...,), of uint8 frames (..., 64, 64, 3)."""
    x = frames.astype(np.int16)
    down, right = np.abs(np.diff(x, axis=-3)), np.abs(np.diff(x, axis=-2))
    return (down.mean((-3, -2, -1)) + right.mean((-3, -2, -1))) / 2


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks float64 (N,), ties share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of x (N,) and y (N,); 0 where either is constant."""
    x, y = np.asarray(x, float) - np.mean(x), np.asarray(y, float) - np.mean(y)
    norm = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / norm) if norm > 0 else 0.0


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of x (N,) and y (N,); 0 where either is constant."""
    return pearson(ranks(x), ranks(y))


def interval(samples: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap replicates (R,) (Efron 1979)."""
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
