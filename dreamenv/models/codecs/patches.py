"""The frame autoencoder: a linear path that starts as PCA of patches, plus a small residual conv path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.config import check
from dreamenv.models.blocks import ResBlock, group_norm, zero_init
from dreamenv.models.interface import Codec, LatentSpec
from dreamenv.models.registry import register


@dataclass(frozen=True)
class PatchAutoencoderConfig:
    """Shape of the autoencoder."""

    latent_channels: int = 16
    """C of the latent (C, 64 / patch, 64 / patch)."""
    width: int = 64
    """Channels of the residual path."""
    blocks: int = 2
    """Residual blocks on each side."""
    patch: int = 4
    """Down-sampling factor: 4 gives 16 x 16 cells."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.patch in (2, 4, 8), f"patch {self.patch}: must be 2, 4 or 8")
        check(
            1 <= self.latent_channels <= 3 * self.patch**2,
            f"latent_channels {self.latent_channels}: must be 1..{3 * self.patch**2}, the size of a patch",
        )
        check(8 <= self.width <= 2048, f"width {self.width}: must be 8..2048")
        check(0 <= self.blocks <= 64, f"blocks {self.blocks}: must be 0..64")


class _Residual(nn.Sequential):
    def __init__(self, c_in: int, c_out: int, config: PatchAutoencoderConfig) -> None:
        w = config.width
        super().__init__(
            nn.Conv2d(c_in, w, 3, padding=1),
            *[ResBlock(w, w) for _ in range(config.blocks)],
            group_norm(w),
            nn.SiLU(),
            zero_init(nn.Conv2d(w, c_out, 3, padding=1)),
        )


@register("codec", "patch_autoencoder", PatchAutoencoderConfig)
class PatchAutoencoder(Codec):
    """Deterministic autoencoder of 64 x 64 RGB frames.

    `encode` and `decode` work on float images (B, 3, 64, 64) in [0, 1] and latents (B, C, 16, 16) that have about
    zero mean and unit variance per channel. Source: project design; PCA as in Hotelling 1933.
    """

    def __init__(self, config: PatchAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        pixels = 3 * config.patch**2
        self.linear_in = nn.Conv2d(pixels, config.latent_channels, 1)
        self.linear_out = nn.Conv2d(config.latent_channels, pixels, 1)
        self.residual_in = _Residual(pixels, config.latent_channels, config)
        self.residual_out = _Residual(config.latent_channels, pixels, config)

    @property
    def spec(self) -> LatentSpec:
        """(C, 64 / patch, 64 / patch), patches of the picture."""
        side = 64 // self.config.patch
        return LatentSpec((self.config.latent_channels, side, side))

    @torch.no_grad()
    def init_pca(self, images: Tensor) -> float:
        """Initialise the linear paths from sample images (B, 3, 64, 64) in [0, 1]; returns the explained variance."""
        patches = (
            F.pixel_unshuffle(images, self.config.patch).permute(0, 2, 3, 1).reshape(-1, self.linear_in.in_channels)
        )
        patches = patches.double()
        mean = patches.mean(0)
        covariance = (patches - mean).T @ (patches - mean) / len(patches)
        variance, basis = torch.linalg.eigh(covariance)
        order = torch.arange(len(variance) - 1, -1, -1)[: self.config.latent_channels]
        std, basis = variance[order].clamp_min(1e-8).sqrt(), basis[:, order]
        project = (basis / std).T
        self.linear_in.weight.copy_(project[:, :, None, None])
        self.linear_in.bias.copy_(-(project @ mean))  # pyright: ignore[reportOptionalMemberAccess]
        self.linear_out.weight.copy_((basis * std)[:, :, None, None])
        self.linear_out.bias.copy_(mean)  # pyright: ignore[reportOptionalMemberAccess]
        return float(variance[order].sum() / variance.sum())

    def encode(self, images: Tensor, **columns: Tensor) -> Tensor:
        """Images (B, 3, 64, 64) in [0, 1] -> latents (B, C, H, W)."""
        x = F.pixel_unshuffle(images, self.config.patch)
        return self.linear_in(x) + self.residual_in(x - 0.5)

    def decode(self, latents: Tensor, **kept: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> images (B, 3, 64, 64), about [0, 1] and not clamped."""
        return F.pixel_shuffle(self.linear_out(latents) + self.residual_out(latents), self.config.patch)

    def pool(self, values: Tensor, latents: Tensor) -> Tensor:
        """Means over each cell of pictures' values (B, 64, 64) -> (B, H, W)."""
        return F.avg_pool2d(values[:, None], self.config.patch)[:, 0]
