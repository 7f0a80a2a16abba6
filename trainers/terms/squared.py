"""The squared error of unrolled predictions, and the score of the errors they expect."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamenv.config import check
from dreamenv.models.registry import register
from trainers.rollout import DynamicsBatch, Rollouts, Step
from trainers.terms.interface import Setting, Term

_FLOOR = math.exp(-8)  # expected squared error below which an estimate need not be told from a smaller one
_ESTIMATE = 0.003  # weight of the error estimate's own loss: so small that it does not weigh on the predictions


@dataclass(frozen=True)
class SquaredConfig:
    """Settings of the squared error."""

    weight: float = 1.0
    """Its weight."""
    certainty: float = 0.0
    """How far cells that the model expects to know weigh more: weight (expected error) ** -certainty (beta-NLL, Seitzer
    et al. 2022). Without it what nobody can know decides nearly all of the loss."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.weight >= 0, f"weight {self.weight}: must be >= 0")
        check(0 <= self.certainty <= 1, f"certainty {self.certainty}: must be in 0..1")


@register("term", "squared", SquaredConfig)
class Squared(Term):
    """Mean over the steps of a rollout from means."""

    config: SquaredConfig

    def __init__(self, config: SquaredConfig, setting: Setting) -> None:
        super().__init__(config, setting)

    def forward(self, rollouts: Rollouts, batch: DynamicsBatch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Term.forward`."""
        steps = rollouts.mean.steps
        total, metrics = torch.zeros((), device=batch.actions.device), {}
        for u, step in enumerate(steps):
            known = certainty_weights(step.prediction.log_error, self.config.certainty)
            weighted = (self.error(step, rollouts) * step.cells * known).mean()
            fit = fit_estimate(step.prediction.log_error, step.error, step.live)
            total = total + (self.config.weight * weighted + fit) / len(steps)
            if u in (0, len(steps) - 1):
                metrics |= {f"error_{u + 1}": step.error.detach().mean(), f"weighted_{u + 1}": weighted.detach()}
        return total, metrics

    def error(self, step: Step, rollouts: Rollouts) -> Tensor:
        """What is made small of one step in each cell, (B, H, W)."""
        return step.error


@dataclass(frozen=True)
class HuberConfig(SquaredConfig):
    """Settings of the Huber error."""

    delta: float = 1.0
    """Difference of latents from which on it counts in proportion."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        super().__post_init__()
        check(self.delta > 0, f"delta {self.delta}: must be > 0")


@register("term", "huber", HuberConfig)
class Huber(Squared):
    """As `squared`, but large errors count in proportion (Huber 1964); doubled, so that small ones count alike."""

    config: HuberConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def error(self, step: Step, rollouts: Rollouts) -> Tensor:
        """See `Squared.error`."""
        found, delta = step.prediction.latent.float(), self.config.delta
        huber = F.huber_loss(found, step.target, reduction="none", delta=delta)
        return 2 * (huber * rollouts.channels).mean(1) * step.live


def certainty_weights(log_error: Tensor, certainty: float) -> Tensor:
    """Weights of cells (B, H, W), of mean 1: the expected error to the power of -certainty."""
    weight = (-certainty * log_error.detach().clamp(-8, 2)).exp()
    return weight / weight.mean()


def fit_estimate(log_error: Tensor, error: Tensor, live: Tensor) -> Tensor:
    """The loss of the error estimate (B, H, W) itself, over the cells that are live."""
    return _ESTIMATE * (error_estimate_score(log_error, error) * live).mean()


def error_estimate_score(log_error: Tensor, error: Tensor) -> Tensor:
    """How badly an expected squared error s^2 = exp(log_error) + floor fits the observed ones: s + error / s.

    A proper score of the mean (a Bregman divergence, Gneiting 2011): the best constant s^2 is the mean error. A
    Gaussian's likelihood is one too, but its slope is error / s^2: single cells that err where no error was expected
    outweigh all others.

    Args:
        log_error: log of the expected squared error of a latent (1 is the latents' variance), any shape.
        error: squared errors, of the same shape and unit; no gradient goes through them.

    Returns:
        The scores, of the same shape; smaller is better.
    """
    s = (log_error.exp() + _FLOOR).sqrt()
    return s + error.detach() / s
