"""Scan of positions: where in the target, and from where in the source on, a clone costs least and keeps most.

A position is a pair of cuts. Two passes of the support through both networks score them in closed form: the first
gathers the moments from which the adapter of every pair is solved; the second runs the source's rest behind the
adapters of the promising pairs, fits the head and measures it on held-out folds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pnc.clones.adapter import Adapter
from pnc.foundation.argument_checks import check_flag, check_whole
from pnc.foundation.errors import InputError
from pnc.foundation.network_state import undisturbed
from pnc.graph.candidate_cuts import candidate_cuts
from pnc.graph.cut_points import CutPoint
from pnc.method.adapter_fitting import CrossFitted
from pnc.method.adapter_moments import adapter_fitter, gather_moments, ranked_pairs
from pnc.method.file_size import thin_bytes
from pnc.method.head_fitting import HeadSamples
from pnc.method.held_out import Outcome, judge, outcome_of, run_parts, source_body
from pnc.method.settings import Bounds
from pnc.method.task import CloneTask, Progress, check_task

MAX_CUTS = 12
MAX_SHOWN = 15
"""Positions that `print(scan)` shows."""
RUNNER_UP = 1.1
FITTED_IMAGES = 10_000
"""Images of the support that adapters are fitted on, at most: they already give all rows that a regression needs."""
SCORED_IMAGES = 2_000
"""Images of the support that positions are scored on, at most: more would tell them apart no better."""
ROUND_MACS = 4 * 10**12
"""Multiply-accumulates from which on positions are scored in two rounds: all on some images, the best again on more."""
FIRST_IMAGES, N_FINALISTS = 100, 3
"""Images of the first round, or as many as a quarter of those MACs allows; positions that go on to the second."""
N_ERRORS_FINAL = 2.0
"""Standard errors of the difference to the best by which a position may lie behind after the first round."""
N_ERRORS = 0.5
"""Standard errors of the difference to the best that are given up for lower cost; see docs/method.md."""
COST_STEP = 0.1
"""Share of the source's multiply-accumulates by which costs must differ to count as different."""
ROUNDING = 1e-12
NO_ERROR = 1e-6
"""Share of the variance that an adapter may miss which only passes on what it gets."""


@dataclass(frozen=True, eq=False)
class Position:
    """Where a clone leaves the target and enters the source, what that is worth and what it costs.

    Attributes:
        target_cut: The clone reads the target's tensor here.
        source_cut: The clone is the source from here on.
        adapter_error: Held-out share of the variance of the source's tensor that the adapter misses.
        score: Average accuracy on held-out support; without base samples the accuracy among the new classes alone.
        standard_error: Of `score`, from the number of held-out samples.
        log_loss: On the same samples, in nats; base and new ones weigh the same.
        n_macs: Multiply-accumulates added to the target per sample, without the head.
        n_params: Parameters of the adapter and of the source's part.
        n_bytes: Of the clone's thin file, an upper estimate: the source's weights are not in it.
        macs_share: `n_macs` as a share of the whole source's.
        n_images: How many images of the support these were measured on.
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
        """Whether its adapter changes nothing, or only units: the clone sees what the source would."""
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
    """What `scan` found.

    Attributes:
        positions: The scored positions, by log-loss, best first.
        adapters: The fitted adapters of each, by the names of its two cuts, with what was seen behind them.
        outcomes: Log-likelihoods of the images of the support at each, by the names of its two cuts.
        adapter_errors: The adapters' errors of all pairs of cuts, scored or not, by the names of the two cuts.
        exact_first: Whether a position whose adapter changes nothing goes before all others: of few images, the best of
            many others only seems to be better.
    """

    positions: tuple[Position, ...]
    adapters: Mapping[tuple[str, str], CrossFitted]
    outcomes: Mapping[tuple[str, str], Outcome]
    adapter_errors: Mapping[tuple[str, str], float]
    exact_first: bool = False

    def __str__(self) -> str:
        shown, front = self.positions[:MAX_SHOWN], self.front()
        lines = [f"{'*' if one in front else ' '} {repr(one)[9:-1]}" for one in shown]
        more = len(self.positions) - len(shown)
        lines += [f"  ... {more} more"] * bool(more)
        return "\n".join(
            [f"Scan of {len(self.positions)} positions, best first (* no other is better and cheaper)", *lines]
        )

    def __repr__(self) -> str:
        return f"Scan({len(self.positions)} positions; best {self.positions[0]!r})"

    def adapter(self, position: Position) -> CrossFitted:
        """Give the adapters of a scored position."""
        return self.adapters[position.names]

    def loss_against(self, position: Position, other: Position) -> tuple[float, float]:
        """By how much the log-loss of `position` is above that of `other`, and the standard error of that difference.

        Both were measured on the same images, so the error is far below that of either; their `n_images` must be the
        same.
        """
        return self.outcomes[other.names].minus(self.outcomes[position.names])

    def front(self, max_bytes: int | None = None) -> tuple[Position, ...]:
        """List the positions that no other one beats in both log-loss and added MACs, cheapest first.

        Args:
            max_bytes: Only of those whose thin file is no larger; None for all.
        """
        allowed = [p for p in self.positions if max_bytes is None or p.n_bytes <= max_bytes]
        front: list[Position] = []
        for position in sorted(allowed, key=lambda p: (p.n_macs, p.log_loss)):
            if not front or position.log_loss < front[-1].log_loss:
                front.append(position)
        return tuple(front)

    def facts(self, chosen: Position) -> list[dict[str, Any]]:
        """The scored positions as plain values, best first; each says whether it is on the front, and chosen."""
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
        """Choose the cheapest position whose log-loss lies within half a standard error of the best one's.

        It is the error of the difference between both, on the same images (`loss_against`). The log-loss of few images
        tells positions apart far better than the accuracy, see docs/method.md. Where costs differ by less than a tenth
        of the source's MACs, a position whose adapter changes nothing goes first, as it is exact also on images unlike
        those of the support; then the lowest log-loss. Of positions within the bounds, those that were scored on most
        images count.

        With at most five images of a new class a position whose adapter changes nothing goes before all others.

        Without base samples nothing tells what an adapter does to images of base classes, which it was not fitted on: a
        position whose adapter changes nothing, the whole source from its input on, then goes before all others.

        Args:
            max_macs: Bound on the added MACs as a share of the source's, in (0, 1]; None for no bound.
            max_bytes: Bound on the size of the thin file; None for no bound.
            n_errors: How many standard errors may be given up for lower cost, at least 0.
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
                raise InputError(f"max_macs={max_macs}: the cheapest position adds {cheapest:.3f} of the source's MACs")
        if max_bytes is not None:
            smallest = min(p.n_bytes for p in allowed)
            allowed = [p for p in allowed if p.n_bytes <= max_bytes]
            if not allowed:
                raise InputError(f"max_bytes={max_bytes}: the smallest file of such a clone may have {smallest} bytes")
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
        max_cuts: Cuts taken of each network, spread over its depth in MACs.
        exhaustive: Score every pair of cuts, not only the promising ones.
        progress: Called after each batch.
    Raises:
        InputError: an argument is out of range.
    """
    check_task(task)
    check_whole(max_cuts, "max_cuts", 2)
    check_flag(exhaustive, "exhaustive")
    target_cuts = candidate_cuts(task.target.recording, max_cuts)
    source_cuts = candidate_cuts(task.source.recording, max_cuts)
    cuts = target_cuts, source_cuts
    whole, task = task, task.reduced(FITTED_IMAGES)
    chosen = None
    fitter = adapter_fitter(task, *cuts)
    if fitter.n_bytes(task.samples.n_folds) > task.memory and not exhaustive:
        errors = ranked_pairs(task, *cuts, progress)
        # One target cut for each source cut: with networks as large as this, every further pair takes minutes.
        chosen = shortlist(*cuts, errors, runner_up=0)
        fitter = adapter_fitter(task, *cuts, chosen)
    gather_moments(task, fitter, *cuts, "fitting adapters", progress)
    if chosen is None:
        chosen = [(t, s) for t in target_cuts for s in source_cuts]
        errors = {(t.name, s.name): fitter.error(t, s) for t, s in chosen}
        chosen = chosen if exhaustive else shortlist(*cuts, errors)
    adapters = {(t.name, s.name): fitter.solve(t, s) for t, s in chosen}
    if not exhaustive:
        adapters = _undominated(task, adapters)
    del fitter  # its moments are the largest thing here
    return Scan(*_scored(whole, adapters, source_cuts, progress), errors, whole.has_few_images)


def _scored(
    task: CloneTask,
    adapters: Mapping[tuple[str, str], CrossFitted],
    source_cuts: Sequence[CutPoint],
    progress: Progress | None,
) -> tuple[tuple[Position, ...], dict[tuple[str, str], CrossFitted], dict[tuple[str, str], Outcome]]:
    """Score positions, best first; where that takes long, all on a part of the support and the best also on the rest.

    The adapters that come back know what was seen behind them, if that was all of the support.
    """
    bodies = {s: source_body(task, s) for s in source_cuts}
    positions: dict[tuple[str, str], Position] = {}
    outcomes: dict[tuple[str, str], Outcome] = {}
    seen = dict(adapters)

    def run(part: CloneTask, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], HeadSamples]:
        parts = [(adapters[pair], bodies[adapters[pair].adapter.source_cut]) for pair in pairs]
        return dict(zip(pairs, run_parts(part, parts, progress), strict=True))

    def score(scored: CloneTask, found: Mapping[tuple[str, str], HeadSamples]) -> None:
        for pair, samples in found.items():
            judged = judge(samples)
            outcomes[pair] = outcome_of(judged.log_likelihoods, scored)
            score, likelihood = outcome_of(judged.correct, scored), outcomes[pair]
            positions[pair] = _position(task, adapters[pair], score, likelihood, samples)
            if len(samples.labels) == len(task.samples.labels):
                seen[pair] = replace(adapters[pair], samples=samples)

    pairs = list(adapters)
    whole = task.within(4 * len(pairs) * task.source.head.features.n_channels).reduced(SCORED_IMAGES)
    n_rows = len(whole.samples.labels)
    n_macs = sum(_added_macs(task, one.adapter) for one in adapters.values()) * n_rows
    n_images = len(whole.samples.groups.unique())
    n_first = max(FIRST_IMAGES, n_images * ROUND_MACS // 4 // max(n_macs, 1))
    if n_macs <= ROUND_MACS or len(pairs) <= N_FINALISTS or n_first >= n_images:
        score(whole, run(whole, pairs))
    else:
        rows = whole.samples.spread(n_first, task.n_base)
        first, rest = (replace(whole, samples=whole.samples.select(part)) for part in (rows, ~rows))
        found = run(first, pairs)
        score(first, found)
        finalists = run(rest, _finalists(positions, outcomes))
        score(whole, {pair: found[pair].joined(samples, rows) for pair, samples in finalists.items()})
    return tuple(sorted(positions.values(), key=lambda p: (p.log_loss, p.n_macs))), seen, outcomes


def _finalists(
    positions: Mapping[tuple[str, str], Position], outcomes: Mapping[tuple[str, str], Outcome]
) -> list[tuple[str, str]]:
    """The positions that the choice may fall on, judged by the first round: the best ones, and none far behind."""
    ranked = sorted(positions, key=lambda pair: (positions[pair].log_loss, positions[pair].n_macs))
    losses = [(pair, *outcomes[ranked[0]].minus(outcomes[pair])) for pair in ranked]
    return [pair for pair, loss, error in losses if loss <= N_ERRORS_FINAL * error + ROUNDING][:N_FINALISTS]


def shortlist(
    target_cuts: Sequence[CutPoint],
    source_cuts: Sequence[CutPoint],
    errors: Mapping[tuple[str, str], float],
    runner_up: float = RUNNER_UP,
) -> list[tuple[CutPoint, CutPoint]]:
    """Choose the pairs of cuts that are worth running: their number grows linearly with that of the cuts.

    What a position costs is decided by its source cut; among the target cuts it is the one whose adapter misses least,
    and the next one where its error is at most `runner_up` times as large.
    """
    chosen = []
    for s in source_cuts:
        ranked = sorted(target_cuts, key=lambda t: errors[t.name, s.name])
        bound = runner_up * errors[ranked[0].name, s.name]
        chosen += [(t, s) for t in ranked[:2] if t is ranked[0] or errors[t.name, s.name] <= bound]
    return chosen


def _undominated(
    task: CloneTask, adapters: Mapping[tuple[str, str], CrossFitted]
) -> dict[tuple[str, str], CrossFitted]:
    """Leave out what costs more than a position whose adapter passes on what it gets: nothing can be gained there."""
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
        n_images=len(hits.values),
    )


def _added_macs(task: CloneTask, adapter: Adapter) -> int:
    """What a clone behind an adapter adds to the target per sample, without the head."""
    return adapter.n_macs + task.source.head.features.n_macs - adapter.source_cut.n_macs
