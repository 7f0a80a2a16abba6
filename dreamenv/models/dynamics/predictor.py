"""The deterministic predictor: the next latent, in one evaluation, from the past ones and the actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dreamenv.config import check, check_games
from dreamenv.models.blocks import DynamicFilters, sinusoidal, zero_init
from dreamenv.models.interface import NULL_ACTION, Backbone, Dynamics, LatentSpec, Prediction, State
from dreamenv.models.registry import build, register


@dataclass(frozen=True)
class LatentPredictorConfig:
    """Shape of the predictor."""

    latent: LatentSpec = LatentSpec((16, 16, 16))
    """What the latents are; training takes it from the codec."""
    context: int = 4
    """K past latents the model sees, with the K - 1 actions between them and the current one."""
    backbone: dict[str, Any] = field(default_factory=lambda: {"type": "unet"})
    """The network that mixes cells, see `dreamenv.models.backbones`."""
    embedding: int = 128
    """Width of the conditioning vector."""
    filter_bank: int = 24
    """Dynamic filters; 0 turns them off."""
    filter_size: int = 5
    """Their kernel size, in cells."""
    games: tuple[str, ...] = ()
    """The games that it is told apart, none for a model of one; training takes them from the data."""
    gate: bool = False
    """Whether each cell's change is multiplied by a gate in 0..1, so that what stands still can be copied exactly."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(not self.latent.known, f"latent.known {self.latent.known}: must be 0, it predicts learnt content only")
        check(1 <= self.context <= 64, f"context {self.context}: must be 1..64")
        check(
            8 <= self.embedding <= 4096 and self.embedding % 4 == 0,
            f"embedding {self.embedding}: must be a multiple of 4 in 8..4096",
        )
        check(0 <= self.filter_bank <= 512, f"filter_bank {self.filter_bank}: must be 0..512")
        check_games(self.games)
        odd = self.filter_size % 2 == 1 and 1 <= self.filter_size <= 15
        check(odd, f"filter_size {self.filter_size}: must be odd, 1..15")


@register("dynamics", "latent_predictor", LatentPredictorConfig)
class LatentPredictor(Dynamics):
    """Predicts the next latent, and how wrong it expects to be, from the past latents and the actions.

    Trained with a squared or Huber error it is the mean, or about the median, of what may come.

    Args:
        config: its shape.
        maps: channels that the backbone sees beside the context.
        scalars: numbers that condition it beside the actions, embedded.
        extra: further inputs of the conditioning vector.
    """

    deterministic = True
    config: Any

    def __init__(self, config: Any, maps: int = 0, scalars: int = 1, extra: int = 0) -> None:
        super().__init__()
        c, k, e = config.latent.shape[0], config.context, config.embedding
        self.config = config
        self.backbone: Backbone = build("backbone", config.backbone, c * k + maps, e, e // 2, where="backbone")
        out = nn.Conv2d(self.backbone.width, c + 1 + config.gate, 3, padding=1)
        zero_init(out)
        self.out = out
        self.action_embedding = nn.Embedding(NULL_ACTION + 1, e // 2)
        several = bool(config.games)
        self.game_embedding = nn.Embedding(len(config.games), e // 2) if several else None
        seen = (k + several + scalars) * (e // 2) + extra
        self.condition = nn.Sequential(nn.Linear(seen, 2 * e), nn.SiLU(), nn.Linear(2 * e, e), nn.SiLU())
        if config.gate and out.bias is not None:
            nn.init.constant_(out.bias[c + 1 :], 4.0)  # begins open
        bank = config.filter_bank
        self.filters = DynamicFilters(c, self.backbone.width, bank, config.filter_size) if bank else None

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
        """See `Dynamics.predict`; it has no hints and heeds none."""
        change, log_error = self.evaluate(state, action, [], [self.embedded(level, state.latents)])
        return Prediction((state.latents[:, -1] + change).float(), log_error)

    def embedded(self, scalar: Tensor | None, like: Tensor) -> Tensor:
        """Scalars (B,), None is 0, as (B, embedding / 2) of the dtype and on the device of `like` (B, ...)."""
        scalar = torch.zeros(len(like), device=like.device) if scalar is None else scalar
        return sinusoidal(scalar, self.config.embedding // 2).to(like.dtype)

    def evaluate(self, state: State, action: Tensor, maps: list[Tensor], told: list[Tensor]) -> tuple[Tensor, Tensor]:
        """One pass of the network.

        Args:
            state: (B,) states.
            action: int64 (B,), the one taken now.
            maps: (B, C', H, W) each, what the backbone sees before the context.
            told: (B, n) each, what conditions it beside the actions.

        Returns:
            The change of the last latent (B, C, H, W), and the log of the expected squared error, float32 (B, H, W).
        """
        context, c = state.latents, self.config.latent.shape[0]
        actions = self.action_embedding(torch.cat([state.actions, action[:, None]], 1))
        if self.game_embedding is not None:
            told = [self.game_embedding(state["game"]), *told]
        cond = self.condition(torch.cat([actions.flatten(1), *told], 1))
        tokens = None
        if self.backbone.attends:
            order = torch.linspace(0, 1, actions.shape[1], device=actions.device)
            tokens = actions + sinusoidal(order, actions.shape[2]).to(actions.dtype)
        features = self.backbone(torch.cat([*maps, context.flatten(1, 2)], 1), cond, tokens)
        out = self.out(features)
        change = out[:, :c]
        if self.filters is not None:
            change = change + self.filters(context[:, -1], features)
        if self.config.gate:
            change = change * out[:, c + 1 :].sigmoid()
        return change, out[:, c].float()

    def grown(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights without a gate, for a model that has one: an open gate, whose weights are the last of `out`."""
        own, weights = self.state_dict(), dict(weights)
        for name in ("out.weight", "out.bias"):
            found = weights.get(name)
            if found is not None and own[name].shape[1:] == found.shape[1:] and len(own[name]) == len(found) + 1:
                weights[name] = torch.cat([found, own[name][-1:].to(found)])
        return weights
