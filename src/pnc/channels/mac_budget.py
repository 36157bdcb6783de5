"""MAC budgets: the cost of a segment for any choice of channels, and the best choice within a bound."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from pnc.channels.channel_masks import ChannelMasks
from pnc.channels.channel_spaces import ChannelSpace, ChannelSpaces
from pnc.channels.module_inlining import opened
from pnc.foundation.argument_checks import check_whole
from pnc.foundation.errors import InputError
from pnc.graph.nodes import info

_ROUNDING = 1e-3  # of one MAC, so that a density computed from a number of MACs gives that number back


@dataclass(frozen=True)
class _Term:
    """A node whose cost shrinks with units: for each of its weights, the units along each dim that follows any."""

    node: str
    n_macs: int
    weights: tuple[tuple[Tensor, ...], ...]


class Costs:
    """Multiply-accumulates per sample of a segment, for any choice of kept units.

    Args:
        segment: The one that `spaces` were found in.
        spaces: Its channel spaces.
    """

    def __init__(self, segment: fx.GraphModule, spaces: ChannelSpaces) -> None:
        self.spaces = spaces
        self._terms, self._fixed = _terms(opened(segment), spaces)
        least = torch.zeros(spaces.n_units, dtype=torch.bool)
        least[[space.start for space in spaces.spaces]] = True
        self.most, self.least = self.n_macs(~torch.zeros_like(least)), self.n_macs(least)

    def by_node(self, kept: Tensor) -> dict[str, int]:
        """Multiply-accumulates of the nodes that can shrink, by name, for kept flags (n_units,)."""
        flags = torch.cat([kept, torch.ones(1, dtype=torch.bool)]).double()  # KEPT, -1, is the last entry
        return {term.node: round(term.n_macs * _share(term, flags)) for term in self._terms}

    def n_macs(self, kept: Tensor) -> int:
        """Multiply-accumulates of the whole segment, for kept flags (n_units,)."""
        return self._fixed + sum(self.by_node(kept).values())

    def density(self, kept: Tensor) -> float:
        """Share of the prunable MACs that is kept: 0 if one unit of each space is, 1 if all are or none can go."""
        prunable = self.most - self.least
        return (self.n_macs(kept) - self.least) / prunable if prunable else 1.0

    def bound(self, density: float) -> int:
        """The number of MACs at a density, rounded down."""
        return self.least + math.floor(density * (self.most - self.least) + _ROUNDING)

    def prices(self) -> Tensor:
        """Multiply-accumulates that removing one unit alone would save; (n_units,), float64, at least 1."""
        n_units = self.spaces.n_units
        saved = torch.zeros(n_units, dtype=torch.float64)
        for term in self._terms:
            left = [torch.ones(n_units, dtype=torch.float64) for _ in term.weights]
            for share, dims in zip(left, term.weights, strict=True):
                for units in dims:
                    share *= 1 - (units + 1).bincount(minlength=n_units + 1)[1:].double() / len(units)  # KEPT is -1
            saved += term.n_macs * (1 - torch.stack(left).amin(0))
        return saved.clamp(min=1)


def masks_within(costs: Costs, ranking: Mapping[str, Tensor], n_macs: int, round_to: int = 1) -> ChannelMasks:
    """Keep the units of highest rank, as many as a bound on multiply-accumulates allows.

    All spaces share one ranking; the best unit of each space always stays. The rest of the budget is then filled up
    until no unit of any space fits.

    Args:
        costs: Of the segment.
        ranking: Space name -> (size,), for every space; higher ranks stay longer.
        n_macs: Bound on the cost of the segment per sample.
        round_to: Keep a multiple of this number of channels in each space (or all), counted in its first producer.
    Raises:
        InputError: ranks are missing, of another shape or not finite; `round_to` is below 1; the bound is below the
            cost of the fewest channels.
    """
    check_whole(round_to, "round_to", 1)
    spaces = costs.spaces
    for space in spaces.spaces:
        ranks = ranking.get(space.name)
        if ranks is None or tuple(ranks.shape) != (space.size,) or not bool(ranks.isfinite().all()):
            what = "nothing" if ranks is None else f"shape {tuple(ranks.shape)} or values that are not finite"
            raise InputError(f"ranking[{space.name!r}]: expected {space.size} finite numbers, got {what}")
    blocks = _Blocks(spaces, ranking, round_to)
    least = costs.n_macs(blocks.kept(blocks.first))
    if least > n_macs:
        raise InputError(
            f"n_macs: {n_macs} multiply-accumulates are too few; the fewest channels that can stay with "
            f"round_to={round_to} cost {least}; allow more, or use a smaller round_to"
        )
    kept = blocks.kept(_filled(costs, blocks, _best_prefix(costs, blocks, n_macs), n_macs))
    return ChannelMasks({s.name: kept[s.start : s.start + s.size].clone() for s in spaces.spaces})


def least_macs(costs: Costs, round_to: int) -> int:
    """The cost of the fewest channels that can stay in multiples of a number; see `masks_within`."""
    ranking = {space.name: torch.zeros(space.size, dtype=torch.float64) for space in costs.spaces.spaces}
    blocks = _Blocks(costs.spaces, ranking, round_to)
    return costs.n_macs(blocks.kept(blocks.first))


def best_within(costs: Costs, ranking: Mapping[str, Tensor], n_macs: int) -> Tensor:
    """Kept flags (n_units,) as in `masks_within`, but faster: unchecked, and without filling up the budget."""
    blocks = _Blocks(costs.spaces, ranking, round_to=1)
    return blocks.kept(_best_prefix(costs, blocks, n_macs))


def _terms(segment: fx.GraphModule, spaces: ChannelSpaces) -> tuple[list[_Term], int]:
    """The nodes whose cost shrinks with units, and the MACs of all others."""
    by_reader: dict[str, dict[tuple[str, str], list[Tensor]]] = {}
    for s in spaces.slices:
        if len(s.shape) > 1:
            read_there = by_reader.setdefault(s.user or s.tensor.rpartition(".")[0], {})
            read_there.setdefault((s.tensor, s.user), []).append(s.units)
    read = dict(spaces.reads)
    terms, fixed = [], 0
    for node in segment.graph.nodes:
        found = by_reader.get(str(node.target) if node.op == "call_module" else node.name, {})
        weights = tuple(tuple(dims) for dims in found.values())
        if not weights and info(node).n_macs:  # a product of tensors: over fewer heads, or a sum over fewer channels
            channels = spaces.nodes.get(node.name) or spaces.nodes.get(read.get(node.name, ""))
            weights = ((channels.units,),) if channels is not None else ()
        if weights:
            terms.append(_Term(node.name, info(node).n_macs, weights))
        else:
            fixed += info(node).n_macs
    return terms, fixed


def _share(term: _Term, flags: Tensor) -> float:
    return min(math.prod(float(flags[units].mean()) for units in dims) for dims in term.weights)


class _Blocks:
    """Units grouped into blocks that are removed at once; within a space, a block goes only after all later ones.

    Attributes:
        first: Blocks that always stay, bool (n_blocks,).
        order: All other blocks; those that stay longest come first.
    """

    def __init__(self, spaces: ChannelSpaces, ranking: Mapping[str, Tensor], round_to: int) -> None:
        self._of_unit = torch.zeros(spaces.n_units, dtype=torch.int64)
        ranks: list[Tensor] = []
        starts: list[int] = []
        for space in spaces.spaces:
            flat = ranking[space.name].detach().double().cpu()
            best_first = torch.argsort(flat, descending=True, stable=True)
            pieces = flat[best_first].split(_step(space, round_to))
            starts.append(len(ranks))
            sizes = torch.tensor([len(piece) for piece in pieces])
            numbers = torch.arange(len(ranks), len(ranks) + len(pieces))
            self._of_unit[space.start + best_first] = numbers.repeat_interleave(sizes)
            ranks += [piece.mean() for piece in pieces]
        self.first = torch.zeros(len(ranks), dtype=torch.bool)
        self.first[starts] = True
        order = torch.argsort(torch.stack(ranks), descending=True, stable=True) if ranks else torch.zeros(0).long()
        self.order = order[~self.first[order]]

    def kept(self, blocks: Tensor) -> Tensor:
        """Kept flags of the units, (n_units,), from those of the blocks."""
        return blocks[self._of_unit]

    def prefix(self, length: int) -> Tensor:
        """Flags of the blocks that always stay, and of the `length` best others."""
        return self.first.index_fill(0, self.order[:length], True)


def _step(space: ChannelSpace, round_to: int) -> int:
    return round_to // math.gcd(round_to, space.granule)


def _best_prefix(costs: Costs, blocks: _Blocks, n_macs: int) -> Tensor:
    fewest, most = 0, len(blocks.order)
    while fewest < most:  # costs grow with every block
        middle = (fewest + most + 1) // 2
        fits = costs.n_macs(blocks.kept(blocks.prefix(middle))) <= n_macs
        fewest, most = (middle, most) if fits else (fewest, middle - 1)
    return blocks.prefix(fewest)


def _filled(costs: Costs, blocks: _Blocks, chosen: Tensor, n_macs: int) -> Tensor:
    """Add the best block that fits, until none does."""
    while True:
        # Only the next block of each space: the one before it stays.
        following = [b for b in blocks.order.tolist() if not chosen[b] and chosen[b - 1]]
        fitting = (chosen.index_fill(0, torch.tensor([b]), True) for b in following)
        better = next((one for one in fitting if costs.n_macs(blocks.kept(one)) <= n_macs), None)
        if better is None:
            return chosen
        chosen = better
