"""How far what dynamics hint of their next step is from the truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamenv.config import check
from dreamenv.models.registry import register
from trainers.rollout import DynamicsBatch, Rollouts
from trainers.terms.interface import Setting, Term

_CLOSE = 0.02  # from where on an error counts in proportion


@dataclass(frozen=True)
class HintsConfig:
    """Settings of the hints' error."""

    weight: float = 1.0
    """Its weight; 0 leaves the hints as they are."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.weight >= 0, f"weight {self.weight}: must be >= 0")


@register("term", "hints", HintsConfig)
class Hints(Term):
    """Huber error (smooth L1) of each hint that has a true value; nothing for dynamics without hints."""

    config: HintsConfig

    def __init__(self, config: HintsConfig, setting: Setting) -> None:
        super().__init__(config, setting)

    def forward(self, rollouts: Rollouts, batch: DynamicsBatch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Term.forward`."""
        total, metrics = torch.zeros((), device=batch.actions.device), {}
        steps, live = rollouts.mean.steps, rollouts.batch.live
        for u, step in enumerate(steps):
            for name, true in step.hints.items():
                found = step.prediction.hints[name]
                off = F.smooth_l1_loss(found, true, beta=_CLOSE, reduction="none").flatten(1).sum(1)
                total = total + self.config.weight * (off * live[:, u]).mean() / len(steps)
                metrics[f"{name}_{u + 1}"] = off.detach().mean()
        return total, metrics
