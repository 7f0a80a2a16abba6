"""Opening Procgen's library, quietly and without locking up."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import threading
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Silence gym 0.26 and Shimmy, which announce on stderr that they are old, where they are imported and made."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Hold off the garbage collector while gym3 opens the game's library.

    The collector may close an abandoned game there, which takes the cffi lock that the opening already holds: gym3's
    `__del__` then waits for itself forever.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _open_once(ffi: Any) -> None:
    """Let gym3 open the game's library once a process: cffi keeps whatever it opened, 8 KiB for each environment."""
    if not hasattr(ffi.dlopen, "cache_info"):
        ffi.dlopen = functools.cache(ffi.dlopen)


_making = threading.Lock()  # silencing and the collector's switch belong to the whole process


def make_procgen(**options: Any) -> Any:
    """Return a `ProcgenGym3Env`, made so that the garbage collector cannot lock it up.

    Raises:
        ImportError: procgen is not installed; the message says how to.
    """
    try:
        with _making, quiet_import():
            from procgen import ProcgenGym3Env
    except ImportError as error:
        raise ImportError(f"the real game needs procgen ({error}): pip install 'dreamenv[procgen]'") from error
    with _making, no_collection():
        env = ProcgenGym3Env(**options)
        _open_once(env._ffi)
        for name in ("libenv_act", "libenv_observe", "libenv_close", "get_state", "set_state"):
            getattr(env._c_lib, name)  # resolved once, under the same lock
    return env


def fresh_state(rand_seed: int, **options: Any) -> bytes:
    """The saved state of a new game; the levels that it plays are decided by `rand_seed` and the options."""
    fresh = make_procgen(num=1, rand_seed=rand_seed, num_threads=0, **options)
    try:
        return fresh.get_state()[0]
    finally:
        fresh.close()


def procgen_version() -> str:
    """The version of the installed procgen, under either of its names."""
    for name in ("procgen-mirror", "procgen"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"
