"""The convolutional autoencoder: strided convolutions down, up-sampling back, a sigmoid at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dreamenv.config import check
from dreamenv.contract.frames import NATIVE, check_frame
from dreamenv.models.blocks import group_norm
from dreamenv.models.interface import Codec, LatentSpec, Reconstruction
from dreamenv.models.registry import register

_STAGES = {4: 2, 8: 3, 16: 4}


@dataclass(frozen=True)
class ConvAutoencoderConfig:
    """Shape of the autoencoder."""

    frame: tuple[int, int, int] = NATIVE
    """(H, W, C) of a frame."""
    latent_channels: int = 16
    """C of the latent (C, H / downsample, W / downsample)."""
    width: int = 32
    """Channels of the first stage; each further one has twice as many, up to four times."""
    downsample: int = 8
    """How many times smaller a latent's side is: 4, 8 or 16."""
    upsample: Literal["upsample_conv", "conv_transpose"] = "upsample_conv"
    """How the decoder grows: nearest neighbours and a convolution, or a transposed convolution."""
    variational: bool = False
    """Whether the encoder says a mean and a variance of each number (VAE, Kingma & Welling 2014); training draws from
    them, use takes the mean."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check_frame(self.frame, "frame")
        check(self.downsample in _STAGES, f"downsample {self.downsample}: must be 4, 8 or 16")
        whole = self.frame[0] % self.downsample == 0
        check(whole, f"downsample {self.downsample}: must divide the frame of {self.frame[0]} x {self.frame[1]} pixels")
        check(1 <= self.latent_channels <= 256, f"latent_channels {self.latent_channels}: must be 1..256")
        check(8 <= self.width <= 512, f"width {self.width}: must be 8..512")
        known = ("upsample_conv", "conv_transpose")
        check(self.upsample in known, f"upsample {self.upsample!r}: must be one of {', '.join(known)}")


@register("codec", "conv_autoencoder", ConvAutoencoderConfig)
class ConvAutoencoder(Codec):
    """Autoencoder of frames by strided convolutions, deterministic or variational.

    `encode` and `decode` work on float images (B, c, h, w) in [0, 1] and latents (B, C, H, W); what is decoded is
    always in [0, 1], by a sigmoid.
    """

    config: ConvAutoencoderConfig

    def __init__(self, config: ConvAutoencoderConfig) -> None:
        super().__init__()
        self.config, self.frame = config, config.frame
        stages, channels = _STAGES[config.downsample], config.frame[2]
        widths = [config.width * min(2**i, 4) for i in range(stages)]
        down: list[nn.Module] = []
        for before, width in zip([channels, *widths], widths, strict=False):
            down += [nn.Conv2d(before, width, 4, 2, 1), group_norm(width), nn.SiLU()]
            down += [nn.Conv2d(width, width, 3, padding=1), group_norm(width), nn.SiLU()]
        self.encoder = nn.Sequential(*down)
        self.latent_head = nn.Conv2d(widths[-1], config.latent_channels * (1 + config.variational), 1)
        up: list[nn.Module] = [nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)]
        for before, width in zip(widths[::-1], [*widths[-2::-1], config.width], strict=True):
            up += [group_norm(before), nn.SiLU(), *_larger(before, width, config.upsample)]
        self.decoder = nn.Sequential(
            *up, group_norm(config.width), nn.SiLU(), nn.Conv2d(config.width, channels, 3, 1, 1)
        )

    @property
    def spec(self) -> LatentSpec:
        """(C, H / downsample, W / downsample), cells of the picture that overlap."""
        side = self.config.frame[0] // self.config.downsample
        return LatentSpec((self.config.latent_channels, side, side), "cells")

    def distribution(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, c, h, w) -> mean and log variance (B, C, H, W) of the latents; None where it has none."""
        out = self.latent_head(self.encoder(images - 0.5))
        if not self.config.variational:
            return out, None
        mean, log_variance = out.chunk(2, 1)
        return mean, log_variance.clamp(-20, 10)

    def encode(self, images: Tensor, **columns: Tensor) -> Tensor:
        """Images (B, c, h, w) in [0, 1] -> latents (B, C, H, W), of a variational one the means."""
        return self.distribution(images)[0]

    def decode(self, latents: Tensor, **kept: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> images (B, c, h, w) in [0, 1]."""
        return self.decoder(latents).sigmoid()

    def forward(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """See `Codec.forward`; a variational one draws with the noise, of which it then wants standard deviation 1."""
        latents, log_variance = self.distribution(images)
        if log_variance is None:
            return Reconstruction(self.decode(latents + noise), latents, torch.zeros((), device=images.device))
        mean, log_variance = latents.float(), log_variance.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return Reconstruction(self.decode(mean + (log_variance / 2).exp() * noise), latents, divergence)


def _larger(before: int, width: int, how: str) -> list[nn.Module]:
    """Layers that double the side of maps."""
    if how == "conv_transpose":
        return [nn.ConvTranspose2d(before, width, 4, 2, 1)]
    return [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(before, width, 3, padding=1)]
