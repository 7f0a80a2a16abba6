"""Typed batches: dataclasses of tensors that travel to a device together, where floats become float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

B = TypeVar("B", bound="Batch")


@dataclass(frozen=True)
class Batch:
    """Base of a training step's data. Fields are tensors with a leading batch axis, mappings of such, or None."""

    def map(self: B, function: Callable[[Tensor], Tensor]) -> B:
        """`function` of every tensor."""

        def each(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: each(inner) for name, inner in value.items()}
            return value if value is None else function(value)

        return replace(self, **{f.name: each(getattr(self, f.name)) for f in fields(self)})

    def tensors(self) -> Iterator[Tensor]:
        """All of them, always in the same order."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, dict):
                yield from (value[name] for name in sorted(value))
            elif value is not None:
                yield value

    def to(self: B, device: torch.device) -> B:
        """On a device; whatever floats were stored in, they are float32 there, under any autocast."""

        def move(value: Tensor) -> Tensor:
            value = value.to(device, non_blocking=True)
            return value.float() if value.is_floating_point() else value

        return self.map(move)

    def rows(self: B, index: slice | Tensor) -> B:
        """A part of the batch."""
        return self.map(lambda value: value[index])

    def pin_memory(self: B) -> B:
        """In page-locked memory, from which a GPU copies while it computes; PyTorch's loader asks for it."""
        return self.map(lambda value: value.pin_memory())
