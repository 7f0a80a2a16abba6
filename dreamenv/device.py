"""Where and in which precision networks run, and the memory settings that CPU training wants."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch

from dreamenv.errors import ConfigError

T = TypeVar("T")
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, for this process: up to 1 GiB a block is taken from the heap and stays there.

    Training frees and asks for the same few hundred megabytes at every step; giving them back to the system and
    faulting them in again cost half of the time of an IMPALA update of 2,048 frames on two cores. Called by the
    training programs, never on import.

    Returns:
        Whether it was possible: it is a setting of glibc on Linux.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = ((_M_MMAP_THRESHOLD, 2**30), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26))
    return all([bool(mallopt(name, value)) for name, value in settings])


@contextmanager
def own_settings(device: torch.device, threads: int | None = None) -> Iterator[None]:
    """Run torch with its own defaults whatever the caller has set, and leave the caller's settings as they were.

    What may be set: the default device and dtype, autocast, and the precision of products of fp32. Grad mode does not
    matter here, and no global random generator is used.

    Args:
        device: where the networks run.
        threads: run with so many threads; None leaves their number as it is.
    """
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if (precision := torch.get_float32_matmul_precision()) != "highest":
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, precision)
        if threads is not None and (before := torch.get_num_threads()) != threads:
            torch.set_num_threads(threads)
            stack.callback(torch.set_num_threads, before)
        yield


def side_by_side(work: Callable[[slice], T], parts: list[slice], workers: int, threads: int) -> list[T]:
    """Do `work` on the parts of a batch, several at once, each in a Python thread of its own.

    Torch lets go of the interpreter while it computes, so the parts do run at once. Unlike the threads of one torch
    operation they do not wait for each other before their ends, spinning: with a part to a core it is as fast, and
    another program on the same cores costs its share of time and no more.

    Args:
        work: gets a part; must not change what the others read.
        parts: slices of the batch.
        workers: so many at once; 1 does one after the other in the calling thread, under its number of torch's threads.
        threads: torch's, in each worker.

    Returns:
        What `work` returned, in the order of the parts.

    Raises:
        What `work` raises; of several, that of the first part.
    """
    if workers == 1:
        return [work(part) for part in parts]
    before = torch.get_num_threads()
    if (workers, threads) not in _pools:
        _pools[workers, threads] = ThreadPoolExecutor(workers, "side_by_side", torch.set_num_threads, (threads,))
    try:
        return list(_pools[workers, threads].map(work, parts))
    finally:
        torch.set_num_threads(before)  # a worker that began has set the number that new threads of the caller get


def _after_fork() -> None:
    torch.set_num_threads(1)
    _pools.clear()


if hasattr(os, "register_at_fork"):
    # the threads of the parent do not exist in a forked child, which would wait for them forever
    os.register_at_fork(after_in_child=_after_fork)


def pick_device(device: str | torch.device) -> torch.device:
    """Return a usable device; "auto" is the GPU if there is one.

    Raises:
        ConfigError: no such device, or not on this machine.
    """
    if isinstance(device, str) and device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        rank = os.environ.get("LOCAL_RANK")  # which of torchrun's processes this is
        return torch.device("cuda") if rank is None else torch.device("cuda", int(rank))
    try:
        picked = torch.device(device)
        torch.zeros(1, device=picked).cpu()
    except (RuntimeError, AssertionError, TypeError, ValueError, NotImplementedError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {device!r}: not usable here ({reason}); use 'auto' or 'cpu'") from None
    return picked


def pick_precision(precision: str, device: torch.device) -> str:
    """Return "fp32" or "bf16"; "auto" is bf16 on CUDA and on CPUs with instructions for it, where batches gain a third.

    The environment variable DREAMENV_PRECISION ("fp32" or "bf16") says what "auto" is instead, so that a test or a
    measurement does not depend on the machine's instructions.

    Raises:
        ConfigError: another name.
    """
    if not isinstance(precision, str):
        raise ConfigError(f"precision {precision!r}: must be 'auto', 'fp32' or 'bf16'")
    if precision == "auto":
        precision = os.environ.get("DREAMENV_PRECISION") or "auto"
    if precision not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"precision {precision!r}: must be 'auto', 'fp32' or 'bf16'")
    if precision != "auto":
        return precision
    if device.type == "cpu":
        asked = (getattr(torch.cpu, f"_is_{name}_supported", lambda: False) for name in ("amx_tile", "avx512_bf16"))
        return "bf16" if any(supported() for supported in asked) else "fp32"
    return "bf16" if device.type == "cuda" else "fp32"
