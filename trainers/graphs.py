"""A training step as a CUDA graph: recorded once and replayed, for small networks wait for Python otherwise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainers.batch import Batch

Gradients = Callable[[Batch, torch.Generator], tuple[dict[str, Tensor], list[Tensor]]]


class Recorded:
    """A step's loss and gradients, to be replayed on other batches of the same shapes.

    Args:
        gradients: what is recorded, see `trainers.loop.Loop.gradients`.
        key: which computation it is, see `graph_key` of `trainers.tasks.interface.Task`.
        batch: the first one, on the device.
        device: a CUDA device.
    """

    def __init__(self, gradients: Gradients, key: int, batch: Batch, device: torch.device) -> None:
        self.key = key
        self._batch = batch.map(torch.clone)
        self._generator = torch.Generator(device).manual_seed(0)
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # what is chosen or set up at a first use must not be recorded
                for _ in range(3):
                    gradients(self._batch, self._generator)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            self._graph.register_generator_state(self._generator)
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._result = gradients(self._batch, self._generator)

    def replay(self, batch: Batch, seed: int) -> tuple[dict[str, Tensor], list[Tensor]]:
        """See `trainers.loop.Loop.gradients`; what it returns holds until the next replay."""
        for own, value in zip(self._batch.tensors(), batch.tensors(), strict=True):
            own.copy_(value, non_blocking=True)
        self._generator.manual_seed(seed)
        self._graph.replay()
        return self._result
