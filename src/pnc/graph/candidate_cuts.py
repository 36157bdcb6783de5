"""Cut points worth trying, and the gaps between cut points."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pnc.foundation.errors import InputError
from pnc.graph.classifier import find_head
from pnc.graph.cut_points import LOGITS, CutPoint, cut_points
from pnc.graph.recording import Recording
from pnc.graph.subgraphs import costs_before

LARGE_GAP = 0.2
"""Smallest share of a network without a cut point that is reported."""


@dataclass(frozen=True)
class Gap:
    """Two consecutive cut points, or the last one and the output: the network cannot be cut between them.

    Attributes:
        share: Share of the network's MACs between them.
        params_share: Share of its parameters.
        after: Name of the cut point before the gap.
        before: Name of the cut point after it; `LOGITS` for the output.
    """

    share: float
    params_share: float
    after: str
    before: str

    @property
    def is_large(self) -> bool:
        """Whether at least a fifth of the network's MACs or parameters lies between them."""
        return max(self.share, self.params_share) >= LARGE_GAP


def gaps(recording: Recording) -> tuple[Gap, ...]:
    """The parts of a network without a cut point inside, sorted by MACs, the largest first."""
    n_macs, n_params = (max(n, 1) for n in costs_before([recording.output])[0])
    cuts = cut_points(recording)
    places = [*((cut.name, cut.n_macs, cut.n_params) for cut in cuts), (LOGITS, n_macs, n_params)]
    found = [Gap((y[1] - x[1]) / n_macs, (y[2] - x[2]) / n_params, x[0], y[0]) for x, y in itertools.pairwise(places)]
    return tuple(sorted(found, key=lambda gap: -gap.share))


def candidate_cuts(recording: Recording, limit: int = 12, start: CutPoint | None = None) -> tuple[CutPoint, ...]:
    """The cut points worth trying, from the input to the deepest one before the head's features.

    Of cuts without multiply-accumulates between them (convolution, norm, activation, dropout, pooling to a smaller map)
    only the last is kept: it saves most at no cost. The input is always kept. If positions are pooled away, so are the
    last tensor with more than one position and the pooled tensor, unless that is equivalent to the head's features. Of
    the remaining cuts, `limit` are chosen, spread evenly over the depth in MACs.

    Args:
        recording: The network.
        limit: How many cuts at most, 2 or more.
        start: The first cut, in place of the input; cuts before it, or of the same cost, are left out.
    Raises:
        InputError: `limit` is below 2, or the network's head is not found (`find_head`).
    """
    if limit < 2:
        raise InputError(f"limit: expected at least 2 (the input and the deepest cut), got {limit}")
    features = find_head(recording).features
    cuts = cut_points(recording)
    start = start or cuts[0]
    chain_ends = [start]
    for n_macs, chain in itertools.groupby(cuts[1 : features.index], key=lambda cut: cut.n_macs):
        if n_macs > start.n_macs:
            chain_ends.extend(_chain_ends(list(chain), is_last=n_macs == features.n_macs))
    return _spread(chain_ends, limit)


def _chain_ends(chain: Sequence[CutPoint], is_last: bool) -> list[CutPoint]:
    """The cuts to keep among cuts of the same cost; `is_last`: the head's features are among them.

    A map is preferred to the same values as tokens or a vector, because it shows which positions are neighbours. A map
    before padding is preferred to the padded map, whose border an adapter could not reproduce.
    """
    spatial = [cut for cut in chain if not cut.is_pooled]
    pooled = [cut for cut in chain if cut.is_pooled and not is_last][-1:]
    if not spatial:
        return pooled
    maps = [cut for cut in spatial if cut.kind == "map"]
    size = min(cut.size for cut in maps) if spatial[-1].kind == "map" else spatial[-1].size
    last = next((cut for cut in reversed(maps) if cut.size == size), spatial[-1])
    return [last] if pooled and pooled[0].size == last.size else [last, *pooled]


def _spread(cuts: Sequence[CutPoint], limit: int) -> tuple[CutPoint, ...]:
    """At most `limit` of the cuts, including the first and the last, closest to even steps in MACs."""
    if len(cuts) <= limit:
        return tuple(cuts)
    chosen = {0, len(cuts) - 1}
    first, last = cuts[0].n_macs, cuts[-1].n_macs
    for step in range(1, limit - 1):
        wanted = first + (last - first) * step / (limit - 1)
        free = [i for i in range(len(cuts)) if i not in chosen]
        chosen.add(min(free, key=lambda i: (abs(cuts[i].n_macs - wanted), i)))
    return tuple(cuts[i] for i in sorted(chosen))
