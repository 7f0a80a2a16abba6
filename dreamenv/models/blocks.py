"""Building blocks shared by the networks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm (Wu & He 2018) with groups of 16 channels where that divides, else one group."""
    return nn.GroupNorm(channels // 16 if channels % 16 == 0 else 1, channels)


def zero_init(module: nn.Conv2d | nn.Linear) -> nn.Module:
    """Zero a layer's parameters, so that its residual branch starts as the identity."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


class ResBlock(nn.Module):
    """Pre-activation residual block, (B, c_in, H, W) -> (B, c_out, H, W), FiLM-conditioned if `cond` > 0.

    FiLM (Perez et al. 2018) scales and shifts after the second normalisation: (1 + gamma) * h + beta.
    """

    def __init__(self, c_in: int, c_out: int, cond: int = 0) -> None:
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.film = nn.Linear(cond, 2 * c_out) if cond else None
        self.norm2 = group_norm(c_out)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """`cond` (B, cond) is required exactly when the block was built with one."""
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.film is not None:
            gamma, beta = self.film(cond)[:, :, None, None].chunk(2, 1)
            h = (1 + gamma) * h + beta
        return self.skip(x) + self.conv2(F.silu(h))


def sinusoidal(x: Tensor, dim: int, scale: float = 1000.0) -> Tensor:
    """Embed scalars (B,) in [0, 1] as (B, dim) sines and cosines (Vaswani et al. 2017)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = scale * x.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class DynamicFilters(nn.Module):
    """A bank of convolutions of the last latent, mixed per cell by predicted coefficients.

    A scrolling world is mostly a shift; a shift is a multiplication of features, which ordinary convolution stacks
    only approximate (cf. Jia et al. 2016, Dynamic Filter Networks).

    Args:
        channels: latent channels C.
        features: channels of the network's features that predict the coefficients.
        bank: number of filters M.
        kernel: their size.
    """

    def __init__(self, channels: int, features: int, bank: int, kernel: int) -> None:
        super().__init__()
        self.bank = bank
        self.filters = nn.Conv2d(channels, channels * bank, kernel, padding=kernel // 2, bias=False)
        self.mix = zero_init(nn.Conv2d(features, bank, 1))

    def forward(self, latent: Tensor, features: Tensor) -> Tensor:
        """Latent (B, C, H, W), features (B, F, H, W) -> (B, C, H, W)."""
        b, c, h, w = latent.shape
        filtered = self.filters(latent).view(b, self.bank, c, h, w)
        return (filtered * self.mix(features).unsqueeze(2)).sum(1)


class GlobalShift(nn.Module):
    """Reads from the context by how many pixels the whole picture moves next, and moves it: where the camera goes.

    It is done in pixels, because a linear filter of latents cannot shift by part of a cell: small things blur at once.

    Source: one distribution over shifts for the whole picture, CDNA (Finn et al. 2016); separable, Niklaus et al. 2017.

    Args:
        channels: latent channels C.
        context: latents K.
        cond: width of the conditioning vector.
        shift: largest shift, in pixels.
    """

    def __init__(self, channels: int, context: int, cond: int, shift: int) -> None:
        super().__init__()
        self.taps = 2 * shift + 1
        self.look = nn.Sequential(
            nn.Conv2d(channels * context, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.SiLU(),
            nn.Conv2d(32, 24, 3, 2, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        )  # fmt: skip
        self.decide = nn.Sequential(nn.Linear(24 * 16 + cond, 64), nn.SiLU(), nn.Linear(64, 2 * self.taps))

    def forward(self, context: Tensor, cond: Tensor) -> Tensor:
        """Context (B, K, C, H, W), conditioning (B, cond) -> the share of each shift, (B, 2, taps): to the right, then down."""
        features = torch.cat([self.look(context.flatten(1, 2)), cond], 1)
        return self.decide(features).float().view(len(context), 2, self.taps).softmax(2)

    @staticmethod
    def move(images: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of an image's shifts.

        Args:
            images: (B, 3, H, W); what a shift uncovers repeats the border.
            shares: (B, 2, taps), from `forward`.

        Returns:
            The images, and how much of each pixel was not uncovered, (B, 1, H, W) in 0..1.
        """
        reach, moved = shares.shape[2] // 2, images
        seen = images.new_ones(len(images), 1, *images.shape[2:])
        for axis, share in ((3, shares[:, 0]), (2, shares[:, 1])):
            size = images.shape[axis]
            source = torch.arange(size, device=images.device) - torch.arange(-reach, reach + 1, device=images.device)[:, None]
            inside = ((source >= 0) & (source < size)).to(share.dtype)
            matrix = torch.einsum("bt,tij->bij", share, F.one_hot(source.clamp(0, size - 1), size).to(share.dtype))
            visible = share @ inside  # (B, size)
            if axis == 3:
                moved, seen = moved @ matrix[:, None].mT, seen * visible[:, None, None, :]
            else:
                moved, seen = matrix[:, None] @ moved, seen * visible[:, None, :, None]
        return moved, seen
