"""The adversarial term in pixel space: a critic looks at decoded pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from dreamenv.config import check
from dreamenv.models.registry import register
from trainers.rollout import DynamicsBatch, Rollouts
from trainers.terms.interface import Setting
from trainers.terms.picture import Decoded


@dataclass(frozen=True)
class PixelAdversarialConfig:
    """Settings of the adversarial term on pictures."""

    weight: float = 0.01
    """Its weight."""
    width: int = 32
    """Channels of the critic's first layer."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.weight >= 0, f"weight {self.weight}: must be >= 0")
        check(8 <= self.width <= 512, f"width {self.width}: must be 8..512")


@register("term", "pixel_adversarial", PixelAdversarialConfig)
class PixelAdversarial(Decoded):
    """The dynamics' and the critic's side of a game, on one decoded picture of each sample.

    The critic scores patches of a picture (Isola et al. 2017), with spectral normalisation (Miyato et al. 2018) and the
    hinge loss (Lim & Ye 2017). For a critic of latents see `adversarial`.
    """

    name = "pixel_adversarial"
    config: PixelAdversarialConfig

    def __init__(self, config: PixelAdversarialConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        channels, w = setting.codec.frame[2], config.width
        sizes = [(channels, w), (w, 2 * w), (2 * w, 4 * w)]
        layers = [spectral_norm(nn.Conv2d(a, b, 4, 2, 1)) for a, b in sizes]
        self.layers, self.score = nn.ModuleList(layers), spectral_norm(nn.Conv2d(4 * w, 1, 3, padding=1))

    def graph_key(self, progress: float) -> int | None:
        """None: its weight grows at first."""
        return None

    def scores(self, images: Tensor) -> Tensor:
        """Images (B, c, h, w) -> scores (B, 1, h / 8, w / 8), high where they look real."""
        x = images
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
        return self.score(x).float()

    def forward(self, rollouts: Rollouts, batch: DynamicsBatch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Term.forward`."""
        images, real, live = self.decoded(rollouts)
        weight = live[:, None, None, None] / live.mean().clamp_min(1e-6)
        self.requires_grad_(False)
        fooled = -(self.scores(images) * weight).mean()
        self.requires_grad_(True)
        good, bad = self.scores(torch.cat([real, images.detach()])).chunk(2)
        judged = ((F.relu(1 - good) + F.relu(1 + bad)) * weight).mean()
        right = ((good > 0).float().mean() + (bad < 0).float().mean()).detach() / 2
        metrics = {"fooled": fooled.detach(), "critic": judged.detach(), "critic_right": right}
        return self.config.weight * min(1.0, 20 * progress) * fooled + judged, metrics
