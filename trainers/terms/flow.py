"""The flow matching term: predictions of the first step from points between noise and the truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dreamenv.config import check
from dreamenv.flow import interpolate
from dreamenv.models.registry import register
from trainers.rollout import DynamicsBatch, Rollouts
from trainers.terms.interface import Setting, Term
from trainers.terms.squared import fit_estimate


@dataclass(frozen=True)
class FlowConfig:
    """Settings of the flow term."""

    weight: float = 1.0
    """Its weight."""
    draws: int = 1
    """Draws of (noise, tau) that each sample's term averages."""
    max_weight: float = 5.0
    """Cap of the weight 1 / (1 - tau)."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.weight >= 0, f"weight {self.weight}: must be >= 0")
        check(1 <= self.draws <= 64, f"draws {self.draws}: must be in 1..64")
        check(self.max_weight >= 1, f"max_weight {self.max_weight}: must be >= 1")


@register("term", "flow", FlowConfig)
class Flow(Term):
    """Flow matching (Lipman et al. 2023) with clean-latent prediction: squared error, weighted by 1 / (1 - tau)."""

    config: FlowConfig

    def __init__(self, config: FlowConfig, setting: Setting) -> None:
        super().__init__(config, setting)

    def forward(self, rollouts: Rollouts, batch: DynamicsBatch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Term.forward`."""
        config, rollout = self.config, rollouts.mean
        step = rollout.steps[0]
        total, metrics = torch.zeros((), device=batch.actions.device), {}
        for _ in range(config.draws):
            tau = rollouts.uniform(len(step.target))
            noisy = interpolate(rollouts.normal(step.target.shape), step.target, tau)
            found = rollouts.model(step.state, step.action, x=noisy, tau=tau, level=rollout.level, hints=step.hints)
            weight = (1 / (1 - tau).clamp_min(1e-6)).clamp_max(config.max_weight)
            error = rollouts.error(found.latent, step.target) * step.live
            flow = (error * step.cells * weight[:, None, None]).mean()
            fit = fit_estimate(found.log_error, error, step.live)
            total = total + (config.weight * flow + fit) / config.draws
            metrics["flow"] = flow.detach()
        return total, metrics
