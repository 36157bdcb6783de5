"""Scan: scores positions, pairs of cuts where a clone can leave the target and enter the source.

Two passes of the support score them in closed form: the first, through both networks, gathers the moments from which
the adapter of every pair is solved; the second, without mirror images, runs the rest of the source behind the best
adapter for each of its cuts, fits the head and measures it on held-out folds.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pnc.clones.adapter import Adapter
from pnc.foundation.argument_checks import check_flag, check_whole
from pnc.foundation.errors import InputError
from pnc.foundation.network_state import undisturbed
from pnc.graph.candidate_cuts import candidate_cuts
from pnc.graph.cut_points import CutPoint
from pnc.graph.shared_trunk import shared_cut
from pnc.method.adapter_fitting import CrossFitted
from pnc.method.adapter_moments import adapter_fitter, gather_moments, ranked_pairs
from pnc.method.file_size import thin_bytes
from pnc.method.head_fitting import HeadSamples
from pnc.method.held_out import Outcome, judge, outcome_of, run_parts, score_of, source_body
from pnc.method.settings import Bounds
from pnc.method.task import CloneTask, Progress, check_task

MAX_CUTS = 12
MAX_SHOWN = 15
"""Positions that `print(scan)` shows."""
FITTED_IMAGES = 10_000
"""At most this many images fit the adapters: they already give all rows that a regression needs."""
SCORED_IMAGES = 2_000
"""At most this many images score the positions: more would not separate them better."""
ROUND_MACS = 4 * 10**12
"""Scoring that takes more multiply-accumulates has two rounds: all positions on a few images, the best on the rest."""
FIRST_IMAGES, N_FINALISTS = 100, 3
"""Images of the first round (more if a quarter of `ROUND_MACS` allows it), and positions in the second."""
N_ERRORS_FINAL = 2.0
"""A position enters the second round only if it is at most this many standard errors of the difference behind."""
N_ERRORS = 0.5
"""Standard errors of the difference to the best that are given up for lower cost; see docs/method.md."""
COST_STEP = 0.1
"""Costs that differ by less than this share of the source's multiply-accumulates count as equal."""
ROUNDING = 1e-12
NO_ERROR = 1e-6
"""An adapter that misses no more than this share of the variance counts as exact."""


@dataclass(frozen=True, eq=False)
class Position:
    """Where a clone leaves the target and enters the source, with its held-out scores and its cost.

    Attributes:
        target_cut: The clone reads the target's tensor here.
        source_cut: The clone is the source from here on.
        adapter_error: Held-out share of the variance of the source's tensor that the adapter misses.
        score: Average accuracy on held-out support, by a head fitted without mirror images; without base samples,
            accuracy among the new classes only.
        standard_error: Standard error of `score`, from the number of held-out samples.
        log_loss: Log-loss on the same samples, in nats, with equal weight on base and new ones.
        n_macs: Multiply-accumulates added to the target per sample, without the head.
        n_params: Parameters of the adapter and of the source's part.
        n_bytes: Upper estimate of the thin file's size, which excludes the source's weights.
        macs_share: `n_macs` as a share of the whole source's.
        n_images: Number of images of the support that `log_loss` was measured on.
    """

    target_cut: CutPoint
    source_cut: CutPoint
    adapter_error: float
    score: float
    standard_error: float
    log_loss: float
    n_macs: int
    n_params: int
    n_bytes: int
    macs_share: float
    n_images: int

    @property
    def is_exact(self) -> bool:
        """Whether its adapter loses nothing: the clone sees what the source would."""
        return self.adapter_error <= NO_ERROR

    def __repr__(self) -> str:
        return (
            f"Position({self.target_cut.name} > {self.source_cut.name}: log-loss {self.log_loss:.3f}, score "
            f"{self.score:.3f} +- {self.standard_error:.3f}, {self.macs_share:.1%} of the source's MACs)"
        )

    @property
    def names(self) -> tuple[str, str]:
        """Names of its two cuts."""
        return self.target_cut.name, self.source_cut.name


@dataclass(frozen=True, eq=False)
class Scan:
    """Result of `scan`. Mappings are keyed by the names of a position's two cuts.

    Attributes:
        positions: The scored positions, by log-loss, best first.
        adapters: The fitted adapters of each position, with the head's samples behind them.
        outcomes: Log-likelihoods of the support's images at each position.
        adapter_errors: Adapter errors of all pairs of cuts, scored or not.
        exact_first: Whether exact positions go before all others: with few images, the best of many others only seems
            better.
        shared: Share of the source's multiply-accumulates before the last cut up to which both networks are the same,
            as after fine-tuning one backbone twice; positions start there, where nothing is lost and nothing run twice.
    """

    positions: tuple[Position, ...]
    adapters: Mapping[tuple[str, str], CrossFitted]
    outcomes: Mapping[tuple[str, str], Outcome]
    adapter_errors: Mapping[tuple[str, str], float]
    exact_first: bool = False
    shared: float = 0.0

    def __str__(self) -> str:
        shown, front = self.positions[:MAX_SHOWN], self.front()
        lines = [f"{'*' if one in front else ' '} {repr(one)[9:-1]}" for one in shown]
        more = len(self.positions) - len(shown)
        lines += [f"  ... {more} more"] * bool(more)
        title = f"Scan of {len(self.positions)} positions, best first (* no other is better and cheaper)"
        both = f"Both networks share their first layers: {self.shared:.1%} of the source's MACs are not added"
        return "\n".join([title, *([both] if self.shared else []), *lines])

    def __repr__(self) -> str:
        return f"Scan({len(self.positions)} positions; best {self.positions[0]!r})"

    def adapter(self, position: Position) -> CrossFitted:
        """Return the adapters of a scored position."""
        return self.adapters[position.names]

    def loss_against(self, position: Position, other: Position) -> tuple[float, float]:
        """Return the log-loss of `position` minus that of `other`, and the standard error of this difference.

        Both must have been measured on the same images (equal `n_images`), so the error is far below that of either.
        """
        return self.outcomes[other.names].minus(self.outcomes[position.names])

    def front(self, max_bytes: int | None = None) -> tuple[Position, ...]:
        """List the positions that no other one beats in both log-loss and added MACs, cheapest first.

        Args:
            max_bytes: Only consider positions whose thin file is no larger; None considers all.
        """
        allowed = [p for p in self.positions if max_bytes is None or p.n_bytes <= max_bytes]
        front: list[Position] = []
        for position in sorted(allowed, key=lambda p: (p.n_macs, p.log_loss)):
            if not front or position.log_loss < front[-1].log_loss:
                front.append(position)
        return tuple(front)

    def facts(self, chosen: Position) -> list[dict[str, Any]]:
        """Return the scored positions as plain values, best first, with `on_front` and `chosen`."""
        front = self.front()
        return [
            {
                "target_cut": p.target_cut.name,
                "source_cut": p.source_cut.name,
                **{key: value for key, value in vars(p).items() if not isinstance(value, CutPoint)},
                "on_front": p in front,
                "chosen": p is chosen,
            }
            for p in self.positions
        ]

    def choose(
        self, max_macs: float | None = None, max_bytes: int | None = None, n_errors: float = N_ERRORS
    ) -> Position:
        """Choose the cheapest position whose log-loss is within half a standard error of the best one's.

        This is the error of the difference between both, on the same images (`loss_against`). On few images the
        log-loss separates positions far better than the accuracy, see docs/method.md. If costs differ by less than a
        tenth of the source's MACs, exact positions go first, since they are also exact on images unlike the support;
        then the lowest log-loss. Among positions within the bounds, only those scored on most images count.

        Exact positions go before all others with at most five images of a new class, and without base samples: the
        effect of an adapter on base images that it was not fitted on is unknown.

        Args:
            max_macs: Bound on the added MACs as a share of the source's, in (0, 1]; None for no bound.
            max_bytes: Bound on the size of the thin file; None for no bound.
            n_errors: Standard errors that may be given up for lower cost, at least 0.
        Raises:
            InputError: a bound is out of range, or no scored position is that cheap; the message names the cheapest.
        """
        Bounds(max_macs, max_bytes)
        has_base = any(bool(outcome.is_base.any()) for outcome in self.outcomes.values())
        allowed = list(self.positions)
        if max_macs is not None:
            cheapest = min(p.macs_share for p in allowed)
            allowed = [p for p in allowed if p.macs_share <= max_macs]
            if not allowed:
                raise InputError(
                    f"max_macs={max_macs}: the cheapest position adds {cheapest:.3f} of the source's MACs; allow as "
                    "much, or give a density below 1 when cloning"
                )
        if max_bytes is not None:
            smallest = min(p.n_bytes for p in allowed)
            allowed = [p for p in allowed if p.n_bytes <= max_bytes]
            if not allowed:
                raise too_small(max_bytes, smallest, "" if max_macs is None else f" within max_macs={max_macs}")
        exact = [p for p in allowed if p.is_exact]
        if exact and (not has_base or self.exact_first):
            return min(exact, key=lambda p: p.n_macs)
        allowed = [p for p in allowed if p.n_images == max(q.n_images for q in allowed)]
        best = min(allowed, key=lambda p: p.log_loss)
        as_good = []
        for position in allowed:
            loss, error = self.loss_against(position, best)
            if loss <= n_errors * error + ROUNDING:
                as_good.append(position)
        bound = min(p.macs_share for p in as_good) + COST_STEP
        return min((p for p in as_good if p.macs_share <= bound), key=lambda p: (not p.is_exact, p.log_loss, p.n_macs))


@undisturbed()
def scan(
    task: CloneTask, *, max_cuts: int = MAX_CUTS, exhaustive: bool = False, progress: Progress | None = None
) -> Scan:
    """Score positions for `task` in closed form.

    Args:
        task: From `prepare_task`.
        max_cuts: Cuts to try in each network, spread over its depth in MACs, from the last one up to which both
            networks are the same: the input, unless they share a trunk.
        exhaustive: Score every pair of cuts, not only the best one for each source cut.
        progress: Called after each batch.
    Raises:
        InputError: an argument is out of range.

    >>> task = pnc.prepare_task(source, target, support, classes=["cat", "dog"], **names)
    >>> found = pnc.scan(task)
    >>> found.choose(max_macs=0.9).macs_share <= 0.9
    True
    """
    check_task(task)
    check_whole(max_cuts, "max_cuts", 2)
    check_flag(exhaustive, "exhaustive")
    shared = shared_cut(task.target.recording, task.source.recording)
    target_cuts = candidate_cuts(task.target.recording, max_cuts, shared[0])
    source_cuts = candidate_cuts(task.source.recording, max_cuts, shared[1])
    cuts = target_cuts, source_cuts
    n_scored = len(source_cuts) * (len(target_cuts) if exhaustive else 1)
    scored = task.within(4 * n_scored * task.source.head.features.n_channels).reduced(SCORED_IMAGES).without_copies
    whole, task = task, task.reduced(FITTED_IMAGES)
    originals = ~task.samples.is_copy
    are_scored = int(originals.sum()) == len(scored.samples.labels)
    chosen = None
    fitter = adapter_fitter(task, *cuts)
    if fitter.n_bytes(task.samples.n_folds) > task.memory and not exhaustive:
        errors = ranked_pairs(task, *cuts, progress)
        chosen = shortlist(*cuts, errors)
        fitter = adapter_fitter(task, *cuts, chosen)
    known = gather_moments(task, fitter, *cuts, "fitting adapters", progress, keeps_samples=are_scored)
    if chosen is None:
        chosen = [(t, s) for t in target_cuts for s in source_cuts]
        errors = {(t.name, s.name): fitter.error(t, s) for t, s in chosen}
        chosen = chosen if exhaustive else shortlist(*cuts, errors)
    adapters = {(t.name, s.name): replace(fitter.solve(t, s), task_key=task.key) for t, s in chosen}
    if not exhaustive:
        adapters = _undominated(task, adapters)
    del fitter  # its moments take the most memory
    whole_source = {} if known is None else {(target_cuts[0].name, source_cuts[0].name): known}
    unmirrored = {pair: samples.select(originals) for pair, samples in whole_source.items()}
    positions, seen, outcomes = _scored(scored, adapters, unmirrored, progress)
    seen |= whole_source
    n_whole = len(whole.samples.labels)
    adapters |= {pair: replace(adapters[pair], samples=s) for pair, s in seen.items() if len(s.labels) == n_whole}
    return Scan(positions, adapters, outcomes, errors, whole.has_few_images, shared[1].n_macs / task.source.n_macs)


def _scored(
    task: CloneTask,
    adapters: Mapping[tuple[str, str], CrossFitted],
    known: Mapping[tuple[str, str], HeadSamples],
    progress: Progress | None,
) -> tuple[tuple[Position, ...], dict[tuple[str, str], HeadSamples], dict[tuple[str, str], Outcome]]:
    """Score positions, best first; if that takes long, all on a part of the images and only the best on the rest.

    Args:
        task: With the images that score the positions.
        adapters: Of the positions to score.
        known: Samples behind positions that need not be run.
        progress: Called after each batch.
    Returns:
        Positions, the samples behind them, and the log-likelihoods of the images.
    """
    positions: dict[tuple[str, str], Position] = {}
    outcomes: dict[tuple[str, str], Outcome] = {}
    seen: dict[tuple[str, str], HeadSamples] = {}
    bodies = {cut: source_body(task, cut) for cut in {one.adapter.source_cut for one in adapters.values()}}

    def run(pairs: Iterable[tuple[str, str]], rows: Tensor | None = None) -> dict[tuple[str, str], HeadSamples]:
        part = task if rows is None else replace(task, samples=task.samples.select(rows))
        found = {pair: known[pair] if rows is None else known[pair].select(rows) for pair in pairs if pair in known}
        others = [pair for pair in pairs if pair not in found]
        parts = [(adapters[pair], bodies[adapters[pair].adapter.source_cut]) for pair in others]
        return found | (dict(zip(others, run_parts(part, parts, progress), strict=True)) if parts else {})

    def score(scored: CloneTask, found: Mapping[tuple[str, str], HeadSamples]) -> None:
        seen.update(found)
        for pair, samples in found.items():
            judged = judge(samples)
            outcomes[pair] = outcome_of(judged.log_likelihoods, scored)
            score, likelihood = score_of(judged.correct, scored), outcomes[pair]
            positions[pair] = _position(task, adapters[pair], score, likelihood, samples)

    n_macs = sum(_added_macs(task, one.adapter) for one in adapters.values()) * len(task.samples.labels)
    n_images = len(task.samples.groups.unique())
    n_first = max(FIRST_IMAGES, n_images * ROUND_MACS // 4 // max(n_macs, 1))
    rows = task.samples.spread(n_first, task.n_base)
    if n_macs <= ROUND_MACS or len(adapters) <= N_FINALISTS or bool(rows.all()):
        score(task, run(adapters))
    else:
        first = run(adapters, rows)
        score(replace(task, samples=task.samples.select(rows)), first)
        rest = run(_finalists(positions, outcomes), ~rows)
        score(task, {pair: first[pair].joined(samples, rows) for pair, samples in rest.items()})
    return tuple(sorted(positions.values(), key=lambda p: (p.log_loss, p.n_macs))), seen, outcomes


def _finalists(
    positions: Mapping[tuple[str, str], Position], outcomes: Mapping[tuple[str, str], Outcome]
) -> list[tuple[str, str]]:
    """Return the positions for the second round: the best ones of the first, and none far behind."""
    ranked = sorted(positions, key=lambda pair: (positions[pair].log_loss, positions[pair].n_macs))
    losses = [(pair, *outcomes[ranked[0]].minus(outcomes[pair])) for pair in ranked]
    return [pair for pair, loss, error in losses if loss <= N_ERRORS_FINAL * error + ROUNDING][:N_FINALISTS]


def too_small(max_bytes: int, smallest: int, also: str = "") -> InputError:
    """The error for a bound that no file meets; `smallest` is the estimate for the smallest one within `also`."""
    return InputError(
        f"max_bytes={max_bytes}: the smallest file{also} is estimated at up to {smallest} bytes; allow as many"
    )


def shortlist(
    target_cuts: Sequence[CutPoint], source_cuts: Sequence[CutPoint], errors: Mapping[tuple[str, str], float]
) -> list[tuple[CutPoint, CutPoint]]:
    """Pair each source cut, which decides the cost of a position, with the target cut whose adapter misses least."""
    return [(min(target_cuts, key=lambda t: errors[t.name, s.name]), s) for s in source_cuts]


def _undominated(
    task: CloneTask, adapters: Mapping[tuple[str, str], CrossFitted]
) -> dict[tuple[str, str], CrossFitted]:
    """Leave out positions that cost more than one with an identity adapter: they cannot be better."""
    costs = {pair: _added_macs(task, fitted.adapter) for pair, fitted in adapters.items()}
    bound = min((costs[pair] for pair, fitted in adapters.items() if fitted.adapter.is_identity), default=math.inf)
    return {pair: fitted for pair, fitted in adapters.items() if costs[pair] <= bound}


def _position(
    task: CloneTask, fitted: CrossFitted, hits: Outcome, likelihoods: Outcome, samples: HeadSamples
) -> Position:
    adapter = fitted.adapter
    target_cut, source_cut, features = adapter.target_cut, adapter.source_cut, task.source.head.features
    n_macs = _added_macs(task, adapter)
    score, standard_error = hits.average
    return Position(
        target_cut=target_cut,
        source_cut=source_cut,
        adapter_error=fitted.error,
        score=score,
        standard_error=standard_error,
        log_loss=-likelihoods.average[0],
        n_macs=n_macs,
        n_params=adapter.n_params + features.n_params - source_cut.n_params,
        n_bytes=thin_bytes(task, adapter),
        macs_share=n_macs / task.source.n_macs,
        n_images=len(likelihoods.values),
    )


def _added_macs(task: CloneTask, adapter: Adapter) -> int:
    """MACs that a clone with this adapter adds to the target per sample, without the head."""
    return adapter.n_macs + task.source.head.features.n_macs - adapter.source_cut.n_macs
