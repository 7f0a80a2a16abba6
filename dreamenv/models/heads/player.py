"""An outcome head that looks only at what surrounds the player, of latents on the grid of tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.config import check
from dreamenv.errors import ConfigError
from dreamenv.models.blocks import fp32
from dreamenv.models.interface import LatentSpec, OutcomeHead, OutcomeHeadConfig, State
from dreamenv.models.registry import register
from dreamenv.models.tiles.grid import CAMERA, Grid, moves, phases
from dreamenv.models.tiles.player import FINE_PLACE, PlayerView, fine_place, place_in_tile, surroundings

_TOLD = 4 + FINE_PLACE  # numbers that the head is told of the player's next move


@dataclass(frozen=True)
class PlayerHeadConfig(OutcomeHeadConfig):
    """Shape of a head on tiles, and the joint outcomes it tells apart."""

    latent: LatentSpec = LatentSpec((28, 16, 16), "tiles", CAMERA)
    """What the latents are; training takes it from the codec."""
    grid: Grid = Grid()
    """How the game shows its grid; training takes it from the codec."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        super().__post_init__()
        known = self.grid.known
        sound = self.latent.layout == "tiles" and self.latent.known == known
        check(sound, f"latent {self.latent}: must be of layout 'tiles', {known} channels of it known")
        check(self.latent.shape[0] > known, f"latent.shape {self.latent.shape}: needs more than {known} channels")
        check(len(self.games) == len(self.grid.views), f"games {self.games}: the grid is of {len(self.grid.views)}")
        check(self.context >= 2, f"context {self.context}: must be 2..64")


@register("head", "player_head", PlayerHeadConfig)
class PlayerOutcomeHead(OutcomeHead):
    """A head that sees the tiles around the player.

    Coins and deaths are touched: where exactly the player is and what is within three tiles decides, wherever that is
    in the level, and a head that sees no more learns it from far fewer events. Procgen asks what is touched once all
    have moved, so the head is told the player's next move as the dynamics predict it (the hint `move`): they have
    learnt how it runs, falls and lands from every step, of which one in hundreds brings an outcome.
    """

    several = True
    of_outcomes = ("decide.4.weight", "decide.4.bias")
    config: PlayerHeadConfig

    def __init__(self, config: PlayerHeadConfig) -> None:
        super().__init__(config)
        w = config.width
        self.view = PlayerView(config.latent.shape[0] - config.grid.known, config.context, w)
        self.decide = nn.Sequential(
            nn.Linear(self.view.seen + _TOLD + len(config.games), 3 * w),
            nn.SiLU(),
            nn.Linear(3 * w, 3 * w),
            nn.SiLU(),
            nn.Linear(3 * w, len(config.rewards)),
        )

    @property
    def hinted(self) -> Mapping[str, tuple[int, ...]]:
        """See `OutcomeHead.hinted`: the player's next move, down and across, in tiles."""
        return {"move": (2,)}

    def logits(self, state: State, action: Tensor, hints: Mapping[str, Tensor]) -> Tensor:
        """See `OutcomeHead.logits`.

        Raises:
            ConfigError: there is no hint `move`, float32 (B, 2) in tiles.
        """
        if "move" not in hints:
            raise ConfigError(
                "hints without 'move': a head on tiles needs the next move that dynamics on tiles predict"
            )
        move, context = hints["move"], state.latents
        actions = torch.cat([state.actions, action[:, None]], 1)
        grid, game = self.config.grid, self.config.grid.game_of(context[:, -1])
        tile, place = place_in_tile(grid, phases(context)[:, -1], game)
        with fp32(context):
            around = surroundings(grid, context, tile)
            seen = self.view.see(around, place, moves(context)[:, 1:], actions)
            return self.decide(torch.cat([seen, move, place + move, fine_place(place + move), *grid.told(game)], 1))

    def grown(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights from before it was told the next move, or the game, which then counts for nothing."""
        name = "decide.0.weight"
        found, games = weights.get(name), len(self.config.games)
        if found is not None and found.ndim == 2:
            short = {self.view.seen: _TOLD + games, self.view.seen + _TOLD: games}.get(found.shape[1], 0)
            weights = weights | {name: F.pad(found, (0, short))}
        return weights
