"""Building blocks shared by the networks."""

from __future__ import annotations

import math
from typing import cast

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


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) of `ResBlock`s, each level half the grid of the one before, conditioned on a vector.

    Args:
        c_in, c_out: channels in and out.
        widths: channels of each level.
        blocks: residual blocks of each level, on the way down and (but for the last level) up.
        cond: width of the conditioning vector.
    """

    def __init__(self, c_in: int, c_out: int, widths: tuple[int, ...], blocks: tuple[int, ...], cond: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(c_in, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width = widths[0]
        for w, n in zip(widths, blocks, strict=True):
            self.down.append(nn.ModuleList(ResBlock(width if i == 0 else w, w, cond) for i in range(n)))
            width = w
        for level in range(len(widths) - 2, -1, -1):
            w = widths[level]
            self.up.append(nn.ModuleList(ResBlock(width + w if i == 0 else w, w, cond) for i in range(blocks[level])))
            width = w
        self.out_norm = group_norm(width)
        self.out = zero_init(nn.Conv2d(width, c_out, 3, padding=1))

    def recall(self, context: Tensor) -> Tensor:
        """What is remembered beyond the context (B, K, C, H, W); here nothing, (B, 0, 0, 0)."""
        return context.new_zeros(len(context), 0, 0, 0)

    def settle(self, latents: Tensor, actions: Tensor) -> Tensor:
        """What these dynamics make of real latents (B, T, C, H, W), T <= K, and the actions between; here nothing else."""
        return latents

    def remember(self, memory: Tensor, last: Tensor, latent: Tensor) -> Tensor:
        """What is remembered one step on, when `latent` (B, C, H, W) follows `last`."""
        return memory

    def ahead(self, context: Tensor, actions: Tensor) -> Tensor | None:
        """What an outcome head is told of the step after a context (B, K, C, H, W) and actions (B, K); here nothing."""
        return None

    def beside(self, clean: Tensor) -> dict[str, Tensor]:
        """Options of `forward` that make another prediction comparable with `clean`, cell by cell; none here."""
        return {}

    def guided(self, clean: Tensor, unaware: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022): what the action changed, `scale` times."""
        return unaware + scale * (clean - unaware)

    def features(self, x: Tensor, cond: Tensor) -> Tensor:
        """Inputs (B, c_in, H, W) and conditioning (B, cond) -> what `out` takes, (B, widths[0], H, W)."""
        x = self.stem(x)
        skips = []
        for level, blocks in enumerate(cast(list[nn.ModuleList], self.down)):
            if level:
                x = F.avg_pool2d(x, 2)
            for block in blocks:
                x = block(x, cond)
            skips.append(x)
        skips.pop()
        for blocks in cast(list[nn.ModuleList], self.up):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = torch.cat([x, skips.pop()], 1)
            for block in blocks:
                x = block(x, cond)
        return F.silu(self.out_norm(x))


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
