"""The tile autoencoder: frames of a scrolling world <-> codes on the level's own grid, see `models.tiles.grid`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dreamenv.config import check, check_games, to_dict
from dreamenv.errors import DatasetError
from dreamenv.models.blocks import ResBlock, fp32, group_norm
from dreamenv.models.interface import Codec, LatentSpec
from dreamenv.models.registry import register
from dreamenv.models.tiles.grid import Grid, move_window, moves, overlap, phase_of, phases, pick, with_camera

_REACH = 2  # tiles that the camera moves in one step, at most
_PIXELS = 64


@dataclass(frozen=True)
class TileAutoencoderConfig:
    """Shape of the tile autoencoder."""

    codes: int = 24
    """Channels of a tile's code; the latent has `Grid.known` more, for the camera and, of several games, the game."""
    width: int = 96
    """Channels of the networks on the grid of tiles."""
    blocks: int = 2
    """Residual blocks on each side."""
    orders: int = 8
    """Cosines each way that make up a tile's pattern."""
    grid: Grid = Grid()
    """How the game shows its grid; training takes it from the game's row."""
    games: tuple[str, ...] = ()
    """The games that it is told apart, none for a model of one; training takes them from the data."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        most = 256 - self.grid.known
        check(1 <= self.codes <= most, f"codes {self.codes}: must be 1..{most}")
        check(8 <= self.width <= 2048, f"width {self.width}: must be 8..2048")
        check(0 <= self.blocks <= 64, f"blocks {self.blocks}: must be 0..64")
        check(1 <= self.orders <= 32, f"orders {self.orders}: must be 1..32")
        check_games(self.games)
        check(len(self.games) == len(self.grid.views), f"games {self.games}: the grid is of {len(self.grid.views)}")


class _Grid(nn.Sequential):
    """A network on the grid of tiles."""

    def __init__(self, c_in: int, c_out: int, config: TileAutoencoderConfig) -> None:
        w = config.width
        super().__init__(
            nn.Conv2d(c_in, w, 3, padding=1),
            *[ResBlock(w, w) for _ in range(config.blocks)],
            group_norm(w),
            nn.SiLU(),
            nn.Conv2d(w, c_out, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, c_in, H, W) -> float32 (B, c_out, H, W).

        Only the residual blocks run in bf16 under an autocast: they add to what is not rounded, which keeps the picture
        70 dB from that of fp32, where all of it in bf16 would be at 55.
        """
        layers = list(self)
        with fp32(x):
            x = layers[0](x.float())
        for block in layers[1:-3]:
            x = block(x)
        with fp32(x):
            return layers[-1](layers[-2](layers[-3](x.float())))


class PhaseReader(nn.Module):
    """Reads the camera's phase off a picture: local features, Fourier coefficients at the tiles' frequency, an MLP."""

    def __init__(self, features: int = 48, orders: int = 4, width: int = 128) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 24, 5, padding=2),
            nn.SiLU(),
            nn.Conv2d(24, features, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(features, features, 3, padding=1),
            nn.SiLU(),
        )
        self.orders = orders
        self.answer = nn.Sequential(
            nn.LayerNorm(4 * orders * features),
            nn.Linear(4 * orders * features, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 4),
        )

    def forward(self, images: Tensor, tiles: float | Tensor) -> Tensor:
        """Images (B, 3, 64, 64) in [0, 1] -> (B, 4); `tiles`, see `Grid.tiles`, is a number or (B, 1, 1).

        Cosines of 2 pi times the phases x and y, then sines.
        """
        with fp32(images):
            return self._read(images, tiles)

    def _read(self, images: Tensor, tiles: float | Tensor) -> Tensor:
        f = self.features(images - 0.5)
        place = (2 * torch.arange(32, device=f.device) + 0.5)[:, None] / (_PIXELS / tiles)
        angle = 2 * math.pi * place * torch.arange(1, self.orders + 1, device=f.device)
        basis = torch.cat([angle.cos(), angle.sin()], -1)
        across = f.mean(2) @ basis
        down = f.mean(3) @ basis
        return self.answer(torch.cat([across, down], 2).flatten(1))


@register("codec", "tile_autoencoder", TileAutoencoderConfig)
class TileAutoencoder(Codec):
    """Autoencoder of 64 x 64 RGB frames of a scrolling world of tiles.

    `encode` and `decode` work on float images (B, 3, 64, 64) in [0, 1] and latents (B, codes + 4, H, W), of several
    games codes + 5, see `dreamenv.models.tiles.grid`. A pixel's colour is a function of its tile's features and of its
    place in the tile, as in implicit decoders (LIIF, Chen et al. 2021), so that one code serves every phase of the
    camera. The function is a sum of cosines.
    """

    columns = ("camera",)
    autocast = True

    def __init__(self, config: TileAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        patterns = 3 * config.orders**2
        self.tiles_in = _Grid(patterns + 9, config.codes, config)
        self.tiles_out = _Grid(config.codes + 9, patterns, config)
        self.reader = PhaseReader()

    @property
    def spec(self) -> LatentSpec:
        """(codes + `Grid.known`, window, window), tiles of the level."""
        window, known = self.config.grid.window, self.config.grid.known
        return LatentSpec((self.config.codes + known, window, window), "tiles", known)

    def shared(self) -> dict[str, Any]:
        """See `Codec.shared`: the grid too."""
        return super().shared() | {"grid": to_dict(self.config.grid)}

    def read_phase(self, images: Tensor, game: Tensor | None = None) -> Tensor:
        """Images (B, 3, 64, 64) in [0, 1], of games (B,) -> phases (B, 2)."""
        x, y, sx, sy = self.reader(images, self.config.grid.tiles(game, 2)).float().unbind(1)
        return phase_of(torch.stack([torch.atan2(sx, x), torch.atan2(sy, y)], 1) / (2 * math.pi))

    def encode(self, images: Tensor, **columns: Tensor) -> Tensor:
        """Images (B, 3, 64, 64) in [0, 1] -> latents (B, C, H, W) with a move of zero.

        The phase is that of the column `camera` (B, 2), in tiles; without it, it is read off the picture. A codec of
        several games also wants `game`, int64 (B,); raises `ConfigError` without it, or with it where there is but one.
        """
        camera, game = columns.get("camera"), columns.get("game")
        told, known = game is not None, ", ".join(self.games)
        check(told or not known, f"game: this codec is of {known}; say which of them the images are of")
        check(not told or bool(known), "game: this codec is of one game; leave it out")
        return self.encode_at(images, self.read_phase(images, game) if camera is None else phase_of(camera), game)

    def encode_at(self, images: Tensor, phase: Tensor, game: Tensor | None = None) -> Tensor:
        """`encode` with known phases (B, 2), of games int64 (B,)."""
        n, b, grid = self.config.orders, len(images), self.config.grid
        w = grid.window
        columns, rows = (grid.cosines(phase[:, axis], n, game) for axis in range(2))
        with fp32(images):
            down = rows.transpose(1, 2) @ (images - 0.5).movedim(1, 2).reshape(b, _PIXELS, 3 * _PIXELS)
            tiles = (down.view(b, w * n * 3, _PIXELS) @ columns).view(b, w, n, 3, w, n)
            tiles = tiles / (_PIXELS / grid.tiles(game, 5))
        tiles = tiles.permute(0, 2, 3, 5, 1, 4).reshape(b, 3 * n * n, w, w)
        share = grid.shown(phase, game)
        codes = self.tiles_in(torch.cat([tiles, share.to(tiles.dtype), grid.waves(phase, game).to(tiles.dtype)], 1))
        codes = codes.float() * (share > 0)
        return with_camera(codes, phase.float(), torch.zeros_like(phase, dtype=torch.float32), game)

    def decode(self, latents: Tensor, **kept: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> images (B, 3, 64, 64), about [0, 1] and not clamped."""
        phase, codes = phases(latents), latents[:, : self.config.codes]
        n, b, grid = self.config.orders, len(latents), self.config.grid
        w, game = grid.window, grid.game_of(latents)
        columns, rows = (grid.cosines(phase[:, axis], n, game) for axis in range(2))
        maps = torch.cat([codes, grid.shown(phase, game).to(codes.dtype), grid.waves(phase, game).to(codes.dtype)], 1)
        tiles = self.tiles_out(maps).view(b, n, 3, n, w, w).permute(0, 4, 1, 2, 5, 3)
        with fp32(tiles):
            down = rows @ tiles.reshape(b, w * n, 3 * w * n)
            images = down.view(b, _PIXELS * 3, w * n) @ columns.transpose(1, 2)
        return images.view(b, _PIXELS, 3, _PIXELS).transpose(1, 2) + 0.5

    def sequence(self, latents: Tensor, first: Tensor | None = None, **columns: Tensor) -> Tensor:
        """Latents (B, T, C, H, W) of pictures in a row with their moves, that of an episode's first one zero.

        With the column `camera` (B, T, 2) they are its differences; without it they are found by `_track`.
        """
        out = latents.clone()
        camera = columns.get("camera")
        if camera is None:
            move = self._track(latents)
        else:
            move = torch.diff(camera, dim=1, prepend=camera[:, :1])
            if first is not None:
                move = torch.where(first[..., None], torch.zeros_like(move), move)
        out[:, :, -2:] = move.to(out.dtype)[..., None, None]
        return out

    def _track(self, latents: Tensor) -> Tensor:
        """The moves (B, T, 2) between pictures, of latents (B, T, C, H, W), that of the first one zero.

        The window's shift is the one of at most two tiles each way under which the codes agree best. The cost of a tile
        is the logarithm of its squared difference, so that a few tiles in which something moves do not outvote the
        rest.
        """
        b, t, c, grid = len(latents), latents.shape[1], self.config.codes, self.config.grid
        phase = phases(latents)
        if t == 1:
            return torch.zeros_like(phase)
        whole = grid.shown(phase.flatten(0, 1), grid.game_of(latents.flatten(0, 1)))[:, 0] > 0.99
        whole = whole.unflatten(0, (b, t)).float()
        between = phase[:, 1:] - phase[:, :-1]
        reach = range(-_REACH, _REACH + 1)
        best, found = torch.full((b, t - 1), torch.inf, device=latents.device), torch.zeros_like(between)
        for x, y in itertools.product(reach, reach):
            then, now = (..., *overlap(x, y, grid.window)), (..., *overlap(-x, -y, grid.window))
            difference = (latents[:, :-1, :c][then] - latents[:, 1:, :c][now]).float().square().mean(2)
            both = whole[:, :-1][then] * whole[:, 1:][now]
            cost = ((difference + 1e-3).log() * both).sum((2, 3)) / both.sum((2, 3)).clamp_min(1)
            shift = torch.tensor([x, y], device=latents.device)
            better = (cost < best) & ((between + shift).abs().amax(2) <= _REACH)
            best = torch.where(better, cost, best)
            found = torch.where(better[..., None], shift.to(found.dtype), found)
        return torch.cat([torch.zeros_like(phase[:, :1]), between + found], 1)

    def hold(self, latents: Tensor, repeated: Tensor) -> Tensor:
        """The camera rests where a picture repeats the one before; latents (B, T, C, H, W), bool (B, T)."""
        latents[:, :, -2:] *= ~repeated[:, :, None, None, None]
        return latents

    def noised(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Latents (..., C, H, W) with noise on the codes, not on the camera."""
        known = self.config.grid.known
        return latents + torch.cat([noise[..., :-known, :, :], torch.zeros_like(noise[..., -known:, :, :])], -3)

    def visible(self, latents: Tensor) -> Tensor:
        """Which share of each tile the picture of latents (B, C, H, W) shows, (B, H, W)."""
        return self.config.grid.shown(phases(latents), self.config.grid.game_of(latents))[:, 0]

    def path_errors(self, dream: Tensor, real: Tensor) -> dict[str, Tensor]:
        """How far the camera is from the true one after each step, in tiles."""
        return {"camera": (moves(dream).cumsum(1) - moves(real).cumsum(1)).norm(dim=2).mean(0)}

    def check_columns(self, columns: Mapping[str, np.ndarray], where: str) -> None:
        """Raise `DatasetError` if some step's camera position is not known."""
        if not np.isfinite(columns["camera"]).all():
            raise DatasetError(
                f"{where}: has steps without a camera position, which a tile autoencoder needs; collect a game that "
                "scrolls, or train another autoencoder"
            )

    def spread_out(self, values: Tensor, phase: Tensor, game: Tensor | None = None) -> Tensor:
        """Values of tiles (B, 1, 16, 16) -> of the picture's pixels (B, 64, 64)."""
        (columns, _), (rows, _) = (self.config.grid.pixels(phase[:, axis], game) for axis in range(2))
        return pick(values, rows, columns)[:, :, 0]

    def pool(self, values: Tensor, latents: Tensor) -> Tensor:
        """Means over each tile of a picture's values (B, 64, 64) -> (B, 16, 16), 0 where nothing of it is shown."""
        phase, grid = phases(latents), self.config.grid
        (columns, _), (rows, _) = (grid.pixels(phase[:, axis], grid.game_of(latents)) for axis in range(2))
        ones = rows.sum(1)[:, :, None] * columns.sum(1)[:, None]
        return (rows.transpose(1, 2) @ values @ columns) / ones.clamp_min(1)

    def forward(
        self,
        images: Tensor,
        phase: Tensor,
        earlier: Tensor,
        earlier_phase: Tensor,
        by: Tensor,
        noise: Tensor,
        game: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What training needs of two pictures of one episode.

        Args:
            images: (B, 3, 64, 64) in [0, 1].
            phase: (B, 2).
            earlier: (B, 3, 64, 64), the earlier pictures.
            earlier_phase: (B, 2), their phases.
            by: (B, 2), how many tiles the window moved from the earlier picture to the later one.
            noise: (2 B, codes, H, W), added to the codes before decoding.
            game: int64 (B,), where several are told apart.

        Returns:
            The reconstruction; the picture decoded from the earlier one's codes; the codes; the earlier one's, moved to
            the same window, with the share of each tile that it showed as one more channel; and the phase reader's
            answers (B, 4).
        """
        c = self.config.codes
        both, both_phases = torch.cat([images, earlier]), torch.cat([phase, earlier_phase])
        twice = None if game is None else torch.cat([game, game])
        own, before = self.encode_at(both, both_phases, twice)[:, :c].chunk(2)
        carried = move_window(torch.cat([before, self.config.grid.shown(earlier_phase, game)], 1), by)
        codes = torch.cat([own, carried[:, :c]]) + noise
        still = torch.zeros_like(both_phases)
        reconstruction, later = self.decode(with_camera(codes, torch.cat([phase, phase]), still, twice)).chunk(2)
        return reconstruction, later, own, carried, self.reader(images, self.config.grid.tiles(game, 2))
