"""What training needs next, made beforehand by other processes, so that a GPU need not wait for it."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dreamenv.errors import DreamenvError

_MOST = 8  # processes, where none are asked for
_ROOM = 4 * 2**30  # bytes of shared memory that they want: two batches each, of up to 100 MB and more
_SHARED = "/dev/shm"


class _Items(Dataset[Any]):
    """The items as a dataset: asked for one, it makes what belongs to it, or returns the error that says why not."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make

    def __getitem__(self, item: Any) -> Any:
        try:
            return self._make(item)
        except DreamenvError as error:  # raised here, its text would be lost in a worker's traceback
            return error


def _same(made: Any) -> Any:
    return made


def pick_workers(workers: int | None, device: torch.device) -> int:
    """How many processes work ahead: as many as asked for, else on CUDA one a spare core, up to 8, and none on a CPU.

    Nor are there any, unless asked for, where shared memory is small, as in a container by default.
    """
    if workers is not None:
        return workers
    if device.type != "cuda" or not os.path.isdir(_SHARED) or shutil.disk_usage(_SHARED).free < _ROOM:
        return 0
    return min(len(os.sched_getaffinity(0)) - 1, _MOST)


def prefetch(make: Callable[[Any], Any], items: Iterable[Any], workers: int, device: torch.device) -> Generator[Any]:
    """Yield `make(item)` for each item in order; with workers, forked processes make the next ones meanwhile.

    Args:
        make: what to do, a function of the item alone, on CPU tensors.
        items: any length, also without an end.
        workers: processes; 0 makes each in this one when it is asked for.
        device: where the tensors go next: for CUDA they come in pinned memory.

    Raises:
        DreamenvError: what `make` raised, as it is, also from a worker.
    """
    if not workers:
        yield from map(make, items)
        return
    loader = DataLoader(
        _Items(make),
        batch_size=None,
        sampler=items,
        num_workers=workers,
        collate_fn=_same,
        pin_memory=device.type == "cuda",
        multiprocessing_context="fork",
    )
    with warnings.catch_warnings():  # the workers use one thread and no device
        warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
        made = iter(loader)
    for result in made:
        if isinstance(result, DreamenvError):
            raise result
        yield result
