"""The energy score: two dreams of one sample, scored as an ensemble."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamenv.config import check
from dreamenv.models.registry import register
from trainers.rollout import DynamicsBatch, Rollouts
from trainers.terms.interface import Setting, Term
from trainers.terms.squared import fit_estimate

_PATCHES = (1, 2, 4)  # cells on a side


@dataclass(frozen=True)
class EnergyConfig:
    """Settings of the energy score."""

    weight: float = 0.4
    """Its weight."""
    share: float = 0.34
    """Share of the samples dreamt so; the others go on from means."""
    begin: float = 0.0
    """Part of the training after which it begins: many evaluations of few samples take a GPU nearly as long as all
    others."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.weight >= 0, f"weight {self.weight}: must be >= 0")
        check(0 < self.share < 1, f"share {self.share}: must be in (0, 1)")
        check(0 <= self.begin < 1, f"begin {self.begin}: must be in [0, 1)")


@register("term", "energy", EnergyConfig)
class Energy(Term):
    """Some samples are dreamt twice, each time going on from draws of two evaluations, and scored as an ensemble.

    Its optimum is the true distribution (Gneiting & Raftery 2007; for weather models Alet et al. 2025), so each dream
    commits to one future where the squared error draws the mean of all.
    """

    config: EnergyConfig

    def __init__(self, config: EnergyConfig, setting: Setting) -> None:
        super().__init__(config, setting)

    @property
    def draws(self) -> tuple[float, int] | None:
        """See `Term.draws`."""
        return self.config.share, 2

    def graph_key(self, progress: float) -> int | None:
        """Without it, and with it."""
        return int(progress >= self.config.begin)

    def forward(self, rollouts: Rollouts, batch: DynamicsBatch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Term.forward`."""
        total, metrics = torch.zeros((), device=batch.actions.device), {}
        if rollouts.draw is None:  # it has not begun
            return total, metrics
        steps, config = rollouts.draw.steps, self.config
        for u, step in enumerate(steps):
            assert step.draw is not None
            first, second = step.draw.latent.float().chunk(2)
            n = len(first)
            cells = step.cells[:n] * step.live[:n]
            score, spread = energy_score(first, second, step.target[:n], rollouts.channels, cells)
            estimate = fit_estimate(step.prediction.log_error, step.error, step.live)
            total = total + (config.weight * score + config.share * estimate) / len(steps)
            if u in (0, len(steps) - 1):
                metrics |= {f"energy_{u + 1}": score.detach(), f"spread_{u + 1}": spread.detach()}
        return total, metrics


def energy_score(
    first: Tensor, second: Tensor, target: Tensor, channels: Tensor, cells: Tensor
) -> tuple[Tensor, Tensor]:
    """Fair energy score of an ensemble of two, over patches of 1, 2 and 4 cells.

    The energy score E|X - y| - E|X - X'| / 2 is strictly proper (Gneiting & Raftery 2007): only the true distribution
    of whole patches minimises it, so that a thing which may be here or there is drawn here or there and not at half
    strength in both.

    Args:
        first: (B, C, H, W), one draw.
        second: another, independent of it.
        target: what happened.
        channels: (C, 1, 1), the weight of each channel's square.
        cells: (B, H, W), the weight of each cell.

    Returns:
        The score, and how far the draws are apart on average, E|X - X'|.
    """

    def square(x: Tensor, y: Tensor) -> Tensor:
        return ((x - y).square() * channels).mean(1)

    pairs = torch.stack([square(first, target), square(second, target), square(first, second)], 1)
    score = spread = torch.zeros((), device=target.device)
    for size in _PATCHES:
        distance = (F.avg_pool2d(pairs, size, 1) + 1e-5).sqrt()  # the root's slope is infinite at 0
        weight = F.avg_pool2d(cells, size, 1)
        score = score + (weight * (distance[:, 0] + distance[:, 1] - distance[:, 2]) / 2).mean() / len(_PATCHES)
        spread = spread + distance[:, 2].mean() / len(_PATCHES)
    return score, spread
