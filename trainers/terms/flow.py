"""The flow objectives: predictions of the first step from points between noise and the truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    power: float = 1.0
    """The squared error of the clean latent weighs (1 - tau) ** -power; 2 makes it that of the velocity."""
    max_weight: float = 5.0
    """Cap of that weight."""
    times: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of tau: uniform in [0, 1), or the logistic of a normal variable (Esser et al. 2024)."""
    times_mean: float = 0.0
    """Mean of that normal variable."""
    times_std: float = 1.0
    """Its standard deviation."""
    sigma_min: float = 0.0
    """Standard deviation of the noise that is left at tau = 1: 0 is rectified flow's straight path (Liu et al. 2023),
    more is flow matching's (Lipman et al. 2023). The sampler follows the path of 0, so it must stay small."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.weight >= 0, f"weight {self.weight}: must be >= 0")
        check(1 <= self.draws <= 64, f"draws {self.draws}: must be in 1..64")
        check(0 <= self.power <= 4, f"power {self.power}: must be in 0..4")
        check(self.max_weight >= 1, f"max_weight {self.max_weight}: must be >= 1")
        check(self.times_std > 0, f"times_std {self.times_std}: must be > 0")
        check(0 <= self.sigma_min <= 0.1, f"sigma_min {self.sigma_min}: must be in 0..0.1")


@register("term", "flow", FlowConfig)
class Flow(Term):
    """Flow matching (Lipman et al. 2023) by the clean latent: its squared error, weighted by 1 / (1 - tau)."""

    config: FlowConfig

    def __init__(self, config: FlowConfig, setting: Setting) -> None:
        super().__init__(config, setting)

    def forward(self, rollouts: Rollouts, batch: DynamicsBatch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Term.forward`."""
        config, rollout = self.config, rollouts.mean
        step = rollout.steps[0]
        total, metrics = torch.zeros((), device=batch.actions.device), {}
        for _ in range(config.draws):
            tau, noise = self.tau(rollouts, len(step.target)), rollouts.normal(step.target.shape)
            noisy = interpolate(noise, step.target, tau)
            if config.sigma_min:
                noisy = noisy + config.sigma_min * tau[:, None, None, None] * noise
            found = rollouts.model(step.state, step.action, x=noisy, tau=tau, level=rollout.level, hints=step.hints)
            weight = flow_weights(tau, config.power, config.max_weight)
            error = rollouts.error(found.latent, step.target) * step.live
            flow = (error * step.cells * weight[:, None, None]).mean()
            fit = fit_estimate(found.log_error, error, step.live)
            total = total + (config.weight * flow + fit) / config.draws
            metrics["flow"] = flow.detach()
        return total, metrics

    def tau(self, rollouts: Rollouts, size: int) -> Tensor:
        """Draw tau (size,) in [0, 1)."""
        config = self.config
        if config.times == "uniform":
            return rollouts.uniform(size)
        normal = rollouts.normal(torch.Size([size]))
        return (config.times_mean + config.times_std * normal).sigmoid().clamp_max(1 - 1e-4)


def flow_weights(tau: Tensor, power: float, most: float) -> Tensor:
    """Weights (1 - tau) ** -power of squared errors of clean latents, at most `most`."""
    return ((1 - tau).clamp_min(1e-6) ** -power).clamp_max(most)
