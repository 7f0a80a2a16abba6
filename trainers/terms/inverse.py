"""Action consistency: from a dreamt transition one must be able to tell which action was taken."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.config import check
from dreamenv.contract.actions import NUM_ACTIONS
from dreamenv.models.blocks import ResBlock, group_norm
from dreamenv.models.interface import NULL_ACTION
from dreamenv.models.registry import register
from trainers.rollout import DynamicsBatch, Rollouts
from trainers.terms.interface import Setting, Term


@dataclass(frozen=True)
class InverseConfig:
    """Settings of the inverse-dynamics term."""

    weight: float = 0.01
    """Its weight."""
    width: int = 48
    """Channels of the network that tells actions."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.weight >= 0, f"weight {self.weight}: must be >= 0")
        check(8 <= self.width <= 1024, f"width {self.width}: must be 8..1024")


@register("term", "inverse", InverseConfig)
class Inverse(Term):
    """An inverse-dynamics network learns from real transitions; the dynamics must make dreamt ones that it reads alike.

    It sees the two latents before and the one after an action (Pathak et al. 2017, of latents). Its own loss reaches
    only it, that of dreamt transitions only the dynamics.
    """

    config: InverseConfig

    def __init__(self, config: InverseConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        check(setting.dynamics.context >= 2, "inverse: needs a context of 2 or more")
        w = config.width
        self.stem = nn.Conv2d(3 * setting.dynamics.spec.shape[0], w, 3, padding=1)
        self.blocks = nn.ModuleList(ResBlock(w, w) for _ in range(2))
        self.norm = group_norm(w)
        self.out = nn.Linear(2 * w, NUM_ACTIONS)

    def tell(self, triples: Tensor) -> Tensor:
        """Three successive latents (B, 3, C, H, W) -> logits float32 (B, 15) of the action before the last."""
        x = self.stem(triples.flatten(1, 2))
        for block in self.blocks:
            x = F.max_pool2d(block(x), 2)
        x = F.silu(self.norm(x))
        return self.out(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)).float()

    def forward(self, rollouts: Rollouts, batch: DynamicsBatch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Term.forward`."""
        rollout, k = rollouts.mean, rollouts.dynamics.context
        real, dreamt = rollouts.batch.latents, rollout.trail
        own = told = torch.zeros((), device=batch.actions.device)
        right = []
        for u in range(self.unroll):
            at, live = k + u, rollouts.batch.live[:, u].float()
            taken, count = rollout.actions[:, at - 1], live.sum().clamp_min(1)
            logits = self.tell(real[:, at - 2 : at + 1])
            own = own + (F.cross_entropy(logits, taken, reduction="none") * live).sum() / count / self.unroll
            self.requires_grad_(False)
            guess = self.tell(dreamt[:, at - 2 : at + 1])
            self.requires_grad_(True)
            known = live * (rollout.given[:, at - 1] != NULL_ACTION)
            lost = (F.cross_entropy(guess, taken, reduction="none") * known).sum() / known.sum().clamp_min(1)
            told = told + lost / self.unroll
            right.append(((logits.argmax(1) == taken).float() * live).sum() / count)
        metrics = {"inverse": told.detach(), "inverse_real": own.detach(), "inverse_right": torch.stack(right).mean()}
        return self.config.weight * told + own, metrics
