"""What the training loop asks of a task: a model, batches, a loss, and how good it has become."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from trainers.batch import Batch


class Task(Protocol):
    """One kind of training. A task class is registered as kind "task" and made as `cls(config, model, seed)`.

    Attributes:
        model: what is trained. If it has `learning_rates`, these parameters (name -> factor) learn faster, and do not
            decay.
        auxiliary: networks trained beside the model by the same loss, neither averaged nor saved with it; or None.
    """

    model: nn.Module
    auxiliary: nn.Module | None

    def batch(self, rng: np.random.Generator, size: int) -> Batch:
        """Draw one batch of CPU tensors; all randomness from `rng`."""
        ...

    def graph_key(self, progress: float) -> int | None:
        """Which computation `loss` is now; None: one that must not be recorded as a CUDA graph.

        While it stays the same, on tensors of the same shapes, a step is recorded once and replayed. What is recorded
        must not ask the device for a value, nor use tensors that lie elsewhere.
        """
        ...

    def loss(
        self, model: nn.Module, batch: Any, generator: torch.Generator, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss and metrics to log; noise from `generator`, `progress` in [0, 1)."""
        ...

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Measure the averaged weights; may write pictures to `folder`."""
        ...

    def facts(self) -> dict[str, Any]:
        """What to store with the saved model."""
        ...


@runtime_checkable
class Renewing(Protocol):
    """A task that makes what its batches are drawn from anew as training goes on."""

    def renew(self, step: int) -> bool:
        """Make what the batches from a step on are drawn from, a function of the step; whether that was due."""
        ...
