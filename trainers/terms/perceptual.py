"""How alike decoded frames and true ones look to a network that has learnt to see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dreamenv.config import check
from dreamenv.evaluation.perceptual import image_features
from dreamenv.models.registry import register
from trainers.rollout import DynamicsBatch, Rollouts
from trainers.terms.interface import Setting
from trainers.terms.picture import Decoded


@dataclass(frozen=True)
class PerceptualConfig:
    """Settings of the perceptual term."""

    weight: float = 0.1
    """Its weight."""
    samples: int = 8
    """How many pictures of a batch are looked at, for each costs as much as many predictions."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.weight >= 0, f"weight {self.weight}: must be >= 0")
        check(self.samples >= 1, f"samples {self.samples}: must be >= 1")


@register("term", "perceptual", PerceptualConfig)
class Perceptual(Decoded):
    """The perceptual distance of `dreamenv compare`, as a loss through the decoder.

    In the manner of LPIPS (Zhang et al. 2018), on features of EfficientNet-Lite0, whose weights come with the `play`
    extra. A model that was trained with it cannot be judged by that distance alone.
    """

    name = "perceptual"
    config: PerceptualConfig

    def __init__(self, config: PerceptualConfig, setting: Setting) -> None:
        super().__init__(config, setting)

    def graph_key(self, progress: float) -> int | None:
        """None: the network of features is loaded when it is first needed."""
        return None

    def forward(self, rollouts: Rollouts, batch: DynamicsBatch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Term.forward`."""
        images, real, live = (part[: self.config.samples] for part in self.decoded(rollouts))
        pictures = [255 * (x if x.shape[1] == 3 else x.expand(-1, 3, -1, -1)) for x in (images, real)]
        dreamt, _ = image_features(pictures[0].clamp(0, 255), last=False)
        with torch.no_grad():
            true, _ = image_features(pictures[1], last=False)
        layers = [(a.float() - b.float()).square().sum(1).mean((1, 2)) for a, b in zip(dreamt, true, strict=True)]
        distance = (torch.stack(layers).mean(0) * live).sum() / live.sum().clamp_min(1)
        return self.config.weight * distance, {"perceptual": distance.detach()}
