"""The process's allocator: whether large blocks are kept when they are freed, or given back to the system.

By default glibc asks the system for every block above 32 MiB and gives it back at once, so the large tensors of a
training step on a CPU are made of fresh pages, which the kernel zeroes one by one. That costs as much as the arithmetic
on them.
"""

import contextlib
import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of mallopt(3)


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for its next tensors; returns whether the C library could be told.

    The process then holds its peak until it ends. For the command line, whose processes do one job; a program that
    uses Opsin as a library decides for itself.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library than glibc
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26))
    told = [mallopt(name, value) for name, value in settings]
    return all(told)


def give_back_freed_memory() -> None:
    """Give the system what this process has freed and its threads' arenas hold, where the C library can (glibc)."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
