"""Scan of positions: where in the target, and from where in the source on, a clone costs least and keeps most.

A position is a pair of cuts. Two passes of the support through both networks score them in closed form: the first
gathers the moments from which the adapter of every pair is solved; the second runs the source's rest behind the adapters
of the promising pairs, fits the head and measures it on held-out folds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from pnc.cuts import LOGITS, CutPoint, candidate_cuts, extract
from pnc.errors import InputError
from pnc.heads import HeadSamples, choose_shrinkage
from pnc.integrity import evaluating
from pnc.stitching import Adapter, AdapterFitter, Stitched, pool
from pnc.task import CloneTask

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the steps done, and the steps in all."""

MAX_CUTS = 12
MAX_POSITIONS = 256
N_FOLDS = 5


@dataclass(frozen=True)
class Position:
    """Where a clone leaves the target and enters the source, what that is worth and what it costs.

    Attributes:
        target_cut: The clone reads the target's tensor here.
        source_cut: The clone is the source from here on.
        adapter_error: Share of the variance of the source's tensor that the adapter misses on the support, in [0, 1].
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
        adapters: The fitted adapter of each, by the names of its two cuts.
        adapter_errors: The adapters' errors of all pairs of cuts, scored or not, by the names of the two cuts.
    """

    positions: tuple[Position, ...]
    adapters: Mapping[tuple[str, str], Adapter]
    adapter_errors: Mapping[tuple[str, str], float]

    def adapter(self, position: Position) -> Adapter:
        """Give the adapter of a scored position."""
        return self.adapters[position.target_cut.name, position.source_cut.name]

    def front(self) -> tuple[Position, ...]:
        """List the positions that no other one beats in both score and added MACs, cheapest first."""
        front: list[Position] = []
        for position in sorted(self.positions, key=lambda p: (p.n_macs, -p.score)):
            if not front or position.score > front[-1].score:
                front.append(position)
        return tuple(front)

    def choose(self, max_macs: float | None = None) -> Position:
        """Choose the cheapest position that is not significantly worse than the best one.

        Not significantly: its score lies within one standard error of the difference, over the same held-out samples.

        Args:
            max_macs: Bound on the added MACs as a share of the source's, in (0, 1]; None for no bound.
        Raises:
            InputError: no scored position is that cheap; the message names the cheapest.
        """
        allowed = [p for p in self.positions if max_macs is None or p.macs_share <= max_macs]
        if not allowed:
            cheapest = min(p.macs_share for p in self.positions)
            raise InputError(f"max_macs={max_macs}: the cheapest position adds {cheapest:.3f} of the source's MACs")
        best = max(allowed, key=lambda p: p.score)
        close = [p for p in allowed if best.score - p.score <= _difference_error(best, p)]
        return min(close, key=lambda p: (p.n_macs, -p.score))


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
    solved = {(t.name, s.name): fitter.solve(t, s) for t in target_cuts for s in source_cuts}
    errors = {names: error for names, (_, error) in solved.items()}
    chosen = list(solved) if exhaustive else shortlist(target_cuts, source_cuts, errors)
    body_of = {s.name: source_body(task, s) for s in source_cuts}
    stitched = [Stitched(solved[names][0], body_of[names[1]], task.source.head.features) for names in chosen]
    positions = []
    for candidate, samples in zip(stitched, run_stitched(task, stitched, progress), strict=True):
        score, correct = score_samples(task, samples)
        positions.append(_position(task, candidate.adapter, errors, score, correct))
    positions.sort(key=lambda p: (-p.score, p.n_macs))
    return Scan(tuple(positions), {names: solved[names][0] for names in chosen}, errors)


def source_body(task: CloneTask, cut: CutPoint) -> fx.GraphModule:
    """The source from `cut` to its penultimate features, over the source's own weights."""
    return extract(task.source.recording, cut, [task.source.head.features])


def shortlist(
    target_cuts: Sequence[CutPoint], source_cuts: Sequence[CutPoint], errors: Mapping[tuple[str, str], float]
) -> list[tuple[str, str]]:
    """Choose the pairs of cuts that are worth running."""
    return [(t.name, min(source_cuts, key=lambda s: errors[t.name, s.name]).name) for t in target_cuts]


def run_stitched(task: CloneTask, stitched: Sequence[Stitched], progress: Progress | None = None) -> list[HeadSamples]:
    """Run the support through the target once and through every given stitched part; the samples of heads for each."""
    cuts = list(dict.fromkeys(part.adapter.target_cut for part in stitched))
    trunk = extract(task.target.recording, None, [*cuts, task.target.head.features, LOGITS])
    target_features, base_logits = [], []
    clone_features: list[list[Tensor]] = [[] for _ in stitched]
    with evaluating(task.source.model, task.target.model):
        for images in _batches(task, task.target.model, "scoring positions", progress):
            *tensors, features, logits = trunk(images)
            at_cut = dict(zip(cuts, tensors, strict=True))
            target_features.append(pool(features, task.target.head.features).float().cpu())
            base_logits.append(logits.float().cpu())
            for part, collected in zip(stitched, clone_features, strict=True):
                collected.append(part(at_cut[part.adapter.target_cut]).float().cpu())
    samples = HeadSamples(
        target_features=torch.cat(target_features),
        clone_features=torch.empty(0),
        base_logits=torch.cat(base_logits),
        labels=task.samples.labels,
        groups=task.samples.groups,
        n_classes=task.n_base + len(task.new_classes),
    )
    return [replace(samples, clone_features=torch.cat(collected)) for collected in clone_features]


def score_samples(task: CloneTask, samples: HeadSamples) -> tuple[float, Tensor]:
    """Average accuracy on held-out support, and which of the samples were right, (N,) bool.

    Without base samples nothing is fitted: it is the accuracy of the source's own head among the new classes.
    """
    is_base = samples.labels < samples.n_base
    if not samples.has_base:
        correct = source_logits(task, samples).argmax(1) + samples.n_base == samples.labels
        return float(correct.double().mean()), correct
    _, logits = choose_shrinkage(samples, N_FOLDS, task.seed)
    correct = logits.argmax(1) == samples.labels
    return float(correct[is_base].double().mean() + correct[~is_base].double().mean()) / 2, correct


def source_logits(task: CloneTask, samples: HeadSamples) -> Tensor:
    """The source's own logits of the new classes, (N, K_new), from the clone's features."""
    weight, bias = task.source.head.weight, task.source.head.bias
    return samples.clone_features @ weight[task.source_ids].float().T.cpu() + bias[task.source_ids].float().cpu()


def _gather_moments(
    task: CloneTask, target_cuts: Sequence[CutPoint], source_cuts: Sequence[CutPoint], progress: Progress | None
) -> AdapterFitter:
    generator = torch.Generator().manual_seed(task.seed)
    fitter = AdapterFitter(target_cuts, source_cuts, MAX_POSITIONS, generator)
    target_taps = extract(task.target.recording, None, target_cuts)
    source_taps = extract(task.source.recording, None, source_cuts)
    target_names, source_names = [cut.name for cut in target_cuts], [cut.name for cut in source_cuts]
    with evaluating(task.source.model, task.target.model):
        for images in _batches(task, task.target.model, "fitting adapters", progress):
            source_tensors = source_taps(images.to(device_of(task.source.model)))
            fitter.update(
                dict(zip(target_names, target_taps(images), strict=True)),
                dict(zip(source_names, source_tensors, strict=True)),
            )
    return fitter


def _batches(task: CloneTask, what: str, progress: Progress | None) -> Iterator[Tensor]:
    batches = task.samples.images.split(task.batch_size)
    for done, images in enumerate(batches, start=1):
        yield images
        if progress is not None:
            progress(what, done, len(batches))


def _position(
    task: CloneTask, adapter: Adapter, errors: Mapping[tuple[str, str], float], score: float, correct: Tensor
) -> Position:
    target_cut, source_cut, features = adapter.target_cut, adapter.source_cut, task.source.head.features
    n_macs = adapter.n_macs + features.n_macs - source_cut.n_macs
    return Position(
        target_cut=target_cut,
        source_cut=source_cut,
        adapter_error=errors[target_cut.name, source_cut.name],
        score=score,
        correct=correct,
        n_macs=n_macs,
        n_params=adapter.n_params + features.n_params - source_cut.n_params,
        macs_share=n_macs / task.source.recording.n_macs,
    )
