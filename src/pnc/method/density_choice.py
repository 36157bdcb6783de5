"""Position and density together: which few clones of lower density are worth making, estimated for all at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from pnc.channels.channel_spaces import channel_spaces
from pnc.channels.mac_budget import Costs
from pnc.foundation.errors import InputError
from pnc.method.held_out import source_body
from pnc.method.positions import Position, Scan
from pnc.method.task import CloneTask

DENSITIES = (1.0, 0.7, 0.5, 0.35, 0.25)
LEAST_DENSITY = 0.1
LOSS = 0.02
"""Accuracy taken to be lost at density 1/2, and in proportion to 1 / density - 1 elsewhere. A rough figure: it only
decides what is tried; the choice is by held-out score."""
N_TRIED = 3
TOLERANCE = 0.005
"""Accuracy that may be given up for lower cost where there is no standard error of the difference to go by."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A position with a density, and what that may be worth.

    Attributes:
        position: From the scan.
        density: Share of the prunable multiply-accumulates of the part to keep.
        macs_share: Added multiply-accumulates as a share of the source's.
        estimate: Of the score.
    """

    position: Position
    density: float
    macs_share: float
    estimate: float


def joint_front(
    task: CloneTask, found: Scan, max_macs: float | None = None, max_bytes: int | None = None
) -> tuple[Candidate, ...]:
    """Estimate positions at several densities, without making any clone.

    Args:
        task: Whose source.
        found: Its scan; the positions of its front are combined with densities.
        max_macs: Bound on the added MACs as a share of the source's; a position above it is taken at the density that
            just meets it.
        max_bytes: Bound on the size of the thin file at full density.
    Returns:
        Those that no other one beats in both estimate and added MACs, cheapest first.
    Raises:
        InputError: no combination is within the bounds.
    """
    made = [one for position in found.front(max_bytes) for one in _densities(task, position, max_macs)]
    if not made:
        raise InputError(
            f"max_macs={max_macs}, max_bytes={max_bytes}: no position reaches them, even at density {LEAST_DENSITY}; "
            "allow more"
        )
    front: list[Candidate] = []
    for one in sorted(made, key=lambda c: (c.macs_share, -c.estimate)):
        if not front or one.estimate > front[-1].estimate:
            front.append(one)
    return tuple(front)


def worth_trying(front: Sequence[Candidate], tolerance: float = TOLERANCE) -> tuple[Candidate, ...]:
    """The cheapest candidate whose estimate is as good as the best but for `tolerance`, and its neighbours upwards."""
    best = max(one.estimate for one in front)
    first = next(place for place, one in enumerate(front) if one.estimate >= best - tolerance)
    start = max(0, min(first, len(front) - N_TRIED))
    return tuple(front[start : start + N_TRIED])


def _densities(task: CloneTask, position: Position, max_macs: float | None) -> list[Candidate]:
    body = source_body(task, position.source_cut)
    costs = Costs(body, channel_spaces(body))
    full, source = position.n_macs, task.source.n_macs

    def candidate(density: float) -> Candidate:
        share = (full - costs.most + costs.bound(density)) / source
        return Candidate(position, density, share, position.score - LOSS * (1 / density - 1))

    densities = list(DENSITIES) if costs.most > costs.least else [1.0]
    if max_macs is not None and costs.most > costs.least:
        room = max_macs * source - (full - costs.most) - costs.least
        if LEAST_DENSITY <= (exact := room / (costs.most - costs.least)) < 1:
            densities.append(exact)
    made = [candidate(density) for density in densities]
    return [one for one in made if max_macs is None or one.macs_share <= max_macs]
