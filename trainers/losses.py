"""Weights and losses that keep small, rare and moving things visible to a squared error."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamenv.metrics import COLOUR_LEVELS

_FLOOR = math.exp(-8)  # expected squared error below which an estimate need not be told from a smaller one
_PATCHES = (1, 2, 4)  # cells on a side, of the energy score


def colour_bins(frames: Tensor) -> Tensor:
    """Frames uint8 (..., 3) -> colour bin int64 (...) in 0..4095: 16 levels a channel."""
    levels = frames.long() // (256 // COLOUR_LEVELS)
    return (levels[..., 0] * COLOUR_LEVELS + levels[..., 1]) * COLOUR_LEVELS + levels[..., 2]


def colour_weights(frequencies: Tensor, common: float = 0.01, limit: float = 12.0) -> Tensor:
    """Inverse root frequency weights (4096,): 1 for colours more common than `common`, at most `limit`.

    Args:
        frequencies: float (4096,), see `dreamenv.metrics.colour_frequencies`.
        common: share of pixels from which on a colour is common.
        limit: largest weight.
    """
    return (common / frequencies.clamp_min(1e-9)).sqrt().clamp(1.0, limit)


def motion_mask(frames: Tensor, previous: Tensor, threshold: int = 12) -> Tensor:
    """Bool (B, 64, 64): pixels of uint8 `frames` (B, 64, 64, 3) that moved, dilated by one pixel (SEED 2.5)."""
    moved = (frames.int() - previous.int()).abs().amax(-1) > threshold
    return F.max_pool2d(moved[:, None].float(), 3, 1, 1)[:, 0] > 0


def variance_penalty(latents: Tensor, counted: Tensor | None = None, target: float = 1.0) -> Tensor:
    """Mean over channels of (Var - target)^2 + mean^2, of latents (B, C, H, W) (SEED 2.8), where bool (B, 1, H, W) says so."""
    z = latents.float()
    weight = torch.ones_like(z[:, :1]) if counted is None else counted.float()
    number = weight.sum()
    mean = (z * weight).sum((0, 2, 3)) / number
    variance = ((z - mean[:, None, None]).square() * weight).sum((0, 2, 3)) / (number - 1)
    return ((variance - target) ** 2 + mean**2).mean()


def error_estimate_score(log_error: Tensor, error: Tensor) -> Tensor:
    """How badly an expected squared error s^2 = exp(log_error) + _FLOOR fits the observed ones: s + error / s, elementwise.

    A proper score of the mean (a Bregman divergence, Gneiting 2011): the best constant s^2 is the mean error. A Gaussian's
    likelihood is one too, but its slope is error / s^2: single cells that err where no error was expected outweigh all others.

    Args:
        log_error: log of the expected squared error of a latent (1 is the latents' variance), any shape.
        error: squared errors, of the same shape and unit; no gradient goes through them.

    Returns:
        The scores, of the same shape; smaller is better.
    """
    s = (log_error.exp() + _FLOOR).sqrt()
    return s + error.detach() / s


def energy_score(first: Tensor, second: Tensor, target: Tensor, channels: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Fair energy score of an ensemble of two, over patches of 1, 2 and 4 cells.

    The energy score E|X - y| - E|X - X'| / 2 is strictly proper (Gneiting & Raftery 2007): only the true distribution of whole
    patches minimises it, so that a thing which may be here or there is drawn here or there and not at half strength in both.

    Args:
        first: (B, C, H, W), one draw.
        second: another, independent of it.
        target: what happened.
        channels: (C, 1, 1), the weight of each channel's square.
        cells: (B, H, W), the weight of each cell.

    Returns:
        The score, and how far the draws are apart on average, E|X - X'|.
    """

    def square(x: Tensor, y: Tensor) -> Tensor:
        return ((x - y).square() * channels).mean(1)

    pairs = torch.stack([square(first, target), square(second, target), square(first, second)], 1)
    score = spread = torch.zeros((), device=target.device)
    for size in _PATCHES:
        distance = (F.avg_pool2d(pairs, size, 1) + 1e-5).sqrt()  # the root's slope is infinite at 0
        weight = F.avg_pool2d(cells, size, 1)
        score = score + (weight * (distance[:, 0] + distance[:, 1] - distance[:, 2]) / 2).mean() / len(_PATCHES)
        spread = spread + distance[:, 2].mean() / len(_PATCHES)
    return score, spread
