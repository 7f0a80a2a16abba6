"""A family of its own, registered from the tests: a codec, dynamics, a head and a loss term that nothing else knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.models.interface import (
    NULL_ACTION,
    Codec,
    Dynamics,
    LatentSpec,
    OutcomeHead,
    OutcomeHeadConfig,
    Prediction,
    State,
)
from dreamenv.models.registry import register
from trainers.rollout import DynamicsBatch, Rollouts
from trainers.terms.interface import Setting, Term


@dataclass(frozen=True)
class ToyCodecConfig:
    """A few channels of 8 x 8 cells."""

    channels: int = 5


@register("codec", "toy_codec", ToyCodecConfig)
class ToyCodec(Codec):
    """One convolution each way; its decoder is shown the mean of what it has drawn so far, which the state keeps."""

    keeps = ("mean",)

    def __init__(self, config: ToyCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.down = nn.Conv2d(3, config.channels, 8, 8)
        self.up = nn.ConvTranspose2d(config.channels, 3, 8, 8)

    @property
    def spec(self) -> LatentSpec:
        return LatentSpec((self.config.channels, 8, 8), "toys")

    def encode(self, images: Tensor, **columns: Tensor) -> Tensor:
        return self.down(images)

    def decode(self, latents: Tensor, **kept: Tensor) -> Tensor:
        mean = kept.get("mean", torch.zeros_like(latents))
        return self.up(latents + 0.1 * mean)


@dataclass(frozen=True)
class ToyDynamicsConfig:
    """What every dynamics has."""

    latent: LatentSpec = LatentSpec((5, 8, 8), "toys")
    context: int = 2


@register("dynamics", "toy_dynamics", ToyDynamicsConfig)
class ToyDynamics(Dynamics):
    """Adds a vector per action, and keeps a running mean beside the latents."""

    def __init__(self, config: ToyDynamicsConfig) -> None:
        super().__init__()
        self.config = config
        c = config.latent.shape[0]
        self.push = nn.Embedding(NULL_ACTION + 1, c)
        nn.init.normal_(self.push.weight, std=0.02)
        self.mix = nn.Conv2d(2 * c, c + 1, 1)

    def begin(
        self, latents: Tensor, actions: Tensor, past: Any = None, columns: Any = None, level: Any = None
    ) -> State:
        state = super().begin(latents, actions)
        return state.replace(mean=state.latents.mean(1))

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
        last = state.latents[:, -1]
        seen = torch.zeros_like(last) if x is None or tau is None else x * tau[:, None, None, None]
        out = self.mix(torch.cat([last, seen], 1))
        latent = last + 0.1 * out[:, :-1] + self.push(action)[:, :, None, None]
        return Prediction(latent.float(), out[:, -1].float(), {"toy": latent.mean((1, 2, 3))})

    @property
    def hinted(self) -> Mapping[str, tuple[int, ...]]:
        return {"toy": ()}

    def hints(self, state: State, action: Tensor) -> dict[str, Tensor]:
        return dict(self.predict(state, action).hints)

    def advance(self, state: State, action: Tensor, latent: Tensor) -> State:
        return super().advance(state, action, latent).replace(mean=0.9 * state["mean"] + 0.1 * latent)


@register("head", "toy_head", OutcomeHeadConfig)
class ToyHead(OutcomeHead):
    """A linear layer over the last latent and the dynamics' own hint."""

    def __init__(self, config: OutcomeHeadConfig) -> None:
        super().__init__(config)
        self.out = nn.Linear(config.latent.shape[0] + 1, len(config.rewards))

    @property
    def hinted(self) -> Mapping[str, tuple[int, ...]]:
        return {"toy": ()}

    def logits(self, state: State, action: Tensor, hints: Mapping[str, Tensor]) -> Tensor:
        return self.out(torch.cat([state.latents[:, -1].mean((2, 3)), hints["toy"][:, None]], 1)).float()


@dataclass(frozen=True)
class ToyTermConfig:
    """How much."""

    weight: float = 0.1


@register("term", "toy_term", ToyTermConfig)
class ToyTerm(Term):
    """Guesses the action from what a step changed: a term with a network of its own."""

    def __init__(self, config: ToyTermConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.guess = nn.Linear(setting.dynamics.spec.shape[0], NULL_ACTION)

    def forward(self, rollouts: Rollouts, batch: DynamicsBatch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        step = rollouts.mean.steps[0]
        change = (step.prediction.latent - step.state.latents[:, -1]).mean((2, 3))
        loss = F.cross_entropy(self.guess(change), rollouts.mean.actions[:, rollouts.dynamics.context - 1])
        return self.config.weight * loss, {"toy": loss.detach()}
