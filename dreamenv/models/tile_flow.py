"""Dynamics of latents on the grid of tiles: where the camera goes, then what changes in the tiles that it shows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.actions import NOOP, NUM_ACTIONS
from dreamenv.config import check
from dreamenv.models.blocks import UNet, sinusoidal, zero_init
from dreamenv.models.latent_flow import alternating
from dreamenv.models.player import PlayerView, behind, place_in_tile, surroundings, window_steps
from dreamenv.models.registry import register_model
from dreamenv.models.tile import (
    CAMERA,
    crossed,
    fp32,
    move_window,
    moves,
    phases,
    recalled,
    remember,
    shown,
    waves,
    with_camera,
)

_ASIDE, _STRIDE, _NO_PATH = 0.003, 0.02, 0.03  # tiles: how slopes of paths are taken, how far a step may go, what is too far
_LAWS = 16  # linear laws of motion an axis
_WAVES = (4, 8, 16, 32, 64)  # waves a tile of the speed's finer features
_FINELY = (50, 10)  # units a tile in which the laws' answers are seen


@dataclass(frozen=True)
class TileFlowConfig:
    """Shape of the dynamics on tiles."""

    latent_channels: int = 28
    """C of the latents, the camera's four included."""
    context: int = 4
    """K past latents the model sees, with the K - 1 actions between them and the current one."""
    channels: tuple[int, ...] = (64, 96, 96)
    """Width per resolution level; each level halves the grid."""
    blocks: tuple[int, ...] = (1, 2, 1)
    """Residual blocks per level, on the way down and (but for the last level) up."""
    embedding: int = 128
    """Width of the conditioning vector."""
    motion: int = 160
    """Width of the network that predicts the camera's move."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(CAMERA < self.latent_channels <= 256, f"latent_channels {self.latent_channels}: must be {CAMERA + 1}..256")
        check(2 <= self.context <= 64, f"context {self.context}: must be 2..64")
        check(1 <= len(self.channels) <= 5, f"channels {self.channels}: must have 1..5 levels")
        check(len(self.blocks) == len(self.channels),
              f"blocks {self.blocks}: must have one entry per level, {len(self.channels)}")
        check(8 <= min(self.channels) and max(self.channels) <= 2048, f"channels {self.channels}: must be 8..2048 each")
        check(1 <= min(self.blocks) and max(self.blocks) <= 64, f"blocks {self.blocks}: must be 1..64 each")
        check(8 <= self.embedding <= 4096 and self.embedding % 4 == 0,
              f"embedding {self.embedding}: must be a multiple of 4 in 8..4096")
        check(8 <= self.motion <= 4096, f"motion {self.motion}: must be 8..4096")


class CameraMotion(PlayerView):
    """Predicts the camera's next move from the tiles around the player, the moves so far and the actions.

    A switching linear system: networks weigh a few linear laws of the last two moves, the place and the action, for each axis
    its own (mixture of experts, Jacobs et al. 1991). Running, falling and landing are each linear, and a law that is weighed
    alone is exact, where a network's answer is off by thousandths of a tile at every step, which add up. What weighs the laws
    sees to which moves they would lead, finely near rest: who would be slower than friction allows stands still.
    """

    def __init__(self, codes: int, context: int, width: int) -> None:
        super().__init__(codes, context, 48)
        features = self.seen + 4 * len(_WAVES) * min(context - 1, 2) + 2 * len(_FINELY) * _LAWS
        self.weigh = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                   nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2 * _LAWS))  # fmt: skip
        self.laws = zero_init(nn.Linear(2 * min(context - 1, 2) + 2 + NUM_ACTIONS + 1, 2 * _LAWS))

    def forward(self, recent: Tensor, place: Tensor, before: Tensor, actions: Tensor) -> Tensor:
        """Predict the next move (B, 2); see `PlayerView.see`."""
        taken = F.one_hot(actions[:, -1], NUM_ACTIONS + 1).float()
        with fp32(recent):  # what is lost here adds up twice, in speed and in place
            changes = self.laws(torch.cat([before[:, -2:].flatten(1), place, taken], 1)).unflatten(1, (2, _LAWS))
            answers = (before[:, -1, :, None] + changes).detach().flatten(1)
            turn = 2 * torch.pi * before[:, -2:].detach().flatten(1)  # as of the place
            fine = [f(n * turn) for n in _WAVES for f in (torch.cos, torch.sin)] + [(n * answers).tanh() for n in _FINELY]
            seen = torch.cat([self.see(recent, place, before, actions), *fine], 1)
            weights = self.weigh(seen).unflatten(1, (2, _LAWS)).softmax(2)
            return before[:, -1] + (weights * changes).sum(2)


def recall(context: Tensor, memory: Tensor | None = None, by: Tensor | None = None) -> Tensor:
    """What is remembered after a context (B, K, C, H, W), on top of a `memory` from before it.

    Args:
        context: past latents.
        memory: (B, c + 1, M, M), see `dreamenv.models.tile.remember`; None is a memory of nothing.
        by: (B, 2), by how many tiles the context's first window is ahead of that memory's; required with one.
    """
    steps = window_steps(context)
    for i, latent in enumerate(context.unbind(1)):
        step = by if i == 0 else steps[:, i - 1]
        memory = remember(memory, latent, torch.zeros_like(steps[:, 0]) if step is None else step)
    assert memory is not None
    return memory


@register_model("tile_flow", TileFlowConfig)
class TileFlow(UNet):
    """Like `LatentFlow`, for latents on the grid of tiles (`dreamenv.models.tile`).

    First the camera's next move is predicted. Then every past latent is seen from the window it leads to, where what stands
    still keeps its place and its code, and the U-Net says how far each tile changes from the latest code known of it, however
    long ago: a memory holds the tiles around, in or out of the picture.
    """

    learning_rates = {"motion.laws.weight": 10.0, "motion.laws.bias": 10.0}
    """Coefficients of laws are of the order of one, which AdamW would take thousands of steps to reach at a network's rate."""

    def __init__(self, config: TileFlowConfig) -> None:
        c, k, e = config.latent_channels - CAMERA, config.context, config.embedding
        super().__init__((k + 2) * c + k + 10, 2 * c + 1, config.channels, config.blocks, e)
        self.config = config
        self.action_embedding = nn.Embedding(NUM_ACTIONS + 1, e // 2)
        seen = (k + 2) * (e // 2) + c + 2 * k
        self.condition = nn.Sequential(nn.Linear(seen, 2 * e), nn.SiLU(), nn.Linear(2 * e, e), nn.SiLU())
        self.motion = CameraMotion(c, k, config.motion)

    def ahead(self, context: Tensor, actions: Tensor) -> Tensor:
        """The camera's next move (B, 2) in tiles, which is the player's: the game asks what it touches after that move."""
        return self.next_move(context, actions, phases(context)[:, -1], moves(context)[:, 1:])

    def beside(self, clean: Tensor) -> dict[str, Tensor]:
        """The move of `clean`, so that another prediction is of the same window."""
        return {"move": moves(clean)}

    def recall(self, context: Tensor) -> Tensor:
        """See the function `recall`: the memory (B, c + 1, M, M) of a context (B, K, C, H, W)."""
        return recall(context)

    def remember(self, memory: Tensor, last: Tensor, latent: Tensor) -> Tensor:
        """The memory (B, c + 1, M, M) one step on: that of up to `last`, and `latent`, the one after it (B, C, H, W)."""
        return remember(memory, latent, crossed(phases(last), moves(latent), phases(latent)))

    def guided(self, clean: Tensor, unaware: Tensor, scale: float) -> Tensor:
        """As for any flow, but the camera goes where `clean` says, for both are of that window."""
        codes = super().guided(clean, unaware, scale)[:, :-CAMERA]
        return torch.cat([codes, clean[:, -CAMERA:]], 1)

    def next_move(self, context: Tensor, actions: Tensor, phase: Tensor, before: Tensor) -> Tensor:
        """Predict the camera's next move (B, 2).

        Args:
            context: (B, K, C, H, W), past latents.
            actions: int64 (B, K).
            phase: (B, 2), the current phase; what the context says of it only serves to lay its windows over one another.
            before: (B, K - 1, 2), the moves between the pictures, likewise.
        """
        tile, place = place_in_tile(phase)
        return self.motion(surroundings(context, tile), place, before, actions)

    def settle(self, latents: Tensor, actions: Tensor) -> Tensor:
        """Latents of real pictures with the camera on the path of these dynamics that is nearest to where it was read.

        Each phase was read off one picture, so a move has the errors of two. Where the camera was in the first two pictures
        decides the path, and is found by least squares (Gauss-Newton, slopes by differences). If no path comes near, the
        player met something that these dynamics do not know, and the readings stay.

        Args:
            latents: float32 (B, T, C, H, W), T <= K, the first move zero; phases and moves are in tiles.
            actions: int64 (B, T - 1), the actions between them.

        Returns:
            The same codes with other phases and moves, float32 (B, T, C, H, W); fewer than three pictures as they are.
        """
        b, t = latents.shape[:2]
        if t < 3:
            return latents
        begin = torch.zeros(b, 4, device=latents.device)
        apart = self._apart(latents, actions, begin)
        aside = _ASIDE * torch.eye(4, device=latents.device)[:, None]
        for _ in range(2):
            nudged = self._apart(latents, actions, (begin + aside).flatten(0, 1)).unflatten(0, (4, b))
            slopes = ((nudged - apart).flatten(2) / _ASIDE).permute(1, 2, 0)
            normal = slopes.mT @ slopes + 1e-4 * torch.eye(4, device=latents.device)
            step = torch.linalg.solve(normal, slopes.mT @ apart.flatten(1)[..., None])[..., 0]
            tried = begin - step.clamp(-_STRIDE, _STRIDE)
            found = self._apart(latents, actions, tried)
            better = found.square().sum((1, 2)) < apart.square().sum((1, 2))
            begin, apart = torch.where(better[:, None], tried, begin), torch.where(better[:, None, None], found, apart)
        apart = apart * (apart.abs().amax((1, 2)) < _NO_PATH)[:, None, None]
        phase = (phases(latents) + apart).clamp(0, 1 - 1e-4)  # the windows stay
        moved = moves(latents) + F.pad(apart.diff(dim=1), (0, 0, 1, 0))
        settled = with_camera(latents[:, :, :-CAMERA].flatten(0, 1), phase.flatten(0, 1), moved.flatten(0, 1))
        return settled.unflatten(0, (b, t))

    def _apart(self, latents: Tensor, actions: Tensor, begin: Tensor) -> Tensor:
        """How far a path is from the readings, (n B, T, 2), if it is `begin` (n B, 4) from them in the first two pictures."""
        n, k = len(begin) // len(latents), self.config.context
        latents, actions = latents.repeat(n, 1, 1, 1, 1), actions.repeat(n, 1)
        phase, read = phases(latents), moves(latents)[:, 1:]
        apart = [begin[:, :2], begin[:, 2:]]
        before = [torch.zeros_like(apart[0])] * (k - 2) + [read[:, 0] + apart[1] - apart[0]]
        for now in range(1, latents.shape[1] - 1):
            missing = k - now - 1
            context = torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents[:, : now + 1]], 1)
            taken = F.pad(actions[:, : now + 1], (missing, 0), value=NOOP)
            move = self.next_move(context, taken, phase[:, now] + apart[-1], torch.stack(before[-(k - 1) :], 1))
            apart.append(apart[-1] + move - read[:, now])
            before.append(move)
        return torch.stack(apart, 1)

    def forward(self, noisy: Tensor | None, tau: Tensor, context: Tensor, actions: Tensor, context_noise: Tensor,
                move: Tensor | None = None, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Predict the next latent.

        Args:
            noisy: (B, C, H, W), the point at `tau` on the path from noise to the next latent, its camera ignored; None means
                tau = 0.
            tau: (B,) in [0, 1).
            context: (B, K, C, H, W), past latents, the current one last.
            actions: int64 (B, K), the K - 1 actions between them and the one taken now; `NULL_ACTION` is unknown.
            context_noise: (B,) standard deviation of the noise in the context's codes.
            move: (B, 2), the camera's move, if it is known: the codes are then those of the window it leads to. The camera's
                channels always hold the model's own prediction, so the phase may lie outside of [0, 1) then.
            memory: (B, c + 1, M, M), what is remembered up to the last latent; None is what the context holds.

        Returns:
            The clean latent (B, C, H, W), and the log of its expected squared error per tile (B, H, W).
        """
        b, k, c = context.shape[0], context.shape[1], context.shape[2] - CAMERA
        phase, before = phases(context), moves(context)[:, 1:]
        by = behind(context)
        seen = torch.cat([context[:, :, :c].float(), shown(phase.flatten(0, 1)).unflatten(0, (b, k))], 2)
        predicted = self.next_move(context, actions, phase[:, -1], before)
        taken = predicted if move is None else move
        at = phase[:, -1] + taken
        window = (at + 1e-6).floor().detach()  # a phase of 0 may come out a hair below it
        arrived = (at - window).clamp_min(0)
        view = shown(arrived)
        seen = move_window(seen.flatten(0, 1), (by + window[:, None]).flatten(0, 1)).unflatten(0, (b, k))
        codes, share = seen[:, :, :c], seen[:, :, c]
        base, known = recalled(recall(context) if memory is None else memory, window).split([c, 1], 1)
        half = self.config.embedding // 2
        gated = torch.zeros_like(base) if noisy is None else noisy[:, :c].float() * tau[:, None, None, None]
        scalars = [sinusoidal(tau, half), sinusoidal(context_noise, half), 4 * alternating(gated), before.flatten(1), taken]
        cond = self.condition(torch.cat([self.action_embedding(actions).flatten(1), *scalars], 1))
        maps = torch.cat([gated, base, codes.flatten(1, 2), share, view, waves(arrived), known], 1)
        out = self.out(self.features(maps.contiguous(memory_format=torch.channels_last), cond)).float()
        change = out[:, :c] * (out[:, c : 2 * c] + 1).sigmoid()
        clean = (base + change) * (view > 0)
        return with_camera(clean, phase[:, -1] + predicted - window, predicted), out[:, 2 * c]
