"""Weights that keep small, rare and moving things visible to a squared error of pixels, and statistics of latents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def colour_weights(frequencies: Tensor, common: float = 0.01, limit: float = 12.0) -> Tensor:
    """Inverse root frequency weights (4096,): 1 for colours more common than `common`, at most `limit`.

    Args:
        frequencies: float (4096,), see `dreamenv.evaluation.metrics.colour_frequencies`.
        common: share of pixels from which on a colour is common.
        limit: largest weight.
    """
    return (common / frequencies.clamp_min(1e-9)).sqrt().clamp(1.0, limit)


def motion_mask(frames: Tensor, previous: Tensor, threshold: int = 12) -> Tensor:
    """Bool (B, h, w): pixels of uint8 `frames` (B, h, w, c) that moved, dilated by one pixel."""
    moved = (frames.int() - previous.int()).abs().amax(-1) > threshold
    return F.max_pool2d(moved[:, None].float(), 3, 1, 1)[:, 0] > 0


def variance_penalty(latents: Tensor, counted: Tensor | None = None, target: float = 1.0) -> Tensor:
    """Mean over channels of (Var - target)^2 + mean^2, of latents (B, C, H, W), where bool (B, 1, H, W) says so."""
    z = latents.float()
    weight = torch.ones_like(z[:, :1]) if counted is None else counted.float()
    number = weight.sum()
    mean = (z * weight).sum((0, 2, 3)) / number
    variance = ((z - mean[:, None, None]).square() * weight).sum((0, 2, 3)) / (number - 1)
    return ((variance - target) ** 2 + mean**2).mean()
