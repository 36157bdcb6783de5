"""Clones without the search of `pnc`: the whole source, a part at the last position, and the paper's own search."""

from collections.abc import Callable

from pnc.bench.rivals.rival import Budget, Fitted, Rival
from pnc.clones.clone import Clone
from pnc.composite.composite import attach
from pnc.method.pipeline import fit, fit_sequential
from pnc.method.positions import Position, scan
from pnc.method.task import CloneTask


def whole_source(task: CloneTask) -> Clone:
    """From input to input: the clone is the whole source, without localization."""
    return _at(task, lambda position: position.target_cut.index + position.source_cut.index)


def last_position(task: CloneTask) -> Clone:
    """The last cut of both networks, without a search."""
    return _at(task, lambda position: -position.target_cut.index - position.source_cut.index)


def _at(task: CloneTask, key: Callable[[Position], int]) -> Clone:
    found = scan(task, max_cuts=2, exhaustive=True)
    return fit(task, found.adapter(min(found.positions, key=key)))


def _rival(name: str, make: Callable[[CloneTask], Clone]) -> Rival:
    def attached(task: CloneTask, budget: Budget) -> Fitted:
        clone = make(task)
        place = {"target_cut": clone.target_cut.name, "source_cut": clone.source_cut.name}
        return Fitted(attach(task.target.model, clone), place)

    return Rival(name, "clone", attached)


RIVALS = (
    _rival("whole source as clone", whole_source),
    _rival("clone at the last position", last_position),
    _rival("sequential search of the paper", fit_sequential),
)
