"""What the decoder draws of a dreamt step, against the true frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dreamenv.config import check
from dreamenv.models.interface import to_images
from dreamenv.models.registry import register
from trainers.rollout import DynamicsBatch, Rollouts
from trainers.terms.interface import Setting, Term

_BEST = 1e-5  # mean squared error of a picture from which on it need not become better: 50 dB


@dataclass(frozen=True)
class PictureConfig:
    """Settings of the pictures' error."""

    weight: float = 0.1
    """Its weight, in units of -10 dB."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.weight >= 0, f"weight {self.weight}: must be >= 0")


class Decoded(Term):
    """Base of terms that look at pictures: of each sample one dreamt step is decoded and held against the true frame.

    Attributes:
        name: by which its part of a batch goes.
    """

    name: ClassVar[str]

    def __init__(self, config: Any, setting: Setting) -> None:
        super().__init__(config, setting)
        self._data = setting.data

    def extra(self, rng: np.random.Generator, indices: np.ndarray, live: np.ndarray) -> dict[str, Tensor]:
        """Which step is drawn, 1..U, whether it exists, and its frame."""
        size, u = live.shape
        step, row = rng.integers(1, u, size=size, endpoint=True), np.arange(size)
        frames = self._data.frames(indices[row, indices.shape[1] - u - 1 + step])
        return {
            f"{self.name}.step": torch.from_numpy(step),
            f"{self.name}.live": torch.from_numpy(live[row, step - 1]),
            f"{self.name}.frames": torch.from_numpy(frames),
        }

    def decoded(self, rollouts: Rollouts) -> tuple[Tensor, Tensor, Tensor]:
        """Dreamt images (B, c, h, w), the true ones, and float (B,), 1 where the step exists."""
        extra, rollout = rollouts.batch.extra, rollouts.mean
        step, k = extra[f"{self.name}.step"], rollouts.dynamics.context
        rows = torch.arange(len(rollout.trail), device=step.device)
        images = rollouts.decoded(rollout.trail[rows, k - 1 + step])
        return images, to_images(extra[f"{self.name}.frames"]), extra[f"{self.name}.live"].float()


@register("term", "picture", PictureConfig)
class Picture(Decoded):
    """The mean of the pictures' PSNR, of one dreamt step of each sample.

    A squared error is decided by the pictures that nobody could have known, their mean PSNR by all alike.
    """

    name = "picture"
    config: PictureConfig

    def __init__(self, config: PictureConfig, setting: Setting) -> None:
        super().__init__(config, setting)

    def forward(self, rollouts: Rollouts, batch: DynamicsBatch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Term.forward`."""
        images, real, live = self.decoded(rollouts)
        mse = (images - real).square().mean((1, 2, 3))
        picture = ((mse + _BEST).log10() * live).sum() / live.sum().clamp_min(1)
        return self.config.weight * picture, {"picture": picture.detach()}
