"""The canvas: the latest code of every tile around the picture, so that ground which was left comes back as it was.

It is float32 (B, c + 1, M, M), the latent's window in its middle. The last channel says which share of a tile its code
was seen from, 0 where nothing is known.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamenv.models.tiles.grid import Grid, look_from, phases, window_steps

MARGIN = 8
"""Tiles that a canvas reaches beyond the window, on each side."""


def recalled(canvas: Tensor, by: Tensor) -> Tensor:
    """What a canvas (B, c + 1, M, M) knows of the window `by` (B, 2) tiles further right and down, (B, c + 1, H, W)."""
    return look_from(canvas, by, MARGIN, canvas.shape[-1] - 2 * MARGIN)


def remember(grid: Grid, canvas: Tensor | None, latent: Tensor, by: Tensor) -> Tensor:
    """The canvas (B, c + 1, M, M) after a latent (B, C, H, W) whose window is `by` (B, 2) tiles further right and down.

    A tile is replaced where the latent shows at least as much of it. None is a canvas on which nothing is known.
    """
    share = grid.shown(phases(latent), grid.game_of(latent))
    fresh = torch.cat([latent[:, : -grid.known].float(), share], 1)
    if canvas is None:
        return F.pad(fresh, (MARGIN,) * 4)
    out = look_from(canvas, by, 0, canvas.shape[-1]).contiguous()
    inner = (..., slice(MARGIN, -MARGIN), slice(MARGIN, -MARGIN))
    known = out[inner]
    out[inner] = torch.where((share > 0) & (share + 0.01 >= known[:, -1:]), fresh, known)
    return out


def recall(grid: Grid, context: Tensor, canvas: Tensor | None = None, by: Tensor | None = None) -> Tensor:
    """The canvas after a context (B, K, C, H, W), on top of a `canvas` from before it.

    Args:
        grid: what a picture shows.
        context: past latents.
        canvas: (B, c + 1, M, M); None is one on which nothing is known.
        by: (B, 2), by how many tiles the context's first window is ahead of that canvas's; required with one.
    """
    steps = window_steps(context)
    out = canvas
    for i, latent in enumerate(context.unbind(1)):
        step = by if i == 0 else steps[:, i - 1]
        out = remember(grid, out, latent, torch.zeros_like(steps[:, 0]) if step is None else step)
    assert out is not None
    return out
