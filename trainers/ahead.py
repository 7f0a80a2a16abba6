"""What training needs next, made beforehand: by other processes, so that a GPU does not wait for memory to be copied."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

_MOST = 8  # processes, where none are asked for


class _Items(Dataset[Any]):
    """The items as a dataset: asked for one, it makes what belongs to it."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make

    def __getitem__(self, item: Any) -> Any:
        return self._make(item)


def _same(made: Any) -> Any:
    return made


def pick_workers(workers: int | None, device: torch.device) -> int:
    """How many processes work ahead: as many as asked for, else on CUDA one a spare core, up to 8, and none on a CPU."""
    if workers is not None:
        return workers
    return min((os.cpu_count() or 1) - 1, _MOST) if device.type == "cuda" else 0


def ahead(make: Callable[[Any], Any], items: Iterable[Any], workers: int, device: torch.device) -> Iterator[Any]:
    """Yield `make(item)` for each item in order; with workers, forked processes make the next ones meanwhile.

    Args:
        make: what to do, a function of the item alone, on CPU tensors.
        items: any length, also without an end.
        workers: processes; 0 makes each in this one when it is asked for.
        device: where the tensors go next: for CUDA they come in pinned memory.
    """
    if not workers:
        return map(make, items)
    loader = DataLoader(_Items(make), batch_size=None, sampler=cast(Any, items), num_workers=workers, collate_fn=_same,
                        pin_memory=device.type == "cuda", multiprocessing_context="fork")  # fmt: skip
    return iter(loader)
