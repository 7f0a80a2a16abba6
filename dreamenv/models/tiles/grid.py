"""The level's own grid of tiles: what a picture of a scrolling world shows of it.

A picture shows `Grid.view` tiles each way. A latent is a window of `Grid.window` tiles that begins one tile before the
one in the picture's top left corner. Its first channels are codes, one vector a tile, which stay the same while the
camera moves over what stands still. The last `CAMERA` channels are constant over the window: the phase (how far the
picture cuts into its first tile, x and y, in tiles) and the move since the picture before (x and y, in tiles, right and
down). Where several games are told apart, each of which shows its own number of tiles, one channel before these says
the game's number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamenv.config import check
from dreamenv.models.blocks import fp32

CAMERA = 4
"""Channels that hold phase and move."""
_PIXELS = 64  # of a picture each way


@dataclass(frozen=True)
class Grid:
    """How a game shows its grid; a game's row in `dreamenv.contract.games` says it."""

    view: int = 13
    """Tiles that a picture shows each way; of several games, the most."""
    player: tuple[float, float] = (0.5, 0.5)
    """Where in the picture the player's middle is, in parts of its width and height."""
    views: tuple[int, ...] = ()
    """Tiles that each game's pictures show, where several are told apart."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        for view in (self.view, *self.views):
            check(2 <= view <= 61, f"view {view}: must be 2..61 tiles")
        check(not self.views or self.view == max(self.views), f"view {self.view}: must be the most of {self.views}")
        check(all(0 <= p <= 1 for p in self.player), f"player {self.player}: must be in 0..1 each")

    @property
    def window(self) -> int:
        """Tiles of a latent each way: the view, cut tiles on both sides and one more, in fours for the networks."""
        return -(-(self.view + 3) // 4) * 4

    @property
    def known(self) -> int:
        """Channels of a latent that are no code."""
        return CAMERA + bool(self.views)

    def game_of(self, latents: Tensor) -> Tensor | None:
        """Which game latents (..., C, H, W) are of, int64 (...); None where there is but one."""
        return latents[..., -CAMERA - 1, 0, 0].round().long() if self.views else None

    def tiles(self, game: Tensor | None, axes: int = 0) -> float | Tensor:
        """How many tiles a picture shows: of one game a float, of games int64 (B,) float32 (B, 1, ...), `axes` ones."""
        if game is None:
            return float(self.view)
        view = sum(float(v) * (game == i) for i, v in enumerate(self.views))
        assert isinstance(view, Tensor)
        return view[(..., *[None] * axes)]

    def told(self, game: Tensor | None) -> list[Tensor]:
        """What networks are told of games (B,): one-hot float32 (B, games); nothing where there is but one."""
        return [] if game is None else [one_hot(game, len(self.views))]

    def shown(self, phase: Tensor, game: Tensor | None = None) -> Tensor:
        """Which share of each tile of the window the picture shows, phases (B, 2), games (B,) -> (B, 1, H, W)."""
        tile = torch.arange(self.window, device=phase.device, dtype=torch.float32)
        begin, view = 1 + phase[..., None].float(), self.tiles(game, 2)
        share = (torch.minimum(tile + 1, begin + view) - torch.maximum(tile, begin)).clamp(0, 1)
        return (share[:, 1, :, None] * share[:, 0, None, :])[:, None]

    def waves(self, phase: Tensor, game: Tensor | None = None) -> Tensor:
        """What of each tile's pattern the picture's pixels meet, as maps: phases (B, 2), games (B,) -> (B, 8, H, W).

        Where on the circle of one tile the camera is, and where on the circle of one pixel each tile's first pixel
        lies.
        """
        turn = 2 * math.pi * phase.float()
        tile = torch.arange(self.window, device=phase.device)
        first = (tile - 1 - phase.float()[..., None]) * (_PIXELS / self.tiles(game, 2)) - 0.5
        turns = 2 * math.pi * (first.ceil() - first)
        angles = (turn[:, :1, None], turn[:, 1:, None], turns[:, 0, None, :], turns[:, 1, :, None])
        maps = [f(angle).expand(-1, self.window, self.window) for angle in angles for f in (torch.cos, torch.sin)]
        return torch.stack(maps, 1)

    def pixels(self, phase: Tensor, game: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Phases (B,) along one axis -> each pixel's tile, one-hot (B, 64, window), and its place there, in [0, 1)."""
        scale = _PIXELS / self.tiles(game, 1)
        at = 1 + phase.float()[:, None] + (torch.arange(_PIXELS, device=phase.device) + 0.5) / scale
        return one_hot(at.floor(), self.window), at - at.floor()

    def cosines(self, phase: Tensor, orders: int, game: Tensor | None = None) -> Tensor:
        """Phases (B,) along one axis -> (B, 64, window * orders): each pixel's tile times cosines of its place."""
        tile, place = self.pixels(phase, game)
        cosines = (math.pi * torch.arange(orders, device=phase.device) * place[..., None]).cos()
        return (tile[..., None] * cosines[:, :, None]).flatten(2)


def phase_of(pose: Tensor) -> Tensor:
    """Poses (..., 2) in tiles -> phases in [0, 1), below 1 in half precision too."""
    return (pose - pose.floor()).clamp_max(0.9995)


def phases(latents: Tensor) -> Tensor:
    """The phases (..., 2) of latents (..., C, H, W)."""
    return latents[..., -4:-2, 0, 0].float()


def moves(latents: Tensor) -> Tensor:
    """The moves (..., 2) of latents (..., C, H, W)."""
    return latents[..., -2:, 0, 0].float()


def with_camera(codes: Tensor, phase: Tensor, move: Tensor, game: Tensor | None = None) -> Tensor:
    """Codes (..., c, H, W), phases and moves (..., 2), games (...) -> latents (..., c + 4 or c + 5, H, W)."""
    known = [phase, move] if game is None else [game[..., None].to(phase.dtype), phase, move]
    camera = torch.cat(known, -1).to(codes.dtype)[..., None, None]
    return torch.cat([codes, camera.expand(*camera.shape[:-2], *codes.shape[-2:])], -3)


def crossed(before: Tensor, move: Tensor, after: Tensor) -> Tensor:
    """By how many tiles the window moves on from phases `before` to phases `after`, both (..., 2): whole numbers."""
    return (before + move - after).round()


def exact_move(before: Tensor, after: Tensor) -> Tensor:
    """The move (B, 2) between two latents (B, C, H, W) in a row, to which their phases fit exactly."""
    return phases(after) - phases(before) + crossed(phases(before), moves(after), phases(after))


def arrived(clean: Tensor, target: Tensor) -> Tensor:
    """A prediction (n B, C, H, W) made with the true move, its camera's channels those of the target (B, C, H, W)."""
    camera = target[:, -CAMERA:].repeat(len(clean) // len(target), 1, 1, 1)
    return torch.cat([clean[:, :-CAMERA], camera.to(clean.dtype)], 1)


def one_hot(index: Tensor, size: int) -> Tensor:
    """Whole numbers (...) -> (..., size); a row of zeros where the index is outside."""
    return (index[..., None] == torch.arange(size, device=index.device)).float()


def pick(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Values (B, C, H, W), one-hot rows (B, P, H) and columns (B, Q, W) -> (B, P, C, Q)."""
    b, c, h, w = values.shape
    x = rows.to(values.dtype) @ values.transpose(1, 2).reshape(b, h, c * w)
    return (x.view(b, -1, w) @ columns.to(values.dtype).transpose(1, 2)).view(b, rows.shape[1], c, columns.shape[1])


def look_from(values: Tensor, by: Tensor, begin: int, size: int) -> Tensor:
    """Values (B, C, N, N) -> (B, C, size, size) from tile `begin` + `by` (B, 2) on; zeros outside."""
    with fp32(values):
        tile = torch.arange(begin, begin + size, device=values.device)
        columns, rows = (one_hot(tile + by[:, i, None], values.shape[-1]) for i in range(2))
        return pick(values.float(), rows, columns).transpose(1, 2)


def move_window(values: Tensor, by: Tensor) -> Tensor:
    """Values (B, C, H, W) seen from a window `by` (B, 2) tiles further right and down; zeros beyond."""
    return look_from(values, by, 0, values.shape[-1])


def overlap(x: int, y: int, window: int) -> tuple[slice, slice]:
    """Rows and columns of a window that another one, `x` tiles further right and `y` further down, has too."""
    return slice(max(y, 0), window + min(y, 0)), slice(max(x, 0), window + min(x, 0))


def window_steps(context: Tensor) -> Tensor:
    """By how many tiles the window moves on within a context (B, K, C, H, W), (B, K - 1, 2)."""
    phase = phases(context)
    return crossed(phase[:, :-1], moves(context)[:, 1:], phase[:, 1:])


def behind(context: Tensor) -> Tensor:
    """How many tiles the last window of a context (B, K, C, H, W) is ahead of each, (B, K, 2)."""
    steps = window_steps(context)
    return torch.cat([steps.flip(1).cumsum(1).flip(1), torch.zeros_like(steps[:, :1])], 1)
