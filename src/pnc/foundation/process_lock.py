"""Locks that are free again in the child of a fork."""

import os
import threading


class ProcessLock:
    """A reentrant lock that a child of `os.fork` gets unlocked.

    The child does not have the parent's other threads: a lock held by one of them would never be released.
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
