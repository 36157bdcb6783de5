"""The reference strategy: positions from the deepest upward, adapter and head trained by gradient, masks in turn.

This is our reading of the search in *Partial Network Cloning* (Ye, Liu, Wang, CVPR 2023, arXiv:2303.10597), whose
authors published no code. A position is a depth at which both networks are cut. At each, from the deepest upward,
adapter and head are trained on part of the support; if channels are to be removed, masks are then chosen behind the
trained adapter, and both are trained again; the rest of the support scores the result. The search moves up while that
helps. At the best position everything is trained once more, on the whole support.

Deviations: the head gives the new logits only, in the conditional form of `clones/heads.py`, so that the target's own
logits do not change; the learning rate is chosen on held-out images, at the deepest position; the search continues past
a few positions that do not help, since it stopped almost at once otherwise; and the loss includes the source's own
penultimate features, since with the classes alone a few hundred images were memorised, and no position above the second
one helped.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pnc.channels.compaction import own_copy
from pnc.clones.adapter import Adapter, Stitched
from pnc.clones.clone import Clone
from pnc.clones.heads import DiscriminantHead, Head
from pnc.foundation.network_state import undisturbed
from pnc.graph.candidate_cuts import candidate_cuts
from pnc.graph.cut_points import CutPoint, extract
from pnc.method.assembly import assembled
from pnc.method.gradients import check_whole_source, uses_gradient
from pnc.method.held_out import Outcome, counts_for_score, outcome_of, own_head, source_body
from pnc.method.localization.localizer import localize
from pnc.method.positions import MAX_CUTS
from pnc.method.refinement import Schedule, Views, bounded, refining_loss, train, views
from pnc.method.settings import Method, Removal, check_outputs
from pnc.method.source_part import SourcePart
from pnc.method.task import CloneTask, Network, Progress, check_task
from pnc.method.usefulness import usefulness

LEARNING_RATES = (0.001, 0.003, 0.01, 0.03)
N_STEPS = 600
PATIENCE = 3
"""The search ends after this many positions in a row without gain: scores on few held-out images are noisy."""
HELD_OUT_SHARE = 0.4


@dataclass(frozen=True, eq=False)
class Trained:
    """The pieces trained at one position, with their held-out outcome."""

    adapter: Adapter
    part: SourcePart
    head: Head
    learning_rate: float
    outcome: Outcome


@undisturbed()
def fit_sequential(
    task: CloneTask,
    *,
    density: float = 1.0,
    method: Method = "gates",
    round_to: int = 1,
    name: str | None = None,
    progress: Progress | None = None,
) -> Clone:
    """Make a clone with the paper's search: `strategy="sequential"` of `clone`.

    Args:
        task: From `prepare_task`.
        density: As in `clone`.
        method: As in `clone`.
        round_to: As in `clone`.
        name: As in `clone`.
        progress: As in `clone`.
    Raises:
        InputError: an argument is out of range.
    """
    removal = Removal(density, method, round_to)
    density = removal.fixed_density
    check_outputs(name, None, progress)
    check_task(task)
    usefulness(task)
    check_whole_source(task, uses_gradient(removal, refine=False, sequential=True))

    def part_of(adapter: Adapter) -> SourcePart:
        return localize(task, adapter, density, method, norms=method == "gates", hold_out=False, round_to=round_to)

    found = search(task, part_of, progress)
    facts = {
        "learning_rate": found.learning_rate,
        "method": None if found.part.masks is None else method,
        "strategy": "sequential",
    }
    return assembled(task, found.adapter, found.part, found.head, found.outcome, 0.0, name, facts)


def search(task: CloneTask, part_of: Callable[[Adapter], SourcePart], progress: Progress | None = None) -> Trained:
    """Search for a position as the paper does.

    Args:
        task: From `prepare_task`.
        part_of: Makes the source's part behind an adapter, with or without masks.
        progress: Called after each training.
    Returns:
        The pieces trained on the whole support at the best position, with the position's earlier outcome on held-out
        images.
    """
    pairs, n_done = depths(task), itertools.count(1)
    task = bounded(task, max((cut for cut, _ in pairs), key=lambda cut: cut.size))
    held_out = _held_out(task)

    def fit(place: _Place, learning_rate: float, rows: Tensor) -> Trained:
        found = place.fit(learning_rate, rows, held_out)
        if progress is not None:
            progress("searching upward", next(n_done), len(LEARNING_RATES) + len(pairs))
        return found

    best_place, best_number = _Place(task, *pairs[0], part_of), 0
    deepest = [fit(best_place, rate, ~held_out) for rate in LEARNING_RATES]
    best = max(deepest, key=lambda found: found.outcome.average)
    rate = best.learning_rate
    for number, pair in enumerate(pairs[1:], 1):
        if number - best_number > PATIENCE:
            break
        place = _Place(task, *pair, part_of)
        found = fit(place, rate, ~held_out)
        if found.outcome.average[0] > best.outcome.average[0]:
            best, best_place, best_number = found, place, number
    return replace(fit(best_place, rate, torch.ones_like(held_out)), outcome=best.outcome)


def depths(task: CloneTask) -> list[tuple[CutPoint, CutPoint]]:
    """List the positions of the search, deepest first: each source cut with the target cut of most similar depth."""

    def depth(cut: CutPoint, network: Network) -> float:
        return cut.n_macs / network.head.features.n_macs

    target_cuts = candidate_cuts(task.target.recording, MAX_CUTS)
    source_cuts = candidate_cuts(task.source.recording, MAX_CUTS)
    return [
        (min(target_cuts, key=lambda t: abs(depth(t, task.target) - depth(s, task.source))), s)
        for s in reversed(source_cuts)
    ]


class _Place:
    """Trains at one position."""

    def __init__(
        self, task: CloneTask, target_cut: CutPoint, source_cut: CutPoint, part_of: Callable[[Adapter], SourcePart]
    ) -> None:
        self._task, self._target_cut, self._source_cut, self._part_of = task, target_cut, source_cut, part_of

    @cached_property
    def _views(self) -> Views:
        return views(self._task, self._target_cut)

    def fit(self, learning_rate: float, rows: Tensor, held_out: Tensor) -> Trained:
        """Train adapter and head on `rows`, mask, train again, and score on `held_out`; both are (N,) bool."""
        task, schedule = self._task, Schedule(learning_rate, N_STEPS)
        data, generator = self._views.select(rows), torch.Generator().manual_seed(task.seed)
        body, features = own_copy(source_body(task, self._source_cut)), task.source.head.features
        adapter, head = self._start(generator)
        ((adapter, head),) = train(Stitched(adapter, body, features), head, data, refining_loss, schedule, generator)
        part = self._part_of(adapter)
        if part.masks is not None:
            behind = Stitched(adapter, part.module, features)
            ((adapter, head),) = train(behind, head, data, refining_loss, schedule, generator)
        scored = held_out & counts_for_score(task)
        unseen = self._views.select(scored)
        correct = _logits(Stitched(adapter, part.module, features), head, unseen, task.batch_size).argmax(1)
        hits = correct.cpu() == task.samples.labels[scored]
        return Trained(adapter, part, head, learning_rate, outcome_of(hits, task, scored))

    def _start(self, generator: torch.Generator) -> tuple[Adapter, Head]:
        task = self._task
        adapter = Adapter(self._target_cut, self._source_cut, _is_rectified(task, self._source_cut))
        for weight in (adapter.weight, adapter.prefix_weight):
            weight.normal_(0, weight[0].numel() ** -0.5 if weight.numel() else 0, generator=generator)
        head: Head
        if task.has_base:
            n_features = self._views.target_features.shape[1] + self._views.source_features.shape[1]
            head = DiscriminantHead(task.n_base, task.n_base + len(task.new_classes), n_features)
        else:
            head = own_head(task)
        return adapter.to(task.target.device), head.to(task.target.device)


def _held_out(task: CloneTask) -> Tensor:
    """Samples that choose learning rate and position, (N,) bool; all, if nothing can be held out."""
    n_folds = max(1, round(HELD_OUT_SHARE * task.samples.n_folds))
    return task.samples.folds < n_folds


@torch.no_grad()
def _logits(stitched: Stitched, head: Head, data: Views, batch_size: int) -> Tensor:
    """The composite's logits, (N, K_base + K_new)."""
    made = []
    for rows in torch.arange(len(data.labels)).split(batch_size):
        batch = data.select(rows)
        new = head(batch.target_features, stitched(batch.tensors), batch.base_logits)
        made.append(torch.cat([batch.base_logits, new], 1))
    return torch.cat(made)


def _is_rectified(task: CloneTask, cut: CutPoint) -> bool:
    """Whether the source's tensor at `cut` is never negative on the support."""
    prefix = extract(task.source.recording, None, [cut])
    with torch.no_grad():
        batches = task.samples.batches(task.batch_size)
        return all(bool((prefix(images.to(task.source.device)) >= 0).all()) for _, images in batches)
