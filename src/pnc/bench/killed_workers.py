"""Rankings of a zoo by several workers, one of which is killed in the middle, compared with that of one process."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from pnc.bench.bench import Row
from pnc.zoo import rank as ranking
from pnc.zoo.processes import ProcessWorker
from pnc.zoo.ranking import Ranking
from pnc.zoo.ray_actors import LOCAL, RayWorker
from pnc.zoo.units import Unit

PROCESSES, ACTORS = "2 processes, one killed", "2 actors of Ray, one killed"
N_WORKERS = 2


def rank_and_kill(way: str, ranked: Callable[..., Ranking], victim: str) -> Row:
    """Rank with two workers, and kill the one that is to look at `victim`, once.

    Args:
        way: `PROCESSES` or `ACTORS`.
        ranked: Ranks the zoo; takes `workers` and `ray_address`.
        victim: An entry.
    Returns:
        Order and predicted accuracies, the number of workers killed, and seconds by the clock.
    """
    killed: list[int] = []

    def kill_before(worker: ProcessWorker | RayWorker, unit: Unit) -> None:
        if unit[0] == victim and not killed:
            killed.append(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)

    class Process(ProcessWorker):
        def look(self, unit: Unit) -> dict[str, Any]:
            kill_before(self, unit)
            return super().look(unit)

    class Actor(RayWorker):
        def look(self, unit: Unit) -> dict[str, Any]:
            kill_before(self, unit)
            return super().look(unit)

    started = time.perf_counter()
    with patch.object(ranking, "ProcessWorker", Process), patch.object(ranking, "RayWorker", Actor):
        found = ranked(workers=N_WORKERS, ray_address=LOCAL if way == ACTORS else None)
    return {
        "order": [one.name for one in found.ranked],
        "predicted": [one.predicted for one in found.ranked],
        "killed": len(killed),
        "seconds": time.perf_counter() - started,
    }
