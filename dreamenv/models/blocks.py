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


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) of tokens (B, N, width) to others (B, M, source), or to themselves.

    Args:
        width: of the tokens, a multiple of `heads`.
        heads: how many.
        source: width of what is attended to; 0: the tokens themselves.
    """

    def __init__(self, width: int, heads: int, source: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(source or width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """Tokens (B, N, width) -> (B, N, width)."""
        keys, values = self.key_value(x if source is None else source).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.query(x), keys, values))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer normalisation without weights of tokens (..., N, width), scaled and shifted by (..., width) each."""
    x = F.layer_norm(x, x.shape[-1:])
    return x * (1 + scale.unsqueeze(-2)) + shift.unsqueeze(-2)


def cell_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Sines and cosines (height * width, channels) of each cell's row and column (Vaswani et al. 2017, in 2-D)."""
    rows, columns = (sinusoidal(torch.arange(n, device=device), channels // 2, 1.0) for n in (height, width))
    grid = [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)]
    return torch.cat(grid, -1).flatten(0, 1)


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


def alternating(x: Tensor) -> Tensor:
    """Alternating sum of each channel of (B, C, H, W) -> (B, C), scaled so that white noise keeps its variance.

    Pictures, which change slowly from cell to cell, give little: it reads the noise and hardly what it was mixed with.
    """
    h, w = x.shape[-2:]
    sign = 1 - 2 * ((torch.arange(h, device=x.device)[:, None] + torch.arange(w, device=x.device)) % 2)
    return (x * sign).sum((2, 3)) / (h * w) ** 0.5


def fp32(x: Tensor) -> torch.autocast:
    """A context without autocast on the device of `x`, of any shape: what is inside keeps its dtype."""
    return torch.autocast(x.device.type, enabled=False)
