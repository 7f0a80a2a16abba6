"""The latent flow: a network that predicts the clean next latent (x-prediction) from a noisy one and the context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.config import check
from dreamenv.models.blocks import DynamicFilters, alternating, sinusoidal, zero_init
from dreamenv.models.interface import NULL_ACTION, Backbone, Dynamics, LatentSpec, Prediction, State
from dreamenv.models.registry import build, register


@dataclass(frozen=True)
class LatentFlowConfig:
    """Shape of the latent flow."""

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
    global_noise: bool = False
    """Whether the conditioning of all cells sees the noise too, so that a draw can commit to one future everywhere."""
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
        for name in ("global_noise", "gate"):
            check(isinstance(getattr(self, name), bool), f"{name} {getattr(self, name)!r}: must be true or false")
        odd = self.filter_size % 2 == 1 and 1 <= self.filter_size <= 15
        check(odd, f"filter_size {self.filter_size}: must be odd, 1..15")


@register("dynamics", "latent_flow", LatentFlowConfig)
class LatentFlow(Dynamics):
    """Predicts the clean next latent, and how wrong it expects to be, from a noisy one and the context.

    At tau = 0 the noisy latent is pure noise and carries nothing; it is gated out (multiplied by tau), so a
    deterministic predictor *is* this network at tau = 0, and one function evaluation needs no noise.

    Source: flow matching (Lipman et al. 2023) with x-prediction; context noise with its level as an input (GameNGen,
    Valevski et al. 2024); noise that conditions the whole picture (FGN, Alet et al. 2025).
    """

    def __init__(self, config: LatentFlowConfig) -> None:
        super().__init__()
        c, k, e = config.latent.shape[0], config.context, config.embedding
        self.config = config
        self.backbone: Backbone = build("backbone", config.backbone, c * (k + 1), e, where="backbone")
        out = nn.Conv2d(self.backbone.width, c + 1 + config.gate, 3, padding=1)
        zero_init(out)
        self.out = out
        self.action_embedding = nn.Embedding(NULL_ACTION + 1, e // 2)
        seen = (k + 2) * (e // 2) + c * config.global_noise
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
    ) -> Prediction:
        """See `Dynamics.predict`; it has no hints and heeds none."""
        context = state.latents
        b, k, c, h, w = context.shape
        last = context[:, -1]
        zero = torch.zeros(b, device=context.device)
        tau, level = zero if tau is None else tau, zero if level is None else level
        gated = torch.zeros_like(last) if x is None else x * tau[:, None, None, None]
        half = self.config.embedding // 2
        scalars = [sinusoidal(tau, half).to(last.dtype), sinusoidal(level, half).to(last.dtype)]
        if self.config.global_noise:
            scalars.append(4 * alternating(gated))  # of unit variance half-way, where tau (1 - tau) is a quarter
        actions = torch.cat([state.actions, action[:, None]], 1)
        cond = self.condition(torch.cat([self.action_embedding(actions).flatten(1), *scalars], 1))
        features = self.backbone(torch.cat([gated, context.reshape(b, k * c, h, w)], 1), cond)
        out = self.out(features)
        change = out[:, :c]
        if self.filters is not None:
            change = change + self.filters(last, features)
        if self.config.gate:
            change = change * out[:, c + 1 :].sigmoid()
        return Prediction((last + change).float(), out[:, c].float())

    def grown(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights without a gate or global noise, for a model that has them: an open gate, noise without effect.

        The gate's weights are the last of `out`, and those of the noise the last inputs of `condition`.
        """
        own, weights = self.state_dict(), dict(weights)
        for name in ("out.weight", "out.bias"):
            found = weights.get(name)
            if found is not None and own[name].shape[1:] == found.shape[1:] and len(own[name]) == len(found) + 1:
                weights[name] = torch.cat([found, own[name][-1:].to(found)])
        name = "condition.0.weight"
        if name in weights and (more := own[name].shape[1] - weights[name].shape[1]) > 0:
            weights[name] = F.pad(weights[name], (0, more))
        return weights
