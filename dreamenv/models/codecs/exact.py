"""Patches of the picture as they are: a codec that learns nothing and loses nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamenv.config import check
from dreamenv.models.interface import Codec, LatentSpec
from dreamenv.models.registry import register

_SCALE = 4.0  # of a pixel's value, so that latents have a deviation of about one


@dataclass(frozen=True)
class ExactPatchesConfig:
    """Shape of the patches."""

    patch: int = 4
    """Pixels on a side: 4 gives 16 x 16 cells of 48 numbers."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.patch in (2, 4, 8), f"patch {self.patch}: must be 2, 4 or 8")


@register("codec", "exact_patches", ExactPatchesConfig)
class ExactPatches(Codec):
    """Pixels laid side by side in the channels of a coarser grid, and back; the same frame comes out, to the byte.

    For games whose picture mostly stands still: what a bottleneck loses of it is more than what moves.
    """

    stored: ClassVar[torch.dtype] = torch.uint8

    def __init__(self, config: ExactPatchesConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def spec(self) -> LatentSpec:
        """(3 patch^2, 64 / patch, 64 / patch): the reds of a cell, row by row, then the greens and the blues."""
        side = 64 // self.config.patch
        return LatentSpec((3 * self.config.patch**2, side, side), "pixels of patches")

    def encode(self, images: Tensor, **columns: Tensor) -> Tensor:
        """Images (B, 3, 64, 64) in [0, 1] -> latents (B, C, H, W) in [-2, 2]."""
        return (F.pixel_unshuffle(images, self.config.patch) - 0.5) * _SCALE

    def decode(self, latents: Tensor, **kept: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> images (B, 3, 64, 64), about [0, 1] and not clamped."""
        return F.pixel_shuffle(latents / _SCALE + 0.5, self.config.patch)

    def pack(self, latents: Tensor) -> Tensor:
        """See `Codec.pack`: the pixels' own values."""
        return ((latents.float() / _SCALE + 0.5) * 255).round().clamp(0, 255).byte()

    def unpack(self, stored: Tensor) -> Tensor:
        """See `Codec.unpack`."""
        return ((stored.float() / 255 - 0.5) * _SCALE).half()

    def pool(self, values: Tensor, latents: Tensor) -> Tensor:
        """Means over each cell of pictures' values (B, 64, 64) -> (B, H, W)."""
        return F.avg_pool2d(values[:, None], self.config.patch)[:, 0]
