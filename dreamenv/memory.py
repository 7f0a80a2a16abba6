"""Memory settings that CPU training wants."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, for this process: up to 1 GiB a block is taken from the heap and stays there.

    Training frees and asks for the same few hundred megabytes at every step; giving them back to the system and faulting
    them in again cost half of the time of an IMPALA update of 2,048 frames on two cores. Called by the training programs,
    never on import.

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
