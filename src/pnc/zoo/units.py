"""Units of work, shared out over workers: one that dies loses its own unit only, which another one repeats."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from pnc.foundation.errors import PNCError

Unit = tuple[str, int]
"""An entry's name, and about how many images of the support to look at."""

MAX_TRIES = 2
"""A unit that killed so many workers is given up: it may need more memory than there is."""


class WorkerLost(Exception):
    """A worker died, or the machine that it ran on."""


class Worker(Protocol):
    """Looks at one source at a time; lives long, since starting one takes seconds."""

    def look(self, unit: Unit) -> dict[str, Any]:
        """Return the facts of a look, or {"refused": why}.

        Raises:
            WorkerLost: the worker died.
        """

    def close(self) -> None:
        """Stop the worker, whatever it is doing."""


def shared_out(
    units: Sequence[Unit], start: Callable[[], Worker], n_workers: int
) -> Iterator[tuple[Unit, dict[str, Any]]]:
    """Look at all units with several workers; yields results as they come.

    Args:
        units: What to look at.
        start: Starts a worker; called again for each one that died.
        n_workers: Number of workers.
    """
    todo: queue.SimpleQueue[tuple[Unit, int]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Unit, dict[str, Any]] | BaseException] = queue.SimpleQueue()
    stopping = threading.Event()
    for unit in units:
        todo.put((unit, 1))
    left = len(units)
    crew = [
        threading.Thread(target=_work, args=(todo, done, start, stopping), daemon=True)
        for _ in range(min(n_workers, left))
    ]
    for one in crew:
        one.start()
    try:
        while left:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            left -= 1
            yield result
    finally:
        stopping.set()
        for _ in crew:
            todo.put((("", 0), 0))  # wakes those that wait
        for one in crew:
            one.join()


def _work(todo: Any, done: Any, start: Callable[[], Worker], stopping: threading.Event) -> None:
    """Take units until told to stop, with a worker that is started at the first one and after each death."""
    worker: Worker | None = None
    try:
        while True:
            unit, n_tries = todo.get()
            if stopping.is_set():
                return
            try:
                worker = worker or start()
                done.put((unit, worker.look(unit)))
            except WorkerLost as error:
                if worker is not None:
                    worker.close()
                worker = None
                if n_tries < MAX_TRIES:
                    todo.put((unit, n_tries + 1))
                else:
                    done.put((unit, {"refused": f"{n_tries} workers died over it ({error}); out of memory?"}))
    except PNCError as error:  # for the thread that waits for results
        done.put(error)
    finally:
        if worker is not None:
            worker.close()
