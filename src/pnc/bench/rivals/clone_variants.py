"""Clones without the search of `pnc`: the whole source, a part at the last position, and the paper's own search."""

from collections.abc import Callable

from pnc.bench.rivals.rival import Budget, Fitted, Rival
from pnc.clones.adapter import Adapter
from pnc.clones.clone import Clone
from pnc.composite.composite import attach
from pnc.graph.cut_points import cut_points
from pnc.method.adapter_fitting import CrossFitted
from pnc.method.paper_search import fit_sequential
from pnc.method.pipeline import fit
from pnc.method.positions import scan
from pnc.method.task import CloneTask

WHOLE, LAST = "whole source as clone", "clone at the last position"


def whole_source(task: CloneTask) -> Clone:
    """From input to input: the clone is the whole source, without localization."""
    in_target, in_source = (cut_points(network.recording)[0] for network in (task.target, task.source))
    same = Adapter(in_target, in_source, is_identity=True)
    return fit(task, CrossFitted(same, (same,) * task.samples.n_folds, 0.0, task_key=task.key))


def last_position(task: CloneTask) -> Clone:
    """The last cut of both networks, without a search."""
    found = scan(task, max_cuts=2, exhaustive=True)
    last = max(found.positions, key=lambda one: one.target_cut.index + one.source_cut.index)
    return fit(task, found.adapter(last))


def _rival(name: str, make: Callable[[CloneTask], Clone]) -> Rival:
    def attached(task: CloneTask, budget: Budget) -> Fitted:
        clone = make(task)
        place = {"target_cut": clone.target_cut.name, "source_cut": clone.source_cut.name}
        return Fitted(attach(task.target.model, clone), place)

    return Rival(name, "clone", attached)


RIVALS = (
    _rival(WHOLE, whole_source),
    _rival(LAST, last_position),
    _rival("sequential search of the paper", fit_sequential),
)
