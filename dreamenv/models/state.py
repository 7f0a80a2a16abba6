"""What a dream remembers from step to step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor


class State(Mapping[str, Tensor]):
    """What a dream remembers: named tensors that share their first axis, the batch.

    Every state has `latents` float32 (B, K, C, H, W), the current one last, and `actions` int64 (B, K - 1), those
    between them. A family adds what it keeps besides: a canvas, a cache, the game's number.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """How many tensors."""
        return len(self._tensors)

    @property
    def latents(self) -> Tensor:
        """float32 (B, K, C, H, W), the current one last."""
        return self._tensors["latents"]

    @property
    def actions(self) -> Tensor:
        """int64 (B, K - 1)."""
        return self._tensors["actions"]

    def replace(self, **tensors: Tensor) -> State:
        """The same state with some tensors replaced or added."""
        return State({**self._tensors, **tensors})

    def apply(self, function: Callable[[Tensor], Tensor]) -> State:
        """`function` of every tensor."""
        return State({name: function(value) for name, value in self._tensors.items()})

    def rows(self, index: slice | Tensor) -> State:
        """A part of the batch."""
        return self.apply(lambda value: value[index])

    @staticmethod
    def cat(states: list[State]) -> State:
        """Concatenate along the batch."""
        return State({name: torch.cat([state[name] for state in states]) for name in states[0]})

    @staticmethod
    def where(mask: Tensor, yes: State, no: State) -> State:
        """Row by row, `yes` where the mask bool (B,) says so, else `no`."""
        return State({n: torch.where(mask.view(-1, *(1,) * (yes[n].ndim - 1)), yes[n], no[n]) for n in yes})

    def put(self, row: int, other: State) -> None:
        """Overwrite one row, in place, with the only row of another state."""
        for name, value in self._tensors.items():
            value[row] = other[name][0]

    def arrays(self) -> dict[str, np.ndarray]:
        """As NumPy arrays, for snapshots."""
        return {name: value.cpu().numpy() for name, value in self._tensors.items()}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray], device: torch.device) -> State:
        """From what `arrays` returned."""
        return State({name: torch.from_numpy(value).to(device) for name, value in arrays.items()})
