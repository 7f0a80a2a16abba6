"""What a loss term is: settings, networks of its own, what it wants of a batch, and a loss of rollouts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from dreamenv.models.interface import Codec, Dynamics
from trainers.latent_data import LatentDataset
from trainers.rollout import DynamicsBatch, Rollouts


@dataclass(frozen=True)
class Setting:
    """What a term is set among.

    Attributes:
        data: what is trained on.
        codec: the one whose latents it holds.
        dynamics: what is trained.
        unroll: steps of a sample.
    """

    data: LatentDataset
    codec: Codec
    dynamics: Dynamics
    unroll: int


class Term(nn.Module, ABC):
    """One term of the loss of dynamics. Its parameters, if any, are trained beside the model and not saved with it.

    Attributes:
        columns: optional columns of a dataset that it needs, see `dreamenv.data.manifest`.

    Args:
        config: its settings.
        setting: what it is set among.
    """

    columns: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, setting: Setting) -> None:
        super().__init__()
        self.config, self.unroll = config, setting.unroll

    @property
    def draws(self) -> tuple[float, int] | None:
        """Which share of the samples it wants to go on from draws, and how many rollouts of each; None for none."""
        return None

    def choose(self, rng: np.random.Generator, now: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The steps int64 (B,) at which samples begin, and the last of each that exists; it may want others."""
        return now, last

    def extra(self, rng: np.random.Generator, indices: np.ndarray, live: np.ndarray) -> dict[str, Tensor]:
        """What it wants of a batch besides, by names that begin with its own.

        Args:
            rng: all randomness.
            indices: int64 (B, K + U), the steps of each sample.
            live: bool (B, U), which of those to predict exist.
        """
        return {}

    def graph_key(self, progress: float) -> int | None:
        """Which computation it is at this part of the training; None: one that must not be recorded as a CUDA graph."""
        return 0

    @abstractmethod
    def forward(self, rollouts: Rollouts, batch: DynamicsBatch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss, a scalar, and metrics to log.

        Args:
            rollouts: the predictions.
            batch: all samples, on the device.
            progress: which part of the training is done, in [0, 1).
        """
