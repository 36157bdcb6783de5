"""Units shared out over workers: dead ones are replaced, and only what one was doing is done again."""

import threading

import pytest

from pnc.foundation.errors import InputError
from pnc.zoo.units import WorkerLost, shared_out


class Crew:
    """Workers that die when they see a deadly unit, as often as it says."""

    def __init__(self, deadly: dict[str, int]) -> None:
        self.deadly, self.lock = dict(deadly), threading.Lock()
        self.started, self.closed, self.looks = 0, 0, []

    def start(self) -> "Crew":
        with self.lock:
            self.started += 1
        return self

    def look(self, unit):
        with self.lock:
            self.looks.append(unit[0])
            if self.deadly.get(unit[0], 0):
                self.deadly[unit[0]] -= 1
                raise WorkerLost("exit status -9")
        return {"name": unit[0]}

    def close(self) -> None:
        with self.lock:
            self.closed += 1


UNITS = [(f"unit {number}", 10) for number in range(20)]


@pytest.mark.parametrize("n_workers", [1, 3, 50])
def test_every_unit_is_done_once(n_workers: int) -> None:
    crew = Crew({})
    found = dict(shared_out(UNITS, crew.start, n_workers))
    assert sorted(found) == sorted(UNITS) and sorted(crew.looks) == sorted(name for name, _ in UNITS)
    assert crew.started == crew.closed <= min(n_workers, len(UNITS))


def test_a_killed_worker_costs_its_unit_only() -> None:
    crew = Crew({"unit 3": 1, "unit 7": 1})
    found = dict(shared_out(UNITS, crew.start, 2))
    assert all(facts == {"name": unit[0]} for unit, facts in found.items()) and len(found) == len(UNITS)
    assert len(crew.looks) == len(UNITS) + 2 and crew.closed == crew.started


def test_a_unit_that_kills_every_worker_is_given_up() -> None:
    crew = Crew({"unit 3": 99})
    found = dict(shared_out(UNITS, crew.start, 2))
    assert found["unit 3", 10] == {"refused": "2 workers died over it (exit status -9); out of memory?"}
    assert sum("refused" in facts for facts in found.values()) == 1


def test_a_worker_that_cannot_start_stops_the_job() -> None:
    def fail() -> Crew:
        raise InputError("no worker")

    with pytest.raises(InputError, match="no worker"):
        list(shared_out(UNITS, fail, 2))


def test_stopping_early_closes_all_workers() -> None:
    crew = Crew({})
    results = shared_out(UNITS, crew.start, 2)
    next(results)
    results.close()
    assert crew.closed == crew.started
