"""Reflow: the flow is trained on pairs of noise and what another flow made of that noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dreamenv.config import check
from dreamenv.errors import BundleError, ConfigError
from dreamenv.flow import SamplerConfig, interpolate, sample
from dreamenv.models.interface import Dynamics
from dreamenv.models.io import load_model
from dreamenv.models.registry import register
from trainers.models import check_told, of_game
from trainers.rollout import DynamicsBatch, Rollouts
from trainers.terms.flow import flow_weights
from trainers.terms.interface import Setting, Term


@dataclass(frozen=True)
class ReflowConfig:
    """Settings of the reflow term."""

    teacher: str
    """Model folder of a trained flow of the same latents, which stays as it is."""
    weight: float = 1.0
    """Its weight."""
    nfe: int = 4
    """Evaluations by which the teacher makes a pair."""
    share: float = 0.25
    """Share of the samples, for each costs `nfe` evaluations more."""
    power: float = 1.0
    """See `flow`."""
    max_weight: float = 5.0
    """See `flow`."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.weight >= 0, f"weight {self.weight}: must be >= 0")
        check(2 <= self.nfe <= 64, f"nfe {self.nfe}: must be in 2..64")
        check(0 < self.share <= 1, f"share {self.share}: must be in (0, 1]")
        check(0 <= self.power <= 4, f"power {self.power}: must be in 0..4")
        check(self.max_weight >= 1, f"max_weight {self.max_weight}: must be >= 1")


@register("term", "reflow", ReflowConfig)
class Reflow(Term):
    """The second round of rectified flow (Liu et al. 2023), of the first step.

    Noise and data that were drawn apart make paths that cross, so the flow bends. Pairs that a flow has joined make
    paths that do not, and a flow trained on these is nearly straight: few evaluations follow it.
    """

    config: ReflowConfig

    def __init__(self, config: ReflowConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        try:
            teacher, _ = load_model(config.teacher, "dynamics")
        except BundleError as error:
            raise ConfigError(f"reflow.teacher {config.teacher}: is no trained dynamics ({error})") from None
        assert isinstance(teacher, Dynamics)
        same = teacher.spec == setting.dynamics.spec and teacher.context == setting.dynamics.context
        check(same, f"reflow.teacher {config.teacher}: is of other latents, or another context, than the dynamics")
        check_told(teacher.games, setting.data.games, f"reflow.teacher {config.teacher}")
        check(not teacher.deterministic, f"reflow.teacher {config.teacher}: draws no samples; give a trained flow")
        self._teacher = [teacher.requires_grad_(False)]  # in a list: its weights are none of this term's

    def forward(self, rollouts: Rollouts, batch: DynamicsBatch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Term.forward`."""
        config, rollout = self.config, rollouts.mean
        step = rollout.steps[0]
        n = max(round(len(step.action) * config.share), 1)
        state, action, level = step.state.rows(slice(0, n)), step.action[:n], rollout.level[:n]
        teacher = self._teacher[0].to(action.device)
        noise = rollouts.normal(step.target[:n].shape)
        part, k = rollouts.batch.rows(slice(0, n)), rollouts.dynamics.context
        with torch.no_grad():  # the teacher sees the context without noise
            begun = of_game(teacher.begin(part.latents[:, :k], state.actions, part.past, part.columns), part.game)
            drawn = sample(teacher, begun, action, noise, SamplerConfig(nfe=config.nfe))
        clean, tau = drawn.latent, rollouts.uniform(n)
        x = interpolate(noise, clean, tau)
        found = rollouts.model(state, action, x=x, tau=tau, level=level, hints=drawn.hints)
        weight = flow_weights(tau, config.power, config.max_weight)
        error = rollouts.error(found.latent, clean) * step.live[:n] * step.cells[:n]
        loss = (error * weight[:, None, None]).mean()
        return config.weight * config.share * loss, {"reflow": loss.detach()}
