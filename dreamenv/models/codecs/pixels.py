"""No codec at all: the picture itself is the latent."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dreamenv.contract.frames import NATIVE, check_frame
from dreamenv.models.interface import Codec, LatentSpec
from dreamenv.models.registry import register


@dataclass(frozen=True)
class PixelsConfig:
    """Shape of the pictures."""

    frame: tuple[int, int, int] = NATIVE
    """(H, W, C) of a frame: 64 x 64 RGB, or 84 x 84 grey (84, 84, 1)."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check_frame(self.frame, "frame")


@register("codec", "pixels", PixelsConfig)
class Pixels(Codec):
    """The codec of models that work on pixels: latents are the images (B, c, h, w) in [0, 1]. It learns nothing."""

    def __init__(self, config: PixelsConfig) -> None:
        super().__init__()
        self.config, self.frame = config, config.frame

    @property
    def spec(self) -> LatentSpec:
        """(c, h, w), pixels."""
        height, width, channels = self.config.frame
        return LatentSpec((channels, height, width), "pixels")

    def encode(self, images: Tensor, **columns: Tensor) -> Tensor:
        """The images."""
        return images

    def decode(self, latents: Tensor, **kept: Tensor) -> Tensor:
        """The latents."""
        return latents
