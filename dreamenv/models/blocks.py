"""Building blocks shared by the networks."""

from __future__ import annotations

import math
from typing import NamedTuple

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


class Camera(NamedTuple):
    """Where the camera is on the level's grid of tiles, and how it moves.

    `phase` and `next_phase` are float (B, 4 * `EgoMotion.HARMONICS`): for each harmonic h = 1.., the sines of 2 pi h x and
    2 pi h y, then the cosines, of the camera's position (x, y) in tiles, now and after the action. `shift` (B, 2) is the
    move between the two, in pixels; x to the right, y up. `embedding` (B, W) is what else the network knows of it.
    """

    embedding: Tensor
    phase: Tensor
    next_phase: Tensor
    shift: Tensor


class EgoMotion(nn.Module):
    """Reads the camera's sub-pixel position and its next move from the context: visual odometry (Nister et al. 2004).

    A scrolling game draws every tile at a fraction of a pixel that a squared error hardly teaches a network to see, though
    the pattern of all the tiles' edges shows it like a vernier. Here it is learnt from the camera's true position, which the
    game gives at collection; at play only latents are needed.

    Args:
        channels: latent channels C.
        size: latent height and width; a multiple of 4.
        context: latents K.
        actions: width of all the action embeddings together.
        width: of the embedding.
    """

    HARMONICS = 3

    def __init__(self, channels: int, size: int, context: int, actions: int, width: int) -> None:
        super().__init__()
        cells, phases = (size // 4) ** 2, 4 * self.HARMONICS

        def trunk(c_in: int, *layers: nn.Module) -> nn.Sequential:
            return nn.Sequential(*layers, nn.Conv2d(c_in, 48, 3, 2, 1), nn.SiLU(), nn.Conv2d(48, 32, 3, 2, 1), nn.SiLU(),
                                 nn.Flatten(), nn.Linear(32 * cells, width), nn.SiLU())  # fmt: skip

        self.each = trunk(32, nn.Conv2d(channels, 32, 3, 1, 1), nn.SiLU())
        self.together = trunk(channels * context)
        self.position = nn.Linear(width, phases)
        self.embed = nn.Sequential(nn.Linear((context + 1) * width + actions, width), nn.SiLU(),
                                   nn.Linear(width, width), nn.SiLU())  # fmt: skip
        self.move = nn.Linear(width, phases + 2)

    def forward(self, context: Tensor, actions: Tensor) -> Camera:
        """Context (B, K, C, H, W), embedded actions (B, A) -> the camera."""
        b = len(context)
        each = self.each(context.flatten(0, 1)).view(b, -1)
        embedding = self.embed(torch.cat([each, self.together(context.flatten(1, 2)), actions], 1))
        moved = self.move(embedding).float()
        phase = self.position(each[:, -(each.shape[1] // context.shape[1]) :]).float()
        return Camera(embedding, phase, moved[:, :-2], moved[:, -2:])

    @classmethod
    def phases(cls, position: Tensor) -> Tensor:
        """True phases (..., 4 * HARMONICS) of a camera position (..., 2) in tiles."""
        harmonics = torch.arange(1, cls.HARMONICS + 1, device=position.device)
        angles = 2 * math.pi * (position.double().remainder(1)[..., None, :] * harmonics[:, None])
        return torch.stack([angles.sin(), angles.cos()], -2).flatten(-3).float()

    @classmethod
    def tile_maps(cls, phase: Tensor, size: int, tile: float) -> Tensor:
        """Where each latent cell lies within its tile, (B, 4 * HARMONICS, H, W).

        Args:
            phase: (B, 4 * HARMONICS), of the camera.
            size: H = W.
            tile: the width of a tile in latent cells.
        """
        cells = (torch.arange(size, device=phase.device) - (size - 1) / 2) / tile
        sines, cosines = phase.view(-1, cls.HARMONICS, 2, 2).unbind(2)  # (B, harmonic, axis)
        maps = []
        for h in range(cls.HARMONICS):
            turn = 2 * math.pi * (h + 1) * cells
            for axis, sign in ((0, 1.0), (1, -1.0)):  # columns run with x, rows against y
                s, c = sines[:, h, axis, None], cosines[:, h, axis, None]
                for wave in (s * turn.cos() + sign * c * turn.sin(), c * turn.cos() - sign * s * turn.sin()):
                    maps.append(wave[:, None, :].expand(-1, size, -1) if axis == 0 else wave[:, :, None].expand(-1, -1, size))
        return torch.stack(maps, 1)
