"""A made-up level on the grid of tiles, whose codes are known, and small networks for it."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamenv.models.dynamics.tiles import TileFlow, TileFlowConfig
from dreamenv.models.interface import LatentSpec
from dreamenv.models.tiles.grid import Grid, phase_of, with_camera

GRID = Grid()
LATENT = LatentSpec((10, 16, 16), "tiles", 4)
BACKBONE = {"type": "unet", "channels": [16, 32], "blocks": [1, 1]}
CODEC = {"type": "tile_autoencoder", "codes": 6, "width": 16, "blocks": 1, "orders": 5}
FLOW = {"type": "tile_flow", "backbone": BACKBONE, "embedding": 32, "motion": 16}


def seen_from(level: Tensor, pose: Tensor) -> Tensor:
    """The latents (B, c + 4, H, W) of a made-up level (c, Y, X) for cameras at `pose` (B, 2), without moves."""
    begin = pose.floor().long() - 1
    codes = torch.stack([level[:, y : y + GRID.window, x : x + GRID.window] for x, y in begin])
    phase = phase_of(pose)
    return with_camera(codes * (GRID.shown(phase) > 0), phase, torch.zeros_like(phase))


def walk(level: Tensor, start: Tensor, steps: Tensor) -> Tensor:
    """Latents (B, T, C, H, W), moves included, of cameras that start at (B, 2) and make `steps` (B, T - 1, 2)."""
    poses = torch.cat([start[:, None], start[:, None] + steps.cumsum(1)], 1)
    latents = torch.stack([seen_from(level, pose) for pose in poses.unbind(1)], 1)
    latents[:, 1:, -2:] = steps[..., None, None]
    return latents


def untrained_flow() -> TileFlow:
    """Dynamics that change nothing and go on as they went."""
    torch.manual_seed(0)
    return TileFlow(TileFlowConfig(latent=LATENT, backbone=BACKBONE, embedding=32, motion=16)).eval()
