"""Memory that a server has freed stays with its process."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MUCH = 1 << 30
_OLD_LIMIT = 32 << 20
"""Largest threshold in bytes, above which allocations are mapped, that older versions of glibc allow."""


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, for the whole process, instead of returning it to the system after each batch.

    A network allocates and frees the same maps for every batch. What was returned has to be mapped again, page by page,
    which can take a quarter of a server's time; whether glibc returns it depends on where the maps happen to lie.
    Threads that start later share one heap, since those of their own hold 64 MiB at most and are returned whole.

    Returns:
        Whether it could be set; False for other C libraries.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(_M_TRIM_THRESHOLD, _MUCH) and mallopt(_M_ARENA_MAX, 1)):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MUCH) or mallopt(_M_MMAP_THRESHOLD, _OLD_LIMIT))
