"""Long steps along the flow's path: one prediction must lead where two of half the length lead."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dreamenv.config import check
from dreamenv.flow import interpolate
from dreamenv.models.registry import register
from trainers.rollout import DynamicsBatch, Rollouts
from trainers.terms.interface import Setting, Term


@dataclass(frozen=True)
class ShortcutConfig:
    """Settings of the shortcut term."""

    weight: float = 1.0
    """Its weight."""
    halvings: int = 3
    """Lengths learnt: 1, 1/2 ... down to 1 / 2 ** halvings, whose halves are the flow's own short steps."""
    share: float = 0.25
    """Share of the samples, for each costs two evaluations more."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.weight >= 0, f"weight {self.weight}: must be >= 0")
        check(0 <= self.halvings <= 7, f"halvings {self.halvings}: must be in 0..7")
        check(0 < self.share <= 1, f"share {self.share}: must be in (0, 1]")


@register("term", "shortcut", ShortcutConfig)
class Shortcut(Term):
    """Self-consistency of a shortcut model (Frans et al. 2025), of the first step, by the clean latent.

    The dynamics are told how long a step their prediction is for (`span`). From a point on the path two steps of half
    the length are taken without gradients; the velocity that leads to where they arrive, written as a clean latent, is
    what one step of the whole length must predict. So one evaluation from noise becomes a sample and not the mean.
    Needs the term `flow` beside it, which teaches steps of length 0.
    """

    config: ShortcutConfig

    def __init__(self, config: ShortcutConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        check(setting.dynamics.sees_noise, "shortcut: needs dynamics that see the noise; set model.shortcut to true")

    def forward(self, rollouts: Rollouts, batch: DynamicsBatch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Term.forward`."""
        config, rollout = self.config, rollouts.mean
        step = rollout.steps[0]
        n = max(round(len(step.action) * config.share), 1)
        state, action, level = step.state.rows(slice(0, n)), step.action[:n], rollout.level[:n]
        hints = {name: value[:n] for name, value in step.hints.items()}
        steps = 2.0 ** (rollouts.uniform(n) * (config.halvings + 1)).floor()
        span = 1 / steps
        tau = (rollouts.uniform(n) * steps).floor() * span
        x = interpolate(rollouts.normal(step.target[:n].shape), step.target[:n], tau)

        def predict(x: Tensor, tau: Tensor, length: Tensor) -> Tensor:
            told = torch.where(length * 2 ** (config.halvings + 0.5) < 1, torch.zeros_like(length), length)
            found = rollouts.model(state, action, x=x, tau=tau, level=level, hints=hints, span=told)
            return found.latent.float()

        def wide(value: Tensor) -> Tensor:
            return value[:, None, None, None]

        with torch.no_grad():
            first = (predict(x, tau, span / 2) - x) / wide(1 - tau)
            half = x + wide(span / 2) * first
            second = (predict(half, tau + span / 2, span / 2) - half) / wide(1 - tau - span / 2)
            clean = x + wide(1 - tau) * (first + second) / 2
        error = rollouts.error(predict(x, tau, span), clean) * step.live[:n]
        loss = (error * step.cells[:n]).mean()
        return config.weight * config.share * loss, {"shortcut": loss.detach()}
