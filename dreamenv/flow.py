"""Probability path and samplers of the latent flow. Nothing here knows a family of models.

The path is x_tau = (1 - tau) * noise + tau * clean (rectified flow, Liu et al. 2023), the network predicts `clean`
(x-prediction), and the velocity follows: v = (clean - x_tau) / (1 - tau).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dreamenv.config import check
from dreamenv.models.interface import NULL_ACTION, Dynamics, Prediction, State

Predict = Callable[[Tensor | None, float, float], Prediction]


@dataclass(frozen=True)
class SamplerConfig:
    """How a next latent is drawn."""

    nfe: int = 1
    """Network function evaluations per step; 1 is the deterministic predictor (the mean), more draw a sample. Of
    dynamics that learn long steps (`Dynamics.spans`) one evaluation is a draw too."""
    solver: Literal["euler", "heun"] = "euler"
    """Euler, or Heun's second order (an odd nfe: two evaluations a step, one for the last)."""
    temperature: float = 1.0
    """Scales the starting noise; 0 removes it."""
    guidance_scale: float = 1.0
    """Classifier-free guidance on the action (Ho & Salimans 2022); 1 is off, else each evaluation costs two."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(
            isinstance(self.nfe, int) and not isinstance(self.nfe, bool) and 1 <= self.nfe <= 256,
            f"nfe {self.nfe!r}: must be an integer in 1..256",
        )
        check(self.solver in ("euler", "heun"), f"solver {self.solver!r}: must be 'euler' or 'heun'")
        check(
            self.solver == "euler" or self.nfe % 2 == 1,
            f"nfe {self.nfe} with solver 'heun': must be odd (two evaluations a step, one for the last)",
        )
        for name, limit in (("temperature", 10.0), ("guidance_scale", 20.0)):
            value = getattr(self, name)
            check(
                isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= limit,
                f"{name} {value!r}: must be a number in 0..{limit:g}",
            )

    def stochastic(self, dynamics: Dynamics) -> bool:
        """Whether noise reaches what is drawn of these dynamics."""
        return self.temperature > 0 and not dynamics.deterministic and (self.nfe > 1 or bool(dynamics.spans))


def interpolate(noise: Tensor, clean: Tensor, tau: Tensor) -> Tensor:
    """Point on the path, (B, C, H, W), at tau (B,)."""
    t = tau[:, None, None, None]
    return (1 - t) * noise + t * clean


def velocity(x: Tensor, clean: Tensor, tau: float) -> Tensor:
    """Velocity of the path at `x`, given the predicted clean latent; tau < 1."""
    return (clean - x) / (1 - tau)


def integrate(predict: Predict, noise: Tensor | None, sampler: SamplerConfig, sees_noise: bool = False) -> Prediction:
    """Follow the path from noise to a clean latent.

    Args:
        predict: (x_tau (B, C, H, W), or None at tau = 0, tau, and the length of the step that follows) -> the predicted
            clean latent.
        noise: standard normal (B, C, H, W); None is no noise.
        sampler: steps, solver and temperature.
        sees_noise: whether the prediction at tau = 0 depends on the noise.

    Returns:
        The last prediction, with the log error that the first one expected.
    """
    start = None if noise is None or sampler.temperature == 0 else noise * sampler.temperature
    steps = sampler.nfe if sampler.solver == "euler" else (sampler.nfe + 1) // 2
    shown = start if sees_noise else None
    prediction = first = predict(shown, 0.0, 0.0 if shown is None else 1 / steps)
    if sampler.nfe == 1:
        return first
    clean = first.latent
    x = torch.zeros_like(clean) if start is None else start.to(clean.dtype)
    for i in range(steps):
        tau, following = i / steps, (i + 1) / steps
        if i:
            prediction = predict(x, tau, 1 / steps)
        if i == steps - 1:
            break
        v = velocity(x, prediction.latent, tau)
        if sampler.solver == "heun":
            tried = x + (following - tau) * v
            v = (v + velocity(tried, predict(tried, following, 1 / steps).latent, following)) / 2
        x = x + (following - tau) * v
    return replace(prediction, log_error=first.log_error)


def sample(
    dynamics: Dynamics, state: State, action: Tensor, noise: Tensor | None, sampler: SamplerConfig
) -> Prediction:
    """Draw the next latent, guided by the action if the sampler says so.

    Args:
        dynamics: which.
        state: (B,) states.
        action: int64 (B,), the one taken now.
        noise: standard normal (B, C, H, W); may be None where `sampler.stochastic(dynamics)` is False.
        sampler: how.

    Returns:
        Latent float32 (B, C, H, W), its hints, and the log error that the first evaluation expected, (B, H, W).
    """
    zero = torch.zeros(len(action), device=action.device)

    def predict(x: Tensor | None, tau: float, span: float) -> Prediction:
        told = zero + span if dynamics.spans else None
        aware = dynamics.predict(state, action, x, zero + tau, span=told)
        if sampler.guidance_scale == 1:
            return aware
        hidden = state.replace(actions=torch.full_like(state.actions, NULL_ACTION))
        unknown = torch.full_like(action, NULL_ACTION)
        unaware = dynamics.predict(hidden, unknown, x, zero + tau, hints=aware.hints, span=told)
        return dynamics.guide(aware, unaware, sampler.guidance_scale)

    if dynamics.deterministic:
        return predict(None, 0.0, 1.0)
    return integrate(predict, noise if sampler.stochastic(dynamics) else None, sampler, dynamics.sees_noise)
