"""Latents on the level's own grid of tiles, for worlds that scroll: what stands still keeps its code when the camera moves.

A picture shows `VIEW` tiles each way, `SCALE` pixels each. A latent is a window of `WINDOW` tiles that begins one tile before
the one in the picture's top left corner. Its first channels are codes, one vector a tile; the last `CAMERA` are constant over
the window: the phase (how far the picture cuts into its first tile, x and y, in tiles) and the move since the picture before
(x and y, in tiles, right and down). Why: docs/experiments.md, run 32.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.config import check
from dreamenv.models.blocks import ResBlock, group_norm
from dreamenv.models.registry import register_model

VIEW = 13
"""Tiles that a picture shows each way."""
WINDOW = 16
"""Tiles of a latent each way."""
SCALE = 64 / VIEW
"""Pixels of a tile."""
CAMERA = 4
"""Channels that hold phase and move."""
MEMORY = 32
"""Tiles each way of what is remembered of the level, the latent's window in its middle."""
_REACH = 2  # tiles that the camera moves in one step, at most
_MARGIN = (MEMORY - WINDOW) // 2


def phase_of(pose: Tensor) -> Tensor:
    """Poses (..., 2) in tiles -> phases in [0, 1), below 1 in half precision too."""
    return (pose - pose.floor()).clamp_max(0.9995)


def phases(latents: Tensor) -> Tensor:
    """The phases (..., 2) of latents (..., C, H, W)."""
    return latents[..., -4:-2, 0, 0].float()


def moves(latents: Tensor) -> Tensor:
    """The moves (..., 2) of latents (..., C, H, W)."""
    return latents[..., -2:, 0, 0].float()


def with_camera(codes: Tensor, phase: Tensor, move: Tensor) -> Tensor:
    """Codes (..., c, H, W), phases and moves (..., 2) -> latents (..., c + 4, H, W)."""
    camera = torch.cat([phase, move], -1).to(codes.dtype)[..., None, None]
    return torch.cat([codes, camera.expand(*camera.shape[:-2], *codes.shape[-2:])], -3)


def crossed(before: Tensor, move: Tensor, after: Tensor) -> Tensor:
    """By how many tiles the window moves on from phases `before` to phases `after`, both (..., 2): whole numbers."""
    return (before + move - after).round()


def exact_move(before: Tensor, after: Tensor) -> Tensor:
    """The move (B, 2) between two latents (B, C, H, W) in a row, to which their phases fit exactly."""
    return phases(after) - phases(before) + crossed(phases(before), moves(after), phases(after))


def arrived(clean: Tensor, target: Tensor) -> Tensor:
    """A prediction (n B, C, H, W) that was made with the true move, its camera's channels those of the target (B, C, H, W)."""
    times = len(clean) // len(target)
    return with_camera(clean[:, :-CAMERA], phases(target).repeat(times, 1), moves(target).repeat(times, 1))


def shown(phase: Tensor) -> Tensor:
    """Which share of each tile of the window the picture shows, (B, 2) -> (B, 1, H, W)."""
    tile = torch.arange(WINDOW, device=phase.device, dtype=torch.float32)
    begin = 1 + phase[..., None].float()
    share = (torch.minimum(tile + 1, begin + VIEW) - torch.maximum(tile, begin)).clamp(0, 1)
    return (share[:, 1, :, None] * share[:, 0, None, :])[:, None]


def _one_hot(index: Tensor, size: int = WINDOW) -> Tensor:
    """Whole numbers (...) -> (..., size); a row of zeros where the index is outside."""
    return (index[..., None] == torch.arange(size, device=index.device)).float()


def pick(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Values (B, C, H, W), one-hot rows (B, P, H) and columns (B, Q, W) -> (B, P, C, Q)."""
    b, c, h, w = values.shape
    x = rows.to(values.dtype) @ values.transpose(1, 2).reshape(b, h, c * w)
    return (x.view(b, -1, w) @ columns.to(values.dtype).transpose(1, 2)).view(b, rows.shape[1], c, columns.shape[1])


def move_window(values: Tensor, by: Tensor) -> Tensor:
    """Values (B, C, H, W) seen from a window `by` (B, 2) tiles further right and down; zeros where nothing was known."""
    return _view(values, by, 0, WINDOW)


def fp32(x: Tensor) -> torch.autocast:
    """A context without autocast on the device of `x`, of any shape: what is inside keeps its dtype."""
    return torch.autocast(x.device.type, enabled=False)


def _view(values: Tensor, by: Tensor, begin: int, size: int) -> Tensor:
    """Values (B, C, N, N) -> (B, C, size, size) from tile `begin` + `by` (B, 2) on; zeros outside."""
    with fp32(values):
        tile = torch.arange(begin, begin + size, device=values.device)
        columns, rows = (_one_hot(tile + by[:, i, None], values.shape[-1]) for i in range(2))
        return pick(values.float(), rows, columns).transpose(1, 2)


def recalled(memory: Tensor, by: Tensor) -> Tensor:
    """What a memory (B, c + 1, M, M) knows of the window `by` (B, 2) tiles further right and down, (B, c + 1, H, W).

    The last channel says which share of a tile its codes were seen from, 0 where nothing is known.
    """
    return _view(memory, by, _MARGIN, WINDOW)


def remember(memory: Tensor | None, latent: Tensor, by: Tensor) -> Tensor:
    """The memory (B, c + 1, M, M) after a latent (B, C, H, W) whose window is `by` (B, 2) tiles further right and down.

    A tile is replaced where the latent shows at least as much of it. None is a memory of nothing.
    """
    share = shown(phases(latent))
    fresh = torch.cat([latent[:, :-CAMERA].float(), share], 1)
    if memory is None:
        return F.pad(fresh, (_MARGIN,) * 4)
    out = _view(memory, by, 0, MEMORY).contiguous()
    inner = (..., slice(_MARGIN, -_MARGIN), slice(_MARGIN, -_MARGIN))
    known = out[inner]
    out[inner] = torch.where((share > 0) & (share + 0.01 >= known[:, -1:]), fresh, known)
    return out


def _overlap(x: int, y: int) -> tuple[slice, slice]:
    """Rows and columns of a window that another one, `x` tiles further right and `y` further down, has too."""
    return slice(max(y, 0), WINDOW + min(y, 0)), slice(max(x, 0), WINDOW + min(x, 0))


def waves(phase: Tensor) -> Tensor:
    """What of each tile's pattern the picture's pixels meet, as maps: phases (B, 2) -> (B, 8, H, W).

    Where on the circle of one tile the camera is, and where on the circle of one pixel each tile's first pixel lies.
    """
    turn = 2 * math.pi * phase.float()
    first = (torch.arange(WINDOW, device=phase.device) - 1 - phase.float()[..., None]) * SCALE - 0.5
    turns = 2 * math.pi * (first.ceil() - first)
    angles = (turn[:, :1, None], turn[:, 1:, None], turns[:, 0, None, :], turns[:, 1, :, None])
    maps = [f(angle).expand(-1, WINDOW, WINDOW) for angle in angles for f in (torch.cos, torch.sin)]
    return torch.stack(maps, 1)


def _pixels(phase: Tensor) -> tuple[Tensor, Tensor]:
    """Phases (B,) along one axis -> each pixel's tile, one-hot (B, 64, WINDOW), and its place there, in [0, 1)."""
    at = 1 + phase.float()[:, None] + (torch.arange(64, device=phase.device) + 0.5) / SCALE
    return _one_hot(at.floor()), at - at.floor()


def _cosines(phase: Tensor, orders: int) -> Tensor:
    """Phases (B,) along one axis -> (B, 64, WINDOW * orders): each pixel's tile times cosines of its place there."""
    tile, place = _pixels(phase)
    cosines = (math.pi * torch.arange(orders, device=phase.device) * place[..., None]).cos()
    return (tile[..., None] * cosines[:, :, None]).flatten(2)


@dataclass(frozen=True)
class TileAutoencoderConfig:
    """Shape of the tile autoencoder."""

    codes: int = 24
    """Channels of a tile's code; the latent has 4 more for the camera."""
    width: int = 96
    """Channels of the networks on the grid of tiles."""
    blocks: int = 2
    """Residual blocks on each side."""
    orders: int = 8
    """Cosines each way that make up a tile's pattern."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(1 <= self.codes <= 252, f"codes {self.codes}: must be 1..252")
        check(8 <= self.width <= 2048, f"width {self.width}: must be 8..2048")
        check(0 <= self.blocks <= 64, f"blocks {self.blocks}: must be 0..64")
        check(1 <= self.orders <= 32, f"orders {self.orders}: must be 1..32")


class _Grid(nn.Sequential):
    """A network on the grid of tiles."""

    def __init__(self, c_in: int, c_out: int, config: TileAutoencoderConfig) -> None:
        w = config.width
        super().__init__(nn.Conv2d(c_in, w, 3, padding=1), *[ResBlock(w, w) for _ in range(config.blocks)],
                         group_norm(w), nn.SiLU(), nn.Conv2d(w, c_out, 1))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, c_in, H, W) -> float32 (B, c_out, H, W).

        Only the residual blocks run in bf16 under an autocast: they add to what is not rounded (70 dB from fp32, all of it 55).
        """
        layers = list(self)
        with fp32(x):
            x = layers[0](x.float())
        for block in layers[1:-3]:
            x = block(x)
        with fp32(x):
            return layers[-1](layers[-2](layers[-3](x.float())))


class PhaseReader(nn.Module):
    """Reads the camera's phase off a picture: local features, their Fourier coefficients at the tiles' frequency, an MLP."""

    def __init__(self, features: int = 48, orders: int = 4, width: int = 128) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 24, 5, padding=2), nn.SiLU(),
                                      nn.Conv2d(24, features, 3, stride=2, padding=1), nn.SiLU(),
                                      nn.Conv2d(features, features, 3, padding=1), nn.SiLU())  # fmt: skip
        self.orders = orders
        self.answer = nn.Sequential(nn.LayerNorm(4 * orders * features), nn.Linear(4 * orders * features, width), nn.SiLU(),
                                    nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 4))  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, 64, 64) in [0, 1] -> (B, 4): cosines of 2 pi times the phases x and y, then sines; any length."""
        with fp32(images):
            return self._read(images)

    def _read(self, images: Tensor) -> Tensor:
        f = self.features(images - 0.5)
        place = (2 * torch.arange(32, device=f.device) + 0.5) / SCALE
        angle = 2 * math.pi * place[:, None] * torch.arange(1, self.orders + 1, device=f.device)
        basis = torch.cat([angle.cos(), angle.sin()], 1)
        across = f.mean(2) @ basis
        down = f.mean(3) @ basis
        return self.answer(torch.cat([across, down], 2).flatten(1))


@register_model("tile_autoencoder", TileAutoencoderConfig)
class TileAutoencoder(nn.Module):
    """Autoencoder of 64 x 64 RGB frames of a scrolling world of tiles, seen `VIEW` tiles wide.

    `encode` and `decode` work on float images (B, 3, 64, 64) in [0, 1] and latents (B, codes + 4, 16, 16), see the module. A
    pixel's colour is a function of its tile's features and of its place in the tile, as in implicit decoders (LIIF, Chen et al.
    2021), so that one code serves every phase of the camera. The function is a sum of cosines.
    """

    camera_channels = CAMERA

    def __init__(self, config: TileAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        patterns = 3 * config.orders**2
        self.tiles_in = _Grid(patterns + 9, config.codes, config)
        self.tiles_out = _Grid(config.codes + 9, patterns, config)
        self.reader = PhaseReader()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        return self.config.codes + CAMERA, WINDOW, WINDOW

    def read_phase(self, images: Tensor) -> Tensor:
        """Images (B, 3, 64, 64) in [0, 1] -> phases (B, 2)."""
        x, y, sx, sy = self.reader(images).float().unbind(1)
        return phase_of(torch.stack([torch.atan2(sx, x), torch.atan2(sy, y)], 1) / (2 * math.pi))

    def encode(self, images: Tensor, phase: Tensor | None = None) -> Tensor:
        """Images (B, 3, 64, 64) in [0, 1] -> latents (B, C, 16, 16) with a move of zero; without `phase` (B, 2) it is read."""
        phase = self.read_phase(images) if phase is None else phase
        n, b = self.config.orders, len(images)
        columns, rows = _cosines(phase[:, 0], n), _cosines(phase[:, 1], n)
        with fp32(images):
            down = rows.transpose(1, 2) @ (images - 0.5).movedim(1, 2).reshape(b, 64, 192)
            tiles = (down.view(b, WINDOW * n * 3, 64) @ columns).view(b, WINDOW, n, 3, WINDOW, n) / SCALE
        tiles = tiles.permute(0, 2, 3, 5, 1, 4).reshape(b, 3 * n * n, WINDOW, WINDOW)
        share = shown(phase)
        codes = self.tiles_in(torch.cat([tiles, share.to(tiles.dtype), waves(phase).to(tiles.dtype)], 1))
        codes = codes.float() * (share > 0)
        return with_camera(codes, phase.float(), torch.zeros_like(phase, dtype=torch.float32))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, 16, 16) -> images (B, 3, 64, 64), about [0, 1] and not clamped."""
        phase, codes = phases(latents), latents[:, : self.config.codes]
        n, b = self.config.orders, len(latents)
        columns, rows = _cosines(phase[:, 0], n), _cosines(phase[:, 1], n)
        maps = torch.cat([codes, shown(phase).to(codes.dtype), waves(phase).to(codes.dtype)], 1)
        tiles = self.tiles_out(maps).view(b, n, 3, n, WINDOW, WINDOW).permute(0, 4, 1, 2, 5, 3)
        with fp32(tiles):
            down = rows @ tiles.reshape(b, WINDOW * n, 3 * WINDOW * n)
            images = down.view(b, 64 * 3, WINDOW * n) @ columns.transpose(1, 2)
        return images.view(b, 64, 3, 64).transpose(1, 2) + 0.5

    def track(self, latents: Tensor) -> Tensor:
        """Latents (B, T, C, H, W) of pictures in a row, with their moves filled in, that of the first one zero.

        The window's shift is the one of at most two tiles each way under which the codes agree best. The cost of a tile is the
        logarithm of its squared difference, so that a few tiles in which something moves do not outvote the rest.
        """
        out = latents.clone()
        out[:, :, -2:] = 0
        b, t, c = len(latents), latents.shape[1], self.config.codes
        if t == 1:
            return out
        phase = phases(latents)
        whole = (shown(phase.flatten(0, 1))[:, 0] > 0.99).unflatten(0, (b, t)).float()
        between = phase[:, 1:] - phase[:, :-1]
        reach = range(-_REACH, _REACH + 1)
        best, found = torch.full((b, t - 1), torch.inf, device=latents.device), torch.zeros_like(between)
        for x, y in itertools.product(reach, reach):
            then, now = (..., *_overlap(x, y)), (..., *_overlap(-x, -y))
            difference = (latents[:, :-1, :c][then] - latents[:, 1:, :c][now]).float().square().mean(2)
            both = whole[:, :-1][then] * whole[:, 1:][now]
            cost = ((difference + 1e-3).log() * both).sum((2, 3)) / both.sum((2, 3)).clamp_min(1)
            shift = torch.tensor([x, y], device=latents.device)
            better = (cost < best) & ((between + shift).abs().amax(2) <= _REACH)
            best = torch.where(better, cost, best)
            found = torch.where(better[..., None], shift.to(found.dtype), found)
        out[:, 1:, -2:] = (between + found).to(out.dtype)[..., None, None]
        return out

    def spread_out(self, values: Tensor, phase: Tensor) -> Tensor:
        """Values of tiles (B, 1, 16, 16) -> of the picture's pixels (B, 64, 64)."""
        (columns, _), (rows, _) = _pixels(phase[:, 0]), _pixels(phase[:, 1])
        return pick(values, rows, columns)[:, :, 0]

    def pool(self, values: Tensor, latents: Tensor) -> Tensor:
        """Means over each tile of a picture's values (B, 64, 64) -> (B, 16, 16), 0 where nothing of it is shown."""
        phase = phases(latents)
        (columns, _), (rows, _) = _pixels(phase[:, 0]), _pixels(phase[:, 1])
        ones = rows.sum(1)[:, :, None] * columns.sum(1)[:, None]
        return (rows.transpose(1, 2) @ values @ columns) / ones.clamp_min(1)

    def forward(self, images: Tensor, phase: Tensor, earlier: Tensor, earlier_phase: Tensor, by: Tensor,
                noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """What training needs of two pictures of one episode.

        Args:
            images: (B, 3, 64, 64) in [0, 1].
            phase: (B, 2).
            earlier: (B, 3, 64, 64), the earlier pictures.
            earlier_phase: (B, 2), their phases.
            by: (B, 2), how many tiles the window moved from the earlier picture to the later one.
            noise: (2 B, codes, H, W), added to the codes before decoding.

        Returns:
            The reconstruction; the picture decoded from the earlier one's codes; the codes; the earlier one's, moved to the
            same window, with the share of each tile that it showed as one more channel; and the phase reader's answers (B, 4).
        """
        c = self.config.codes
        both, both_phases = torch.cat([images, earlier]), torch.cat([phase, earlier_phase])
        own, before = self.encode(both, both_phases)[:, :c].chunk(2)
        carried = move_window(torch.cat([before, shown(earlier_phase)], 1), by)
        codes = torch.cat([own, carried[:, :c]]) + noise
        still = torch.zeros_like(both_phases)
        reconstruction, later = self.decode(with_camera(codes, torch.cat([phase, phase]), still)).chunk(2)
        return reconstruction, later, own, carried, self.reader(images)
