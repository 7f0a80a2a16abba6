"""Whether dynamics that copy know which pixels will change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamenv.config import check
from dreamenv.models.registry import register
from trainers.rollout import DynamicsBatch, Rollouts
from trainers.terms.interface import Setting, Term


@dataclass(frozen=True)
class ChangedConfig:
    """Settings of the error of what changes."""

    weight: float = 0.1
    """Its weight."""
    least: float = 0.125
    """Difference of latents from which on a pixel has changed; with pixels as latents, eight of their 256 values."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.weight >= 0, f"weight {self.weight}: must be >= 0")
        check(self.least >= 0, f"least {self.least}: must be >= 0")


@register("term", "changed", ChangedConfig)
class Changed(Term):
    """Cross-entropy of a prediction's part `new`, a logit for each pixel, with whether its true colour changes.

    The mean of a pixel that may change is its old colour and its new one in proportion to the chance of the latter, so
    a squared error asks for the same share; but where hardly anything changes it teaches that very slowly. A small
    difference counts as none: what has drifted a little shall stay as it is. It needs dynamics of such parts. Every
    sample counts alike, of whichever game.
    """

    config: ChangedConfig

    def __init__(self, config: ChangedConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        told = "new" in setting.dynamics.parts
        check(told, f"task.terms.changed: {type(setting.dynamics).__name__} does not say which pixels are new")

    def forward(self, rollouts: Rollouts, batch: DynamicsBatch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Term.forward`."""
        total, metrics = torch.zeros((), device=batch.actions.device), {}
        steps = rollouts.mean.steps
        for u, step in enumerate(steps):
            off = (step.target - step.state.latents[:, -1].detach().float()).abs()
            true = (off.unflatten(1, (3, -1)).amax(1) > self.config.least).float()
            error = F.binary_cross_entropy_with_logits(step.prediction.parts["new"].float(), true, reduction="none")
            total = total + self.config.weight * (error.mean(1) * step.live).mean() / len(steps)
            metrics[f"changed_{u + 1}"] = error.detach().mean()
        return total, metrics
