"""Chooses position and density together: estimates many clones, and makes the few that may be chosen."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pnc.channels.channel_spaces import channel_spaces
from pnc.channels.mac_budget import Costs
from pnc.clones.clone import Clone
from pnc.foundation.errors import InputError, PNCWarning
from pnc.method.file_size import FileTooLarge, statistics_bytes
from pnc.method.held_out import Outcome, source_body
from pnc.method.positions import Position, Scan, too_small
from pnc.method.settings import Prefer
from pnc.method.task import CloneTask

TOLERANCES: Mapping[str, float] = {"accuracy": 0.0, "balanced": 0.005, "small": 0.02}
"""Accuracy that may be given up for lower cost."""
DENSITIES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.15)
LEAST_DENSITY = 0.1
LOSS, LOSS_POWER = 0.003, 1.2
"""Accuracy that a tuned part of density 1/2 loses; at density d it is (1/d - 1) ** `LOSS_POWER` times as much, see
docs/method.md. Clones are measured too, but on few images this figure is the better estimate of a small loss."""
LOSS_ERROR = 0.004
"""Standard error of what a part of density 1/2 loses."""
LEAST_ERROR = 0.006
"""Least standard error of a measured loss: supports differ by that much, see results/part.md."""
SURPRISE = 2.0
"""Standard errors of both by which more must be lost than expected for the measured loss alone to count."""
SLOPE = 0.5
"""Accuracy lost per nat of held-out log-loss, between positions."""
TUNED_SLOPE, TUNED_LEAST = 0.3, 0.005
"""Accuracy lost per squared nat once a position's adapter and part are tuned, and the least that is lost: the head is
then fitted on features of images that the part was tuned on."""
CLEARLY = 1.1
"""A position with a fitted adapter must be cheaper by this factor than one without, which is exact on any image."""
N_ERRORS = 0.5
"""Standard errors of a position's log-loss that count against it, so that few images do not choose a bad one."""
N_TRIED = 2
"""At most this many clones below density 1 are made; then the whole part is used."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A position with a density, and its estimated score.

    Attributes:
        position: A position of the scan.
        density: Share of the prunable multiply-accumulates of the part to keep.
        macs_share: Added multiply-accumulates as a share of the source's.
        estimate: Estimated score.
        error: Standard error of what it is expected to lose: that of a part's loss, and all that the position loses.
    """

    position: Position
    density: float
    macs_share: float
    estimate: float
    error: float = LOSS_ERROR


def expected_loss(density: float) -> float:
    """Return the accuracy that a tuned part is expected to lose against the whole one."""
    return float(LOSS * (1 / density - 1) ** LOSS_POWER)


def joint_front(
    task: CloneTask, found: Scan, max_macs: float | None = None, max_bytes: int | None = None, *, tunes: bool = True
) -> tuple[Candidate, ...]:
    """Estimate positions at several densities, without making any clone.

    Args:
        task: Gives the source.
        found: Its scan; the positions of its front are combined with densities.
        max_macs: Bound on the added MACs as a share of the source's; a position above it is also tried at the density
            that just meets it.
        max_bytes: Bound on the size of the thin file, which a part with removed channels makes larger.
        tunes: Whether parts below density 1 are tuned together with their adapters.
    Returns:
        The candidates that no other one beats in both estimate and added MACs, cheapest first; those with a fitted
        adapter must be clearly cheaper than exact ones.
    Raises:
        InputError: no combination is within the bounds.
    """
    worth = _worth(task, found, max_bytes)
    if not worth and max_bytes is not None:
        raise too_small(max_bytes, min(position.n_bytes for position in found.positions))
    parts = [_Part(task, position, max_bytes) for position, _, _ in worth]
    made = [
        one
        for part, (_, best, nats) in zip(parts, worth, strict=True)
        for one in part.candidates(best, nats, max_macs, tunes)
    ]
    if not made:
        share, density = min((part.share(part.least_density), part.least_density) for part in parts)
        also = "" if max_bytes is None else f" within max_bytes={max_bytes}"
        raise InputError(
            f"max_macs={max_macs}: the cheapest clone{also}, at density {density:g}, adds {share:.3f} of "
            f"the source's MACs; allow as much{', or give a lower density' if max_bytes is None else ''}"
        )
    exact = [one for one in made if one.position.is_exact]
    front: list[Candidate] = []
    for one in sorted(made, key=lambda c: (c.macs_share, -c.estimate)):
        is_beaten = any(o.estimate >= one.estimate and o.macs_share < CLEARLY * one.macs_share for o in exact)
        if (one in exact or not is_beaten) and (not front or one.estimate > front[-1].estimate):
            front.append(one)
    return tuple(front)


def _worth(task: CloneTask, found: Scan, max_bytes: int | None) -> list[tuple[Position, float, float]]:
    """Return the positions of the scan's front, each with the best one's score and its own log-loss above the best.

    Accuracy on few images is noisy, so the best score is that of the best log-loss, and a part of the error of the
    difference in log-loss is added to it.
    """
    if not task.has_base:  # the effect of an adapter on base images is unknown
        chosen = found.choose(max_bytes=max_bytes)
        return [(chosen, chosen.score, 0.0)]
    front = found.front(max_bytes)
    n_images = max((position.n_images for position in front), default=0)
    front = tuple(position for position in front if position.n_images == n_images)
    worth = []
    for position in front:
        nats, error = found.loss_against(position, front[-1])
        worth.append((position, front[-1].score, max(0.0, nats + N_ERRORS * error)))
    return worth


def at_density(task: CloneTask, found: Scan, density: float, max_macs: float | None) -> Scan:
    """Keep the positions of a scan where a density below 1 has an effect, and is within the bound on added MACs.

    Raises:
        InputError: none is within the bound.
    """
    parts = [_Part(task, position) for position in found.positions]
    if not any(part.is_prunable for part in parts):
        warnings.warn(
            f"density={density} has no effect: no channel of the source can be removed", PNCWarning, stacklevel=3
        )
    else:
        parts = [part for part in parts if part.is_prunable]
    within = [part.position for part in parts if max_macs is None or part.share(density) <= max_macs]
    if not within:
        cheapest = min(part.share(density) for part in parts)
        raise InputError(
            f"max_macs={max_macs}: at density {density:g} the cheapest position adds {cheapest:.3f} of the source's "
            "MACs; allow as much, or give a lower density"
        )
    return replace(found, positions=tuple(within))


class _Part:
    """The source's part behind a position, and what it costs at any density.

    Args:
        task: Gives the source.
        position: Where the part begins.
        max_bytes: Bound on the size of the thin file; a part that would exceed it loses no channels.
    """

    def __init__(self, task: CloneTask, position: Position, max_bytes: int | None = None) -> None:
        body = source_body(task, position.source_cut)
        self._costs, self._source, self.position = Costs(body, channel_spaces(body)), task.source.n_macs, position
        fits = max_bytes is None or position.n_bytes + statistics_bytes(body) <= max_bytes
        self.is_prunable = fits and self._costs.most > self._costs.least

    @property
    def least_density(self) -> float:
        """The lowest density that is tried."""
        return LEAST_DENSITY if self.is_prunable else 1.0

    def share(self, density: float) -> float:
        """Added multiply-accumulates as a share of the source's."""
        return (self.position.n_macs - self._costs.most + self._costs.bound(density)) / self._source

    def candidates(self, best: float, nats: float, max_macs: float | None, tunes: bool) -> list[Candidate]:
        """Estimate the part at several densities, given the best position's score and its own log-loss above that."""
        densities = list(DENSITIES) if self.is_prunable else [1.0]
        if max_macs is not None and self.is_prunable:
            room = max_macs * self._source - (self.position.n_macs - self._costs.most) - self._costs.least
            if LEAST_DENSITY <= (exact := room / (self._costs.most - self._costs.least)) < 1:
                densities.append(exact)
        made = []
        for density in densities:
            own = SLOPE * nats
            if tunes and density < 1:
                own = min(own, max(TUNED_LEAST, TUNED_SLOPE * nats**2))
            score, error = best - own - expected_loss(density), math.hypot(LOSS_ERROR, own)
            made.append(Candidate(self.position, density, self.share(density), score, error))
        return [one for one in made if max_macs is None or one.macs_share <= max_macs]


def smallest_good(
    front: Sequence[Candidate], prefer: Prefer, make: Callable[[Candidate], tuple[Clone, Outcome]]
) -> Clone:
    """Make the few clones of a front that may be chosen, and return the cheapest that is good enough.

    A clone is good enough if its expected and measured loss against the best one, each weighted by its error, is no
    more than `prefer` gives up, within half a standard error.

    Args:
        front: From `joint_front`.
        prefer: How much may be given up.
        make: Makes the clone of a candidate, and returns it with the held-out result of each image of the support.
    Returns:
        The clone; its recipe lists the front.
    Raises:
        FileTooLarge: no clone's file is within the bound.
    """
    made: dict[Candidate, tuple[Clone, Outcome]] = {}
    left_out: list[Candidate] = []

    def is_made(one: Candidate) -> bool:
        try:
            made[one] = make(one)
        except FileTooLarge:
            if len(left_out) == len(front) - 1:
                raise
            left_out.append(one)
        return one in made

    best = next(one for one in sorted(front, key=lambda one: -one.estimate) if is_made(one))
    bound = best.estimate - TOLERANCES[prefer]
    good = sorted((one for one in front if one.estimate >= bound), key=lambda one: one.macs_share)
    chosen = best
    for candidate in [one for one in good if one is not best and one not in left_out]:
        if len(made) > N_TRIED:
            break
        if not is_made(candidate):
            continue
        measured, its_error = made[best][1].minus(made[candidate][1])
        loss, error = _shrunk(best.estimate - candidate.estimate, candidate.error, measured, its_error)
        if loss <= TOLERANCES[prefer] + N_ERRORS * error:
            chosen = candidate
            break
    clone = made[chosen][0]
    shift = made[best][0].recipe["score"] - best.estimate  # the scan's heads were fitted without mirror images
    listed = [
        [
            round(one.macs_share, 4),
            round(one.density, 4),
            round(made[one][0].recipe["score"] if one in made else one.estimate + shift, 4),
            one in made,
        ]
        for one in front
        if one not in left_out
    ]
    return replace(clone, recipe={**clone.recipe, "prefer": prefer, "front": listed})


def _shrunk(expected: float, expected_error: float, measured: float, error: float) -> tuple[float, float]:
    """Combine the expected and the measured loss of accuracy; also return the standard error.

    If much more is lost than expected, this is another kind of network than the expectation is from.
    """
    error = max(error, LEAST_ERROR)
    if measured - expected > SURPRISE * math.hypot(expected_error, error):
        return measured, error
    weight = expected_error**2 / (expected_error**2 + error**2)
    return expected + weight * (measured - expected), expected_error * (1 - weight) ** 0.5
