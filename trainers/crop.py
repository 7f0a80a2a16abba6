"""Parts of pictures to learn from: where little changes, most of a picture teaches nothing and costs as much."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from trainers.rollout import DynamicsBatch


def cropped(rng: np.random.Generator, batch: DynamicsBatch, context: int, size: int, around: float) -> DynamicsBatch:
    """A square of each sample's picture, the same in all its steps.

    Args:
        rng: all randomness.
        batch: samples of whole pictures.
        context: K, how many of their latents are not predicted.
        size: rows and columns of cells of a square.
        around: share of the squares in which something changes at the first predicted step, where anything does: a cell
            is drawn by how much it changes, and lies anywhere inside the square's rim. The others lie anywhere.

    Returns:
        The batch with maps (..., size, size) in place of (..., H, W), and `rim`, bool (B, size, size).
    """
    height, width = batch.latents.shape[-2:]
    change = (batch.latents[:, context] - batch.latents[:, context - 1]).abs().sum(1, dtype=torch.float32)
    count, limits = len(change), (height - size, width - size)
    corners = np.stack([rng.integers(0, most, size=count, endpoint=True) for most in limits], 1)
    shares = change.flatten(1).cumsum(1).numpy()
    drawn = (shares < (rng.random(count) * shares[:, -1])[:, None]).sum(1).clip(max=height * width - 1)
    inside = rng.integers(1, size - 1, size=(count, 2))
    at = (np.stack([drawn // width, drawn % width], 1) - inside).clip(0, limits)
    moved = (rng.random(count) < around) & (shares[:, -1] > 0)
    corners = np.where(moved[:, None], at, corners)

    def cut(maps: Tensor) -> Tensor:
        return torch.stack([m[..., y : y + size, x : x + size] for m, (y, x) in zip(maps, corners, strict=True)])

    rim = torch.ones(count, height, width, dtype=torch.bool)
    for each, (y, x) in zip(rim, corners, strict=True):
        top, left = (0 if at == 0 else at + 1 for at in (y, x))
        bottom, right = (at + size - (at + size < most) for at, most in ((y, height), (x, width)))
        each[top:bottom, left:right] = False
    past = None if batch.past is None else cut(batch.past)
    return replace(batch, latents=cut(batch.latents), importance=cut(batch.importance), past=past, rim=cut(rim))
