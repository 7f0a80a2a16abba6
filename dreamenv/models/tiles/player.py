"""What surrounds the player: it decides where the player can go and what it meets there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.contract.actions import NUM_ACTIONS
from dreamenv.models.tiles.grid import Grid, behind

_AROUND = 3  # tiles on each side of the player's that are looked at
_PICTURES = 3  # so many of the last ones
_FINE = (
    4,
    8,
    16,
)  # waves a tile of the place's finer features: a foot a hundredth of a tile above the ground does not stand
FINE_PLACE = 4 + 4 * len(_FINE)  # numbers of `fine_place`, of one wide wave


def _cut(codes: Tensor, at: Tensor, size: int) -> Tensor:
    """Codes (B, c, H, W) -> float32 (B, c, size, size) from tile `at` (B, 2) on, right and down; zeros beyond."""
    window, tile = codes.shape[-1], torch.arange(size, device=codes.device)
    x, y = (at[:, i, None].long() + tile for i in range(2))
    inside = ((y >= 0) & (y < window))[:, :, None] & ((x >= 0) & (x < window))[:, None]
    index = y.clamp(0, window - 1)[:, :, None] * window + x.clamp(0, window - 1)[:, None]
    found = codes.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, codes.shape[1], -1))
    return found.unflatten(2, (size, size)).float() * inside[:, None]


def place_in_tile(grid: Grid, phase: Tensor, game: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The player's tile of the window, whole, and its place in that tile, 0 to 1, each (B, 2).

    Args:
        grid: what a picture shows.
        phase: the camera's, (B, 2) in tiles.
        game: int64 (B,), where several are told apart.
    """
    middle = [grid.tiles(game) * p for p in grid.player]  # of the picture, in tiles
    begun = [m // 1 for m in middle]
    at = torch.stack([phase[:, i] + (m - b) for i, (m, b) in enumerate(zip(middle, begun, strict=True))], 1)
    tile = at.floor().detach()
    return torch.stack([1 + b + tile[:, i] for i, b in enumerate(begun)], 1), at - tile


def surroundings(grid: Grid, context: Tensor, tile: Tensor) -> Tensor:
    """Cut out what lies around the player, codes float32 (B, 3 c, 7, 7) of the last three pictures.

    Args:
        grid: what a picture shows.
        context: (B, K, C, H, W), past latents.
        tile: (B, 2), the player's, see `place_in_tile`.
    """
    c, last = context.shape[2] - grid.known, [max(context.shape[1] - _PICTURES + i, 0) for i in range(_PICTURES)]
    by = behind(context)
    at = torch.stack([by[:, i] for i in last], 1) + (tile - _AROUND)[:, None]
    pictures = torch.stack([context[:, i, :c] for i in last], 1)
    recent = _cut(pictures.flatten(0, 1), at.flatten(0, 1), 2 * _AROUND + 1)
    return recent.unflatten(0, (-1, _PICTURES)).flatten(1, 2)


class PlayerView(nn.Module):
    """A network's view of the player: the tiles around it, where it is, how it moved and what it did.

    Args:
        codes: numbers a tile.
        context: K past pictures.
        width: channels in which the tiles are looked at.
    """

    def __init__(self, codes: int, context: int, width: int) -> None:
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(_PICTURES * codes, width, 3), nn.SiLU(), nn.Conv2d(width, width, 3), nn.SiLU(), nn.Flatten()
        )
        self.seen = width * 9 + context * (NUM_ACTIONS + 1) + 2 * (context - 1) + 10 + 4 * len(_FINE)

    def see(self, recent: Tensor, place: Tensor, before: Tensor, actions: Tensor) -> Tensor:
        """Features (B, seen).

        Args:
            recent: see `surroundings`.
            place: where in its tile the player is, (B, 2).
            before: the camera's moves between the pictures, (B, K - 1, 2).
            actions: int64 (B, K).
        """
        taken = F.one_hot(actions, NUM_ACTIONS + 1).float()
        return torch.cat([self.look(recent), taken.flatten(1), before.flatten(1), place, fine_place(place, (1, 2))], 1)


def fine_place(place: Tensor, wide: tuple[int, ...] = (1,)) -> Tensor:
    """Cosines and sines of a place (B, 2) in tiles, of `wide` and of 4, 8 and 16 waves a tile, float32 (B, n).

    Only the wide ones have slopes: through many steps those of the others explode. n is 4 len(wide) + 12.
    """
    angle = 2 * torch.pi * torch.cat([n * place for n in wide], 1)
    fine = 2 * torch.pi * torch.cat([n * place for n in _FINE], 1).detach()
    return torch.cat([angle.cos(), angle.sin(), fine.cos(), fine.sin()], 1)
