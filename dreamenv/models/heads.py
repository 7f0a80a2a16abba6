"""Outcome heads: what reward an action earns and whether it ends the episode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.actions import NUM_ACTIONS
from dreamenv.config import check
from dreamenv.errors import ConfigError
from dreamenv.models.blocks import ResBlock, group_norm
from dreamenv.models.player import FINE_PLACE, PlayerView, fine_place, place_in_tile, surroundings
from dreamenv.models.registry import register_model
from dreamenv.models.tile import CAMERA, fp32, moves, phases

_AHEAD = 4 + FINE_PLACE  # numbers that a head on tiles is told of the player's next move


@dataclass(frozen=True)
class OutcomeHeadConfig:
    """Shape of the head, and the joint outcomes it tells apart."""

    latent_channels: int = 16
    """C of the latents."""
    latent_size: int = 16
    """H = W of the latents."""
    context: int = 4
    """K latents and actions it sees: the dynamics' context."""
    width: int = 48
    """Channels."""
    rewards: tuple[float, ...] = (0.0, 0.0, 10.0)
    """Reward of each joint outcome, in the game's own magnitude."""
    terminated: tuple[bool, ...] = (False, True, True)
    """Whether each joint outcome ends the episode."""
    bias: tuple[float, ...] = ()
    """Added to the logits: the prior correction for class-balanced training (King & Zeng 2001), and calibration."""
    scale: float = 1.0
    """Multiplies the logits before the bias (calibration, Platt 1999)."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(1 <= len(self.rewards) <= 1024, f"rewards: must have 1..1024 outcomes, got {len(self.rewards)}")
        check(len(self.terminated) == len(self.rewards),
              f"terminated {self.terminated}: must have one entry per outcome, {len(self.rewards)}")
        check(len(self.bias) in (0, len(self.rewards)), f"bias {self.bias}: must be empty or one per outcome")
        check(4 <= self.latent_size <= 64 and self.latent_size % 4 == 0,
              f"latent_size {self.latent_size}: must be a multiple of 4 in 4..64")
        check(1 <= self.latent_channels <= 256, f"latent_channels {self.latent_channels}: must be 1..256")
        check(1 <= self.context <= 64, f"context {self.context}: must be 1..64")
        check(8 <= self.width <= 2048, f"width {self.width}: must be 8..2048")


class OutcomeHead(nn.Module):
    """A categorical over the joint (reward, terminated) outcomes that occur in the game.

    One joint distribution keeps them consistent (a CoinRun coin always ends the episode); the reward and termination
    probabilities are its marginals. It sees only the past and the action, because Procgen shows no terminal frame.
    """

    def __init__(self, config: OutcomeHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("prior", torch.tensor(config.bias or (0.0,) * len(config.rewards)), persistent=False)

    def log_probabilities(self, context: Tensor, actions: Tensor, move: Tensor | None = None) -> Tensor:
        """Calibrated log-probabilities (B, outcomes) of the joint outcomes; takes what `forward` takes."""
        return (self.config.scale * self(context, actions, move) + self.prior).log_softmax(1)


@register_model("outcome_head", OutcomeHeadConfig)
class PictureOutcomeHead(OutcomeHead):
    """A head that looks at the whole picture."""

    def __init__(self, config: OutcomeHeadConfig) -> None:
        super().__init__(config)
        w, side = config.width, config.latent_size // 4
        self.stem = nn.Conv2d(config.latent_channels * config.context, w, 3, padding=1)
        self.action = nn.Embedding(NUM_ACTIONS + 1, 32)
        self.blocks = nn.ModuleList([ResBlock(w, w, 32 * config.context) for _ in range(3)])
        self.norm = group_norm(w)
        self.hidden = nn.Linear(w * side * side + w, 128)
        self.out = nn.Linear(128, len(config.rewards))

    def forward(self, context: Tensor, actions: Tensor, move: Tensor | None = None) -> Tensor:
        """Context (B, K, C, H, W), actions int64 (B, K) -> uncorrected logits (B, outcomes); it heeds no move."""
        cond = self.action(actions).flatten(1)
        x = self.stem(context.flatten(1, 2))
        for i, block in enumerate(self.blocks):
            if i:
                x = F.max_pool2d(x, 2)
            x = block(x, cond)
        x = F.silu(self.norm(x))
        x = torch.cat([x.flatten(1), x.amax((2, 3))], 1)
        return self.out(F.silu(self.hidden(x))).float()


@register_model("tile_outcome_head", OutcomeHeadConfig)
class TileOutcomeHead(OutcomeHead):
    """A head that looks only at what surrounds the player, of latents on the grid of tiles.

    Coins and deaths are touched: where exactly the player is and what is within three tiles decides, wherever that is in the
    level, and a head that sees no more learns it from far fewer events. Procgen asks what is touched once all have moved, so
    the head is told the player's next move as the dynamics predict it (`TileFlow.ahead`): they have learnt how it runs, falls
    and lands from every step, of which one in hundreds brings an outcome.
    """

    def __init__(self, config: OutcomeHeadConfig) -> None:
        super().__init__(config)
        check(config.latent_channels > CAMERA, f"latent_channels {config.latent_channels}: must be {CAMERA + 1}..256")
        check(config.context >= 2, f"context {config.context}: must be 2..64")
        w = config.width
        self.view = PlayerView(config.latent_channels - CAMERA, config.context, w)
        self.decide = nn.Sequential(nn.Linear(self.view.seen + _AHEAD, 3 * w), nn.SiLU(), nn.Linear(3 * w, 3 * w), nn.SiLU(),
                                    nn.Linear(3 * w, len(config.rewards)))  # fmt: skip

    def forward(self, context: Tensor, actions: Tensor, move: Tensor | None = None) -> Tensor:
        """Predict the outcome's uncorrected logits (B, outcomes).

        Args:
            context: (B, K, C, H, W), past latents.
            actions: int64 (B, K).
            move: (B, 2), the camera's next move in tiles, see `TileFlow.ahead`; required.

        Raises:
            ConfigError: there is no move.
        """
        if move is None:
            raise ConfigError("move None: a head on tiles needs the next move that the dynamics predict (TileFlow.ahead)")
        tile, place = place_in_tile(phases(context)[:, -1])
        with fp32(context):
            seen = self.view.see(surroundings(context, tile), place, moves(context)[:, 1:], actions)
            return self.decide(torch.cat([seen, move, place + move, fine_place(place + move)], 1))

    def grown(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights from before it was told the next move, which then counts for nothing."""
        name = "decide.0.weight"
        found = weights.get(name)
        if found is not None and found.ndim == 2 and found.shape[1] == self.view.seen:
            weights = weights | {name: F.pad(found, (0, _AHEAD))}
        return weights
