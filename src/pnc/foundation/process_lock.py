"""Locks of one process: the child of a fork has them free."""

import os
import threading


class ProcessLock:
    """A lock that one thread may take several times.

    A child of `os.fork` has none of the other threads, one of which may hold the lock and will never release it there.
    """

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()
