"""The latent flow: a predictor that is also shown a point on the path from noise to the next latent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamenv.config import check
from dreamenv.models.blocks import alternating
from dreamenv.models.dynamics.predictor import LatentPredictor, LatentPredictorConfig
from dreamenv.models.interface import Dynamics, Prediction, State
from dreamenv.models.registry import register


@dataclass(frozen=True)
class LatentFlowConfig(LatentPredictorConfig):
    """Shape of the latent flow."""

    global_noise: bool = False
    """Whether the conditioning of all cells sees the noise too, so that a draw can commit to one future everywhere."""
    parameterisation: Literal["clean", "velocity"] = "clean"
    """What the network says: the change of the last latent, or the velocity of the path."""
    shortcut: int = 0
    """How many lengths of long steps it is told apart, 1, 1/2, 1/4 ...; see the term `shortcut`. 0 for none."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        super().__post_init__()
        known = ("clean", "velocity")
        check(self.parameterisation in known, f"parameterisation {self.parameterisation!r}: must be one of {known}")
        check(0 <= self.shortcut <= 8, f"shortcut {self.shortcut}: must be 0..8")


@register("dynamics", "latent_flow", LatentFlowConfig)
class LatentFlow(LatentPredictor):
    """Predicts the clean next latent, and how wrong it expects to be, from a noisy one and the context.

    At tau = 0 the noisy latent is pure noise and carries nothing. Without it (`x` None) the network is a deterministic
    predictor. By default noise is also gated out (multiplied by tau), so that one evaluation needs none; a network that
    predicts the velocity, or learns long steps, must see it.

    Source: flow matching (Lipman et al. 2023) with x-prediction; context noise with its level as an input (GameNGen,
    Valevski et al. 2024); noise that conditions the whole picture (FGN, Alet et al. 2025); the step's length as an
    input (shortcut models, Frans et al. 2025).
    """

    deterministic = False
    config: LatentFlowConfig

    def __init__(self, config: LatentFlowConfig) -> None:
        c = config.latent.shape[0]
        super().__init__(config, c, 2 + (config.shortcut > 0), c * config.global_noise)

    @property
    def sees_noise(self) -> bool:
        """See `Dynamics.sees_noise`."""
        return self.config.shortcut > 0 or self.config.parameterisation == "velocity"

    @property
    def spans(self) -> tuple[float, ...]:
        """See `Dynamics.spans`."""
        return tuple(0.5**i for i in range(self.config.shortcut))

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
        last = state.latents[:, -1]
        time = torch.zeros(len(last), device=last.device) if tau is None else tau
        at = time[:, None, None, None]
        noisy = torch.zeros_like(last) if x is None else x if self.sees_noise else x * at
        told = [self.embedded(time, last), self.embedded(level, last)]
        if self.config.global_noise:
            told.append(4 * alternating(noisy))  # of unit variance half-way, where tau (1 - tau) is a quarter
        if self.config.shortcut:
            told.append(self.embedded(None if span is None else self._learnt(span), last))
        change, log_error = self.evaluate(state, action, [noisy], told)
        clean = last + change if self.config.parameterisation == "clean" else noisy + (1 - at) * change
        return Prediction(clean.float(), log_error)

    def _learnt(self, span: Tensor) -> Tensor:
        """The nearest length that it is told apart, by their ratio; 0 for what is shorter than all of them."""
        halvings = (-span.clamp_min(1e-6).log2()).round()
        return torch.where(halvings < self.config.shortcut, 0.5**halvings, torch.zeros_like(span))

    def goes_on_from(self, other: Dynamics) -> bool:
        """See `Dynamics.goes_on_from`: what it predicts, and whether it sees the noise, must be the same."""
        said = self.config.parameterisation, self.sees_noise
        return said == (other.config.parameterisation, other.sees_noise)

    def grown(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights without a gate or global noise, for a model that has them: an open gate, noise without effect.

        The weights of the noise are the last inputs of `condition`.
        """
        own, weights = self.state_dict(), super().grown(weights)
        name, noise = "condition.0.weight", self.config.latent.shape[0]
        plain = self.config.global_noise and not self.config.shortcut
        if plain and name in weights and own[name].shape[1] - weights[name].shape[1] == noise:
            weights[name] = F.pad(weights[name], (0, noise))
        return weights
