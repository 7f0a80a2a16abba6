"""Long steps along the flow's path: one prediction must lead where two of half the length lead."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dreamenv.config import check
from dreamenv.flow import interpolate
from dreamenv.models.interface import Prediction
from dreamenv.models.registry import register
from trainers.rollout import DynamicsBatch, Rollouts
from trainers.terms.interface import Setting, Term
from trainers.terms.squared import fit_estimate


@dataclass(frozen=True)
class ShortcutConfig:
    """Settings of the shortcut term."""

    weight: float = 1.0
    """Its weight."""
    share: float = 0.25
    """Share of the samples, for each costs two evaluations more."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.weight >= 0, f"weight {self.weight}: must be >= 0")
        check(0 < self.share <= 1, f"share {self.share}: must be in (0, 1]")


@register("term", "shortcut", ShortcutConfig)
class Shortcut(Term):
    """Self-consistency of a shortcut model (Frans et al. 2025), of the first step, by the clean latent.

    The dynamics are told how long a step their prediction is for (`span`, one of `Dynamics.spans`). From a point on the
    path two steps of half the length are taken without gradients; the velocity that leads to where they arrive, written
    as a clean latent, is what one step of the whole length must predict. So one evaluation from noise becomes a sample
    and not the mean. Needs the term `flow` beside it, which teaches steps of length 0.
    """

    config: ShortcutConfig

    def __init__(self, config: ShortcutConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        check(bool(setting.dynamics.spans), "shortcut: needs dynamics that learn long steps; set model.shortcut to 3")

    def forward(self, rollouts: Rollouts, batch: DynamicsBatch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Term.forward`."""
        config, rollout = self.config, rollouts.mean
        step = rollout.steps[0]
        n = max(round(len(step.action) * config.share), 1)
        state, action, level = step.state.rows(slice(0, n)), step.action[:n], rollout.level[:n]
        hints = {name: value[:n] for name, value in step.hints.items()}
        spans = torch.stack([torch.full((), span, device=action.device) for span in rollouts.dynamics.spans])
        span = spans[(rollouts.uniform(n) * len(spans)).long().clamp_max(len(spans) - 1)]
        tau = (rollouts.uniform(n) / span).floor() * span
        x = interpolate(rollouts.normal(step.target[:n].shape), step.target[:n], tau)

        def predict(x: Tensor, tau: Tensor, length: Tensor) -> Prediction:
            return rollouts.model(state, action, x=x, tau=tau, level=level, hints=hints, span=length)

        def wide(value: Tensor) -> Tensor:
            return value[:, None, None, None]

        with torch.no_grad():
            first = (predict(x, tau, span / 2).latent - x) / wide(1 - tau)
            half = x + wide(span / 2) * first
            second = (predict(half, tau + span / 2, span / 2).latent - half) / wide(1 - tau - span / 2)
            clean = x + wide(1 - tau) * (first + second) / 2
        found, live = predict(x, tau, span), step.live[:n]
        loss = (rollouts.error(found.latent, clean) * live * step.cells[:n]).mean()
        fit = fit_estimate(found.log_error, rollouts.error(found.latent, step.target[:n]) * live, live)
        return config.share * (config.weight * loss + fit), {"shortcut": loss.detach()}
