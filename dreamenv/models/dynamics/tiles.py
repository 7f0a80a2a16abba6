"""Dynamics of latents on the grid of tiles: where the camera goes, then what changes in the tiles that it shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.config import check, check_games
from dreamenv.contract.actions import NOOP
from dreamenv.models.blocks import alternating, sinusoidal, zero_init
from dreamenv.models.interface import NULL_ACTION, Backbone, Dynamics, LatentSpec, Prediction, State
from dreamenv.models.registry import build, register
from dreamenv.models.tiles.camera import CameraMotion
from dreamenv.models.tiles.canvas import recall, recalled, remember
from dreamenv.models.tiles.grid import (
    CAMERA,
    Grid,
    arrived,
    behind,
    crossed,
    exact_move,
    move_window,
    moves,
    phases,
    with_camera,
)
from dreamenv.models.tiles.path import nearest_path
from dreamenv.models.tiles.player import place_in_tile, surroundings


@dataclass(frozen=True)
class TileFlowConfig:
    """Shape of the dynamics on tiles."""

    latent: LatentSpec = LatentSpec((28, 16, 16), "tiles", CAMERA)
    """What the latents are, the known channels included; training takes it from the codec."""
    grid: Grid = Grid()
    """How the game shows its grid; training takes it from the codec."""
    context: int = 4
    """K past latents the model sees, with the K - 1 actions between them and the current one."""
    backbone: dict[str, Any] = field(
        default_factory=lambda: {"type": "unet", "channels": [64, 96, 96], "blocks": [1, 2, 1]}
    )
    """The network that mixes cells, see `dreamenv.models.backbones`."""
    embedding: int = 128
    """Width of the conditioning vector."""
    motion: int = 160
    """Width of the network that predicts the camera's move."""
    games: tuple[str, ...] = ()
    """The games that it is told apart, none for a model of one; training takes them from the data."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        window, known = self.grid.window, self.grid.known
        sound = self.latent.layout == "tiles" and self.latent.known == known
        check(sound, f"latent {self.latent}: must be of layout 'tiles', {known} channels of it known")
        check(
            self.latent.shape[0] > known and self.latent.shape[1:] == (window, window),
            f"latent.shape {self.latent.shape}: must be more than {known} channels of {window} x {window} tiles",
        )
        check_games(self.games)
        check(len(self.games) == len(self.grid.views), f"games {self.games}: the grid is of {len(self.grid.views)}")
        check(2 <= self.context <= 64, f"context {self.context}: must be 2..64")
        check(
            8 <= self.embedding <= 4096 and self.embedding % 4 == 0,
            f"embedding {self.embedding}: must be a multiple of 4 in 8..4096",
        )
        check(8 <= self.motion <= 4096, f"motion {self.motion}: must be 8..4096")


@register("dynamics", "tile_flow", TileFlowConfig)
class TileFlow(Dynamics):
    """A latent flow on the grid of tiles (`dreamenv.models.tiles`).

    First the camera's next move is predicted. Then every past latent is seen from the window it leads to, where what
    stands still keeps its place and its code, and the backbone says how far each tile changes from the latest code
    known of it,
    however long ago: the state's `canvas` holds the tiles around, in or out of the picture. The hint is that move, (B,
    2).
    """

    remembers = True
    precise = ("motion.",)
    learning_rates = {"motion.laws.weight": 10.0, "motion.laws.bias": 10.0}
    """Coefficients of laws are of the order of one, which AdamW would take thousands of steps to reach at a network's
    rate."""

    def __init__(self, config: TileFlowConfig) -> None:
        super().__init__()
        c, k, e, games = config.latent.shape[0] - config.grid.known, config.context, config.embedding, len(config.games)
        self.config = config
        self.backbone: Backbone = build("backbone", config.backbone, (k + 2) * c + k + 10, e, where="backbone")
        self.out = zero_init(nn.Conv2d(self.backbone.width, 2 * c + 1, 3, padding=1))
        self.action_embedding = nn.Embedding(NULL_ACTION + 1, e // 2)
        seen = (k + 2) * (e // 2) + c + 2 * k + games
        self.condition = nn.Sequential(nn.Linear(seen, 2 * e), nn.SiLU(), nn.Linear(2 * e, e), nn.SiLU())
        self.motion = CameraMotion(c, k, config.motion, games)

    def begin(
        self,
        latents: Tensor,
        actions: Tensor,
        past: Tensor | None = None,
        columns: Mapping[str, Tensor] | None = None,
        level: Tensor | None = None,
    ) -> State:
        """See `Dynamics.begin`; the column is `camera`, where the picture's corner lies, in tiles."""
        state = super().begin(latents, actions)
        grid, canvas, by = self.config.grid, None, None
        if past is not None and columns is not None and past.shape[1]:
            corner = columns["camera"].floor()
            steps = corner[:, 1:] - corner[:, :-1]
            for i, latent in enumerate(past.unbind(1)):
                canvas = remember(grid, canvas, latent, steps[:, max(i - 1, 0)])
            by = steps[:, -1]
        return state.replace(canvas=recall(grid, state.latents, canvas, by))

    def advance(self, state: State, action: Tensor, latent: Tensor) -> State:
        """See `Dynamics.advance`; the canvas keeps what the latent shows."""
        last = state.latents[:, -1]
        by = crossed(phases(last), moves(latent), phases(latent))
        canvas = remember(self.config.grid, state["canvas"], latent, by)
        return super().advance(state, action, latent).replace(canvas=canvas)

    @property
    def hinted(self) -> Mapping[str, tuple[int, ...]]:
        """See `Dynamics.hinted`: the camera's next move."""
        return {"move": (2,)}

    def hints(self, state: State, action: Tensor) -> dict[str, Tensor]:
        """The camera's next move (B, 2) in tiles, which is the player's: the game asks what it touches after it."""
        context = state.latents
        actions = torch.cat([state.actions, action[:, None]], 1)
        return {"move": self.next_move(context, actions, phases(context)[:, -1], moves(context)[:, 1:])}

    def truth(self, state: State, target: Tensor) -> dict[str, Tensor]:
        """The camera's true move, so that the prediction is of the target's window."""
        return {"move": exact_move(state.latents[:, -1], target)}

    def align(self, latent: Tensor, target: Tensor) -> Tensor:
        """The codes as predicted, the camera where it truly was."""
        return arrived(latent, target)

    def guide(self, aware: Prediction, unaware: Prediction, scale: float) -> Prediction:
        """As for any dynamics, but the camera goes where `aware` says, for both are of that window."""
        known = self.config.grid.known
        codes = super().guide(aware, unaware, scale).latent[:, :-known]
        return replace(aware, latent=torch.cat([codes, aware.latent[:, -known:]], 1))

    def next_move(self, context: Tensor, actions: Tensor, phase: Tensor, before: Tensor) -> Tensor:
        """Predict the camera's next move (B, 2).

        Args:
            context: (B, K, C, H, W), past latents.
            actions: int64 (B, K).
            phase: (B, 2), the current phase; what the context says of it only serves to lay its windows over one
                another.
            before: (B, K - 1, 2), the moves between the pictures, likewise.
        """
        grid, game = self.config.grid, self.config.grid.game_of(context[:, -1])
        tile, place = place_in_tile(grid, phase, game)
        return self.motion(surroundings(grid, context, tile), place, before, actions, grid.told(game))

    def smooth(self, latents: Tensor, actions: Tensor) -> Tensor:
        """Latents of real pictures with the camera on these dynamics' own path that is nearest to where it was read.

        Each phase was read off one picture, so a move has the errors of two; see `nearest_path`.

        Args:
            latents: float32 (B, T, C, H, W), T <= K, the first move zero; phases and moves are in tiles.
            actions: int64 (B, T - 1), the actions between them.

        Returns:
            The same codes with other phases and moves, float32 (B, T, C, H, W); fewer than three pictures as they are.
        """
        if latents.shape[1] < 3:
            return latents
        k = self.config.context

        def deviation(begin: Tensor) -> Tensor:
            """How far a path is from the readings, (n B, T, 2), if it is `begin` (n B, 4) off in the first two."""
            n = len(begin) // len(latents)
            seen, taken = latents.repeat(n, 1, 1, 1, 1), actions.repeat(n, 1)
            phase, read = phases(seen), moves(seen)[:, 1:]
            off = [begin[:, :2], begin[:, 2:]]
            before = [torch.zeros_like(off[0])] * (k - 2) + [read[:, 0] + off[1] - off[0]]
            for now in range(1, seen.shape[1] - 1):
                missing = k - now - 1
                context = torch.cat([seen[:, :1].expand(-1, missing, -1, -1, -1), seen[:, : now + 1]], 1)
                done = F.pad(taken[:, : now + 1], (missing, 0), value=NOOP)
                move = self.next_move(context, done, phase[:, now] + off[-1], torch.stack(before[-(k - 1) :], 1))
                off.append(off[-1] + move - read[:, now])
                before.append(move)
            return torch.stack(off, 1)

        off = nearest_path(deviation, len(latents), latents.device)
        phase = (phases(latents) + off).clamp(0, 1 - 1e-4)  # the windows stay
        moved = moves(latents) + F.pad(off.diff(dim=1), (0, 0, 1, 0))
        smoothed = with_camera(latents[:, :, :-CAMERA].flatten(0, 1), phase.flatten(0, 1), moved.flatten(0, 1))
        return smoothed.unflatten(0, latents.shape[:2])

    def predict(
        self,
        state: State,
        action: Tensor,
        x: Tensor | None = None,
        tau: Tensor | None = None,
        level: Tensor | None = None,
        hints: Mapping[str, Tensor] | None = None,
        span: Tensor | None = None,
    ) -> Prediction:
        """See `Dynamics.predict`.

        With the hint `move` (B, 2) the codes are those of the window it leads to. The camera's channels always hold the
        model's own prediction, so the phase may lie outside of [0, 1) then. The camera of `x` is ignored.
        """
        context, grid = state.latents, self.config.grid
        actions = torch.cat([state.actions, action[:, None]], 1)
        b, k, c, game = context.shape[0], context.shape[1], context.shape[2] - grid.known, grid.game_of(context[:, -1])
        zero = torch.zeros(b, device=context.device)
        tau, level = zero if tau is None else tau, zero if level is None else level
        phase, before = phases(context), moves(context)[:, 1:]
        by = behind(context)
        every = None if game is None else game.repeat_interleave(k)
        shares = grid.shown(phase.flatten(0, 1), every).unflatten(0, (b, k))
        seen = torch.cat([context[:, :, :c].float(), shares], 2)
        predicted = self.next_move(context, actions, phase[:, -1], before)
        taken = predicted if hints is None or "move" not in hints else hints["move"]
        at = phase[:, -1] + taken
        window = (at + 1e-6).floor().detach()  # a phase of 0 may come out a hair below it
        arriving = (at - window).clamp_min(0)
        view = grid.shown(arriving, game)
        seen = move_window(seen.flatten(0, 1), (by + window[:, None]).flatten(0, 1)).unflatten(0, (b, k))
        base, known = recalled(state["canvas"], window).split([c, 1], 1)
        half = self.config.embedding // 2
        gated = torch.zeros_like(base) if x is None else x[:, :c].float() * tau[:, None, None, None]
        scalars = [sinusoidal(tau, half), sinusoidal(level, half), 4 * alternating(gated), before.flatten(1), taken]
        scalars += grid.told(game)
        cond = self.condition(torch.cat([self.action_embedding(actions).flatten(1), *scalars], 1))
        maps = torch.cat(
            [gated, base, seen[:, :, :c].flatten(1, 2), seen[:, :, c], view, grid.waves(arriving, game), known], 1
        )
        out = self.out(self.backbone(maps.contiguous(memory_format=torch.channels_last), cond)).float()
        change = out[:, :c] * (out[:, c : 2 * c] + 1).sigmoid()
        clean = (base + change) * (view > 0)
        latent = with_camera(clean, phase[:, -1] + predicted - window, predicted, game)
        return Prediction(latent, out[:, 2 * c], {"move": predicted})

    def grown(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a model of one game: which game it is then counts for nothing at first."""
        weights, own = dict(weights), self.state_dict()
        for name in ("condition.0.weight", "motion.weigh.0.weight", "motion.laws.weight"):
            found = weights.get(name)
            if found is not None and found.ndim == 2 and found.shape[1] == own[name].shape[1] - len(self.config.games):
                weights[name] = F.pad(found, (0, len(self.config.games)))
        return weights
