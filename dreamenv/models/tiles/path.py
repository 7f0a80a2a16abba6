"""Which of the paths that dynamics allow is nearest to where the camera was read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_NUDGE, _STRIDE, _NO_PATH = 0.003, 0.02, 0.03  # tiles: how slopes are taken, how far a step may go, what is too far


def nearest_path(deviation: Callable[[Tensor], Tensor], size: int, device: torch.device) -> Tensor:
    """Least squares over where the camera was in the first two pictures (Gauss-Newton, slopes by differences).

    Args:
        deviation: (n B, 4), how far off a path begins in the first two pictures, x and y each -> (n B, T, 2), how far
            it is from the readings at each picture, in tiles.
        size: B.
        device: of the result.

    Returns:
        The deviations (B, T, 2) of the nearest path; zeros where none comes near, for then the player met something
        that the dynamics do not know.
    """
    begin = torch.zeros(size, 4, device=device)
    off = deviation(begin)
    nudge = _NUDGE * torch.eye(4, device=device)[:, None]
    for _ in range(2):
        nudged = deviation((begin + nudge).flatten(0, 1)).unflatten(0, (4, size))
        slopes = ((nudged - off).flatten(2) / _NUDGE).permute(1, 2, 0)
        normal = slopes.mT @ slopes + 1e-4 * torch.eye(4, device=device)
        step = torch.linalg.solve(normal, slopes.mT @ off.flatten(1)[..., None])[..., 0]
        tried = begin - step.clamp(-_STRIDE, _STRIDE)
        found = deviation(tried)
        better = found.square().sum((1, 2)) < off.square().sum((1, 2))
        begin, off = torch.where(better[:, None], tried, begin), torch.where(better[:, None, None], found, off)
    return off * (off.abs().amax((1, 2)) < _NO_PATH)[:, None, None]
