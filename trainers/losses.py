"""Weights and losses that keep small, rare and moving things visible to a squared error."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dreamenv.metrics import COLOUR_LEVELS


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


def variance_penalty(latents: Tensor, target: float = 1.0) -> Tensor:
    """Mean over channels of (Var - target)^2 + mean^2, of latents (B, C, H, W) (SEED 2.8)."""
    z = latents.float()
    return ((z.var((0, 2, 3)) - target) ** 2 + z.mean((0, 2, 3)) ** 2).mean()
