"""Scan of positions: where in the target, and from where in the source on, a clone costs least and keeps most.

A position is a pair of cuts. Two passes of the support through both networks score them in closed form: the first
gathers the moments from which the adapter of every pair is solved; the second runs the source's rest behind the
adapters of the promising pairs, fits the head and measures it on held-out folds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from pnc.cuts import LOGITS, CutPoint, candidate_cuts, extract
from pnc.errors import InputError
from pnc.heads import HeadSamples, choose_shrinkage
from pnc.stitching import AdapterFitter, CrossFitted, Stitched, pool
from pnc.task import CloneTask

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the steps done, and the steps in all."""

MAX_CUTS = 12
TOLERANCE = 0.005
RUNNER_UP = 1.1


@dataclass(frozen=True, eq=False)
class Position:
    """Where a clone leaves the target and enters the source, what that is worth and what it costs.

    Attributes:
        target_cut: The clone reads the target's tensor here.
        source_cut: The clone is the source from here on.
        adapter_error: Held-out share of the variance of the source's tensor that the adapter misses.
        score: Average accuracy on held-out support; without base samples the accuracy among the new classes alone.
        standard_error: Of `score`, from the number of held-out samples.
        n_macs: Multiply-accumulates added to the target per sample, without the head.
        n_params: Parameters of the adapter and of the source's part.
        macs_share: `n_macs` as a share of the whole source's.
    """

    target_cut: CutPoint
    source_cut: CutPoint
    adapter_error: float
    score: float
    standard_error: float
    n_macs: int
    n_params: int
    macs_share: float


@dataclass(frozen=True, eq=False)
class Scan:
    """What `scan` found.

    Attributes:
        positions: The scored positions, best first.
        adapters: The fitted adapters of each, by the names of its two cuts.
        adapter_errors: The adapters' errors of all pairs of cuts, scored or not, by the names of the two cuts.
    """

    positions: tuple[Position, ...]
    adapters: Mapping[tuple[str, str], CrossFitted]
    adapter_errors: Mapping[tuple[str, str], float]

    def adapter(self, position: Position) -> CrossFitted:
        """Give the adapters of a scored position."""
        return self.adapters[position.target_cut.name, position.source_cut.name]

    def front(self) -> tuple[Position, ...]:
        """List the positions that no other one beats in both score and added MACs, cheapest first."""
        front: list[Position] = []
        for position in sorted(self.positions, key=lambda p: (p.n_macs, -p.score)):
            if not front or position.score > front[-1].score:
                front.append(position)
        return tuple(front)

    def choose(self, max_macs: float | None = None, tolerance: float = TOLERANCE) -> Position:
        """Choose the cheapest position whose score lies within `tolerance` of the best one's.

        Args:
            max_macs: Bound on the added MACs as a share of the source's, in (0, 1]; None for no bound.
            tolerance: Accuracy that may be given up for lower cost, in [0, 1].
        Raises:
            InputError: no scored position is that cheap; the message names the cheapest.
        """
        allowed = [p for p in self.positions if max_macs is None or p.macs_share <= max_macs]
        if not allowed:
            cheapest = min(p.macs_share for p in self.positions)
            raise InputError(f"max_macs={max_macs}: the cheapest position adds {cheapest:.3f} of the source's MACs")
        best = max(p.score for p in allowed)
        return min((p for p in allowed if p.score >= best - tolerance), key=lambda p: (p.n_macs, -p.score))


def scan(
    task: CloneTask, *, max_cuts: int = MAX_CUTS, exhaustive: bool = False, progress: Progress | None = None
) -> Scan:
    """Score positions for `task` in closed form.

    Args:
        task: From `prepare_task`.
        max_cuts: Cuts taken of each network, spread over its depth in MACs.
        exhaustive: Score every pair of cuts, not only the promising ones.
        progress: Called after each batch.
    """
    target_cuts = candidate_cuts(task.target.recording, max_cuts)
    source_cuts = candidate_cuts(task.source.recording, max_cuts)
    fitter = _gather_moments(task, target_cuts, source_cuts, progress)
    errors = {(t.name, s.name): fitter.error(t, s) for t in target_cuts for s in source_cuts}
    chosen = [(t, s) for t in target_cuts for s in source_cuts]
    if not exhaustive:
        chosen = shortlist(target_cuts, source_cuts, errors)
    adapters = {(t.name, s.name): fitter.solve(t, s) for t, s in chosen}
    bodies = {s: source_body(task, s) for s in source_cuts}
    parts = [(adapters[t.name, s.name], bodies[s]) for t, s in chosen]
    positions = []
    for (fitted, _), samples in zip(parts, run_parts(task, parts, progress), strict=True):
        positions.append(_position(task, fitted, held_out_correct(task, samples)))
    positions.sort(key=lambda p: (-p.score, p.n_macs))
    return Scan(tuple(positions), adapters, errors)


def source_body(task: CloneTask, cut: CutPoint) -> fx.GraphModule:
    """The source from `cut` to its penultimate features, over the source's own weights."""
    return extract(task.source.recording, cut, [task.source.head.features])


def shortlist(
    target_cuts: Sequence[CutPoint], source_cuts: Sequence[CutPoint], errors: Mapping[tuple[str, str], float]
) -> list[tuple[CutPoint, CutPoint]]:
    """Choose the pairs of cuts that are worth running: their number grows linearly with that of the cuts.

    What a position costs is decided by its source cut; among the target cuts it is the one whose adapter misses least,
    and the next one where that is nearly as good.
    """
    chosen = []
    for s in source_cuts:
        ranked = sorted(target_cuts, key=lambda t: errors[t.name, s.name])
        bound = RUNNER_UP * errors[ranked[0].name, s.name]
        chosen += [(t, s) for t in ranked[:2] if errors[t.name, s.name] <= bound]
    return chosen


def run_parts(
    task: CloneTask, parts: Sequence[tuple[CrossFitted, nn.Module]], progress: Progress | None = None
) -> list[HeadSamples]:
    """Run the support once through the target and through given parts of the source behind their adapters.

    Each image takes the adapter that was fitted without its fold.

    Args:
        task: Whose support and target.
        parts: Adapters, and the source from the adapters' cut to its penultimate features.
        progress: Called after each batch.
    Returns:
        What heads are fitted on, for each part.
    """
    cuts = list(dict.fromkeys(fitted.adapter.target_cut for fitted, _ in parts))
    trunk = extract(task.target.recording, None, [*cuts, task.target.head.features, LOGITS])
    target_features, base_logits = [], []
    clone_features: list[list[Tensor]] = [[] for _ in parts]
    for fold, images in _batches(task, "scoring positions", progress):
        with torch.no_grad():
            *tensors, features, logits = trunk(images.to(task.target.device))
            at_cut = dict(zip(cuts, tensors, strict=True))
            target_features.append(pool(features, task.target.head.features).float().cpu())
            base_logits.append(logits.float().cpu())
            for (fitted, body), collected in zip(parts, clone_features, strict=True):
                stitched = Stitched(fitted.held_out[fold], body, task.source.head.features)
                collected.append(stitched(at_cut[fitted.adapter.target_cut]).float().cpu())
    samples = HeadSamples(
        target_features=torch.cat(target_features),
        clone_features=torch.empty(0),
        base_logits=torch.cat(base_logits),
        labels=task.samples.labels,
        folds=task.samples.folds,
        n_classes=task.n_base + len(task.new_classes),
    )
    return [replace(samples, clone_features=torch.cat(collected)) for collected in clone_features]


def held_out_correct(task: CloneTask, samples: HeadSamples) -> Tensor:
    """Which samples are classified right by a head that was fitted without them, (N,) bool.

    Without base samples nothing is fitted, and the source's own head is asked among the new classes.
    """
    if not samples.has_base:
        return source_logits(task, samples.clone_features).argmax(1) + samples.n_base == samples.labels
    _, logits = choose_shrinkage(samples)
    return logits.argmax(1) == samples.labels


def average_accuracy(correct: Tensor, task: CloneTask) -> tuple[float, float]:
    """Mean of the accuracies on base and on new samples, and its standard error; of one kind where it is alone.

    Args:
        correct: Which samples of the task are right, (N,) bool. Copies of one image count as one observation.
        task: Whose support it is.
    """
    is_base = task.samples.labels < task.n_base
    mean = variance = 0.0
    kinds = [rows for rows in (is_base, ~is_base) if rows.any()]
    for rows in kinds:
        images, index = task.samples.groups[rows].unique(return_inverse=True)
        per_image = torch.zeros(len(images), dtype=torch.float64)
        per_image.scatter_reduce_(0, index, correct[rows].double(), "mean", include_self=False)
        mean += float(per_image.mean()) / len(kinds)
        variance += float(per_image.var(correction=0)) / len(images) / len(kinds) ** 2
    return mean, variance**0.5


def source_logits(task: CloneTask, clone_features: Tensor) -> Tensor:
    """The source's own logits of the new classes, (N, K_new), from the clone's features (N, D_s)."""
    weight, bias = source_classifier(task)
    return clone_features @ weight.T + bias


def source_classifier(task: CloneTask) -> tuple[Tensor, Tensor]:
    """Rows of the source's classifier for the new classes: weight (K_new, D_s) and bias (K_new,), float32 on the CPU.

    Raises:
        InputError: the source's logits are no linear map of its pooled features.
    """
    head = task.source.head
    if head.weight is None or head.features.n_prefix_tokens:
        raise InputError(
            "support: without base samples the source's own classifier is needed, which here is no linear layer on "
            "pooled features; give some samples of every base class"
        )
    bias = head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias
    return head.weight[task.source_ids].float().cpu(), bias[task.source_ids].float().cpu()


def _gather_moments(
    task: CloneTask, target_cuts: Sequence[CutPoint], source_cuts: Sequence[CutPoint], progress: Progress | None
) -> AdapterFitter:
    generator = torch.Generator().manual_seed(task.seed)
    fitter = AdapterFitter(target_cuts, source_cuts, len(task.samples.images), generator)
    target_taps = extract(task.target.recording, None, [*target_cuts, LOGITS])
    source_taps = extract(task.source.recording, None, [*source_cuts, LOGITS])
    for fold, images in _batches(task, "fitting adapters", progress):
        with torch.no_grad():
            target_tensors = target_taps(images.to(task.target.device))
            source_tensors = source_taps(images.to(task.source.device))
        fitter.update(
            fold,
            {cut.name: tensor for cut, tensor in zip(target_cuts, target_tensors, strict=False)},
            {cut.name: tensor for cut, tensor in zip(source_cuts, source_tensors, strict=False)},
        )
    return fitter


def _batches(task: CloneTask, what: str, progress: Progress | None) -> Iterator[tuple[int, Tensor]]:
    done, total = 0, len(task.samples.images)
    for fold, images in task.samples.batches(task.batch_size):
        yield fold, images
        done += len(images)
        if progress is not None:
            progress(what, done, total)


def _position(task: CloneTask, fitted: CrossFitted, correct: Tensor) -> Position:
    adapter = fitted.adapter
    target_cut, source_cut, features = adapter.target_cut, adapter.source_cut, task.source.head.features
    n_macs = adapter.n_macs + features.n_macs - source_cut.n_macs
    score, standard_error = average_accuracy(correct, task)
    return Position(
        target_cut=target_cut,
        source_cut=source_cut,
        adapter_error=fitted.error,
        score=score,
        standard_error=standard_error,
        n_macs=n_macs,
        n_params=adapter.n_params + features.n_params - source_cut.n_params,
        macs_share=n_macs / task.source.n_macs,
    )
