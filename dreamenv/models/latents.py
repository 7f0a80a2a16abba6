"""Latents and pictures: their shapes, predictions of them, and the way from frames to images and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dreamenv.config import check


@dataclass(frozen=True)
class LatentSpec:
    """What one latent is. A codec and the dynamics and head that work on its latents have equal ones."""

    shape: tuple[int, int, int]
    """(C, H, W)."""
    layout: str = "patches"
    """What a cell means, in the codec's own word, such as "patches" of the picture."""
    known: int = 0
    """How many of the last channels hold known quantities instead of learnt content."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        c, h, w = self.shape
        check(1 <= c <= 256, f"shape {self.shape}: must have 1..256 channels")
        check(1 <= h <= 128 and 1 <= w <= 128, f"shape {self.shape}: must have 1..128 rows and columns")
        check(0 <= self.known < c, f"known {self.known}: must be fewer than the {c} channels")
        check(0 < len(self.layout) <= 64, f"layout {self.layout!r}: must be a word")


@dataclass(frozen=True)
class Prediction:
    """One evaluation of dynamics.

    Attributes:
        latent: float32 (B, C, H, W), the clean next latent.
        log_error: float32 (B, H, W), the log of the squared error that the dynamics expect of it in each cell.
        hints: what a head, or another evaluation of the same step, may be told of it, each (B, ...); usually nothing.
        parts: what it was made of, for training alone, each (B, ...); usually nothing.
    """

    latent: Tensor
    log_error: Tensor
    hints: Mapping[str, Tensor] = field(default_factory=dict)
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class Reconstruction(NamedTuple):
    """What a codec in training makes of images.

    Attributes:
        images: (B, c, h, w), decoded.
        latents: (B, C, H, W), before any noise.
        divergence: a scalar, the mean divergence of the latents' distribution from a standard normal one (VAE); 0 for a
            deterministic codec.
    """

    images: Tensor
    latents: Tensor
    divergence: Tensor


def to_images(frames: Tensor) -> Tensor:
    """Frames uint8 (..., h, w, c) -> images float32 (..., c, h, w) in [0, 1]."""
    return frames.movedim(-1, -3).float().div_(255)


def to_frames(images: Tensor) -> Tensor:
    """Images (..., c, h, w) -> frames uint8 (..., h, w, c), rounded and clamped."""
    return images.float().mul(255).round_().clamp_(0, 255).to(torch.uint8).movedim(-3, -1)
