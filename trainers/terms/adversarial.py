"""The adversarial term: a critic that tells real from dreamt transitions, so that a dream may not answer with fog."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from dreamenv.config import check
from dreamenv.models.interface import NULL_ACTION
from dreamenv.models.registry import register
from trainers.rollout import DynamicsBatch, Rollouts
from trainers.terms.interface import Setting, Term
from trainers.terms.squared import certainty_weights, fit_estimate


@dataclass(frozen=True)
class AdversarialConfig:
    """Settings of the adversarial term."""

    weight: float = 0.05
    """Its weight."""
    share: float = 0.5
    """Share of the samples that go on from draws of two evaluations: the first stays the mean that the squared error
    makes it, the second answers to the critic and commits to one future."""
    sampled: float = 0.25
    """Weight of the squared error of those second evaluations; that of the first ones weighs as in `squared`."""
    certainty: float = 0.5
    """See `squared`."""
    judged: int = 3
    """Unrolled steps of each sample that the critic sees."""
    width: int = 64
    """Channels of the critic's first scale."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.weight >= 0, f"weight {self.weight}: must be >= 0")
        check(0 < self.share < 1, f"share {self.share}: must be in (0, 1)")
        check(self.sampled >= 0, f"sampled {self.sampled}: must be >= 0")
        check(0 <= self.certainty <= 1, f"certainty {self.certainty}: must be in 0..1")
        check(self.judged >= 1, f"judged {self.judged}: must be >= 1")
        check(8 <= self.width <= 1024, f"width {self.width}: must be 8..1024")


@register("term", "adversarial", AdversarialConfig)
class Adversarial(Term):
    """The dynamics' and the critic's side of a game, on transitions of latents."""

    config: AdversarialConfig

    def __init__(self, config: AdversarialConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        check(
            config.judged <= setting.unroll, f"judged {config.judged}: must be in 1..unroll, which is {setting.unroll}"
        )
        check(setting.dynamics.context >= 2, "adversarial: needs a context of 2 or more")
        self.critic = Critic(setting.dynamics.spec.shape[0], config.width)

    @property
    def draws(self) -> tuple[float, int] | None:
        """See `Term.draws`."""
        return self.config.share, 1

    def graph_key(self, progress: float) -> int | None:
        """None: its weight grows at first."""
        return None

    def forward(self, rollouts: Rollouts, batch: DynamicsBatch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Term.forward`."""
        config, rollout, k = self.config, rollouts.draw, rollouts.dynamics.context
        assert rollout is not None
        total, metrics = torch.zeros((), device=batch.actions.device), {}
        for u, step in enumerate(rollout.steps):
            assert step.draw is not None
            for found, weight in ((step.prediction, 1.0), (step.draw, config.sampled)):
                error = rollouts.error(found.latent, step.target) * step.live
                weighted = (error * step.cells * certainty_weights(found.log_error, config.certainty)).mean()
                total = total + config.share * weight * weighted / len(rollout.steps)
            fit = fit_estimate(step.prediction.log_error, step.error, step.live)
            total = total + config.share * fit / len(rollout.steps)
            if u in (0, len(rollout.steps) - 1):
                metrics[f"sampled_{u + 1}"] = error.detach().mean()
        latents = rollouts.drawn_batch.latents
        sequence = torch.cat(
            [latents[:, k - 2 : k], rollout.trail[:, k:]], 1
        )  # what it sees before the first draw is real
        rows = torch.arange(len(latents), device=latents.device)[:, None]
        order = torch.rand(len(latents), self.unroll, generator=rollouts.generator, device=latents.device).argsort(1)
        step = order[:, : config.judged]
        now = rollout.given[rows, k - 1 + step].flatten()
        imagined, real = (
            torch.stack([x[rows, offset + i + step] for i in range(3)], 2).flatten(0, 1)
            for x, offset in ((sequence, 0), (latents, k - 2))
        )
        fooled = fool(self.critic, imagined, now)
        judged, right = judge(self.critic, real, imagined, now)
        # the critic's own loss reaches only the critic: its weight here cannot matter to the dynamics
        total = total + config.weight * min(1.0, 20 * progress) * fooled + judged
        return total, metrics | {"fooled": fooled.detach(), "critic": judged.detach(), "critic_right": right}


class Critic(nn.Module):
    """Scores three successive latents and the last action, per cell at three scales: high where it looks real.

    Spectrally normalised patch discriminator (Miyato et al. 2018; Isola et al. 2017) on latents rather than pixels,
    which costs a tenth (cf. Sauer et al. 2024, latent adversarial distillation). Only training uses it.

    Args:
        channels: C of the latents.
        width: of its first scale; the coarser ones have twice that.
    """

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.action = nn.Embedding(NULL_ACTION + 1, width)

        def conv(c_in: int, c_out: int, size: int = 3) -> nn.Module:
            return spectral_norm(nn.Conv2d(c_in, c_out, size, padding=size // 2))

        self.stem = conv(3 * channels, width)
        self.scales = nn.ModuleList(
            [
                nn.ModuleList([conv(width, width), conv(width, width)]),
                nn.ModuleList([conv(width, 2 * width), conv(2 * width, 2 * width)]),
                nn.ModuleList([conv(2 * width, 2 * width), conv(2 * width, 2 * width)]),
            ]
        )
        self.scores = nn.ModuleList([conv(w, 1, 1) for w in (width, 2 * width, 2 * width)])

    def forward(self, triples: Tensor, actions: Tensor) -> list[Tensor]:
        """Latents (B, 3, C, H, W) and int64 (B,) actions -> scores (B, 1, h, w) at each scale."""
        x = self.stem(triples.flatten(1, 2)) + self.action(actions)[:, :, None, None]
        out = []
        for level, (blocks, score) in enumerate(zip(self.scales, self.scores, strict=True)):
            if level:
                x = F.avg_pool2d(x, 2)
            for block in blocks:  # pyright: ignore[reportGeneralTypeIssues]
                x = block(F.leaky_relu(x, 0.2))
            out.append(score(F.leaky_relu(x, 0.2)).float())
        return out


def fool(critic: Critic, dreamt: Tensor, actions: Tensor) -> Tensor:
    """The dynamics' side of the hinge loss (Lim & Ye 2017); no gradient reaches the critic's parameters."""
    critic.requires_grad_(False)
    scores = critic(dreamt, actions)
    critic.requires_grad_(True)
    return -torch.stack([s.mean() for s in scores]).mean()


def judge(critic: Critic, real: Tensor, dreamt: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """The critic's side of the hinge loss, and the share of cells that it tells apart; none reaches the dynamics."""
    scores = critic(torch.cat([real, dreamt.detach()]), torch.cat([actions, actions]))
    losses, right = [], []
    for s in scores:
        good, bad = s.chunk(2)
        losses.append(F.relu(1 - good).mean() + F.relu(1 + bad).mean())
        right.append(((good > 0).float().mean() + (bad < 0).float().mean()).detach() / 2)
    return torch.stack(losses).mean(), torch.stack(right).mean()
