"""The adversarial term: a critic that tells real from dreamt transitions, so that a dream may not answer with fog."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from dreamenv.models.latent_flow import NULL_ACTION


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
        self.scales = nn.ModuleList([
            nn.ModuleList([conv(width, width), conv(width, width)]),
            nn.ModuleList([conv(width, 2 * width), conv(2 * width, 2 * width)]),
            nn.ModuleList([conv(2 * width, 2 * width), conv(2 * width, 2 * width)]),
        ])  # fmt: skip
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
