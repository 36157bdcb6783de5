"""Channel spaces: which internal channels of a part of a network can be removed, and what has to go with them.

`channel_spaces` walks the recorded graph once (rules in `rule_table`, bookkeeping in `channel_layouts`) and returns the
plan as data: the spaces, which dim of which weight follows which channels, and where channels lie in every tensor.
`channel_masks` chooses channels, `compaction` applies the plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from pnc.channels.channel_layouts import FIXED, AtomSlice, Layout, Tracker, fixed
from pnc.channels.module_inlining import opened
from pnc.channels.rule_table import apply_rule, opens_channels
from pnc.graph.nodes import describe, info, shape_of

KEPT = -1
"""Unit number of an index that can never be removed."""


@dataclass(frozen=True)
class ChannelSpace:
    """A set of channels that can be removed one by one (one *unit* at a time).

    A unit is a set of channels that can only be removed together: one channel of all layers that share a residual
    stream, a whole group of a grouped convolution, a whole attention head.

    Attributes:
        name: Its first producer, with a number if one layer opens several spaces; the same in every run.
        start: Number of its first unit among the units of all spaces.
        size: Number of units.
        granule: Channels per unit in the first producer.
        producers: Names of the tensors that a mask zeroes.
        consumers: Names of the other tensors that shrink with it.
    """

    name: str
    start: int
    size: int
    granule: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class WeightSlice:
    """One dim of a weight that follows units.

    Attributes:
        tensor: Qualified name of a leaf module's parameter or buffer; the operand's node if `user` is set.
        user: Node that reads the operand; "" for a module's tensor.
        dim: The dim that shrinks.
        units: Unit of each index along it, `KEPT` if none; int64.
        shape: Full shape of the tensor.
        is_parameter: Whether it is a parameter, or becomes one once it is shrunk, rather than a buffer.
        origin: Name of the tensor of the network that it is, or is computed from.
        zeroed: Whether a mask writes zeros there.
    """

    tensor: str
    user: str
    dim: int
    units: Tensor
    shape: tuple[int, ...]
    is_parameter: bool
    origin: str
    zeroed: bool


@dataclass(frozen=True)
class Channels:
    """Where units lie in one tensor: along `dim`, with `units` (size,) as in `WeightSlice`."""

    dim: int
    units: Tensor


@dataclass(frozen=True, eq=False)
class ChannelSpaces:
    """Everything that can be removed from a segment, and how.

    Attributes:
        spaces: In the order of the forward pass.
        slices: All weights that follow units.
        nodes: Where units lie in the tensors of the graph; nodes without units are missing.
        reads: (reader, node that it reads) wherever units end: in a layer that mixes them, in a sum over them, in the
            free output. A factor per unit on these edges alone has the effect of removing the units.
        refills: Those of them whose reader needs its input in full size, with zeros for removed units.
        output: Where units lie in the segment's output; None if it keeps all its channels.
        frozen: Layers whose channels cannot be removed (all, or some), with the reason.
    """

    spaces: tuple[ChannelSpace, ...]
    slices: tuple[WeightSlice, ...]
    nodes: Mapping[str, Channels]
    reads: tuple[tuple[str, str], ...]
    refills: tuple[tuple[str, str], ...]
    output: Channels | None
    frozen: Mapping[str, str]

    @property
    def n_units(self) -> int:
        """Number of units of all spaces."""
        return sum(space.size for space in self.spaces)

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each space by name, in the order of the forward pass."""
        return {space.name: space.size for space in self.spaces}


def channel_spaces(segment: fx.GraphModule, free_output: bool = False) -> ChannelSpaces:
    """Find the channels of a segment that can be removed; the segment is not changed.

    Nothing is guessed. Channels of the segment's input always stay, those of its output unless `free_output`, and any
    whose removal would change more than zeroing them (`ChannelSpaces.frozen`). An operation without a rule receives its
    input in full size, with zeros for removed channels (`ChannelSpaces.refills`), and keeps all channels of its result.

    Args:
        segment: Part of a recorded network, from `cut_points.extract`.
        free_output: Let the output lose channels too; `ChannelSpaces.output` then says where they lie.
    """
    segment = opened(segment)
    tracker = Tracker(segment)
    output: Layout | None = None
    holders: dict[int, list[fx.Node]] = {}
    for node in segment.graph.nodes:
        if node.op == "output":
            source = node.args[0]
            if free_output and isinstance(source, fx.Node):
                output = tracker.of(source)
                tracker.reads.append((node, source))
            else:
                tracker.freeze(node, "output of the segment")
            continue
        _visit(tracker, node)
        _note_memory(tracker, node, holders)
    return _resolve(tracker, output)


def _visit(tracker: Tracker, node: fx.Node) -> None:
    facts = info(node)
    if facts.from_input:
        tracker.data.add(node)
    if not facts.is_tensor:
        return
    passive = node.op in ("placeholder", "get_attr") or not facts.from_input
    if passive or not (opens_channels(tracker, node) or any(source.dims for source in tracker.inputs(node))):
        tracker.store(node, fixed(len(shape_of(node))))
    else:
        result = apply_rule(tracker, node)
        if facts.shape is None and isinstance(result, Layout):  # several results, but the rule covers only one
            tracker.atoms.freeze(result.ids, f"{describe(node)} returns more than a tensor")
            result = fixed(0)
        tracker.store(node, result)


def _note_memory(tracker: Tracker, node: fx.Node, holders: dict[int, list[fx.Node]]) -> None:
    """After a write in place, older names of the same memory read what was written."""
    result = tracker.layouts.get(node)
    for storage in info(node).writes:
        for other in holders.get(storage, ()):
            before = tracker.of(other)
            if isinstance(result, Layout) and result.dims:
                tracker.layouts[other] = Layout(before.ids, before.zero and result.zero)
            elif before.dims and tracker.is_read_after(other, node):
                tracker.atoms.freeze(before.ids, f"overwritten by {describe(node)}")
    if isinstance(result, Layout) and result.dims:
        for storage in info(node).holds:
            holders.setdefault(storage, []).append(node)


# ----------------------------------------------------------------------------------------------- atoms -> units, spaces


def _resolve(tracker: Tracker, output: Layout | None) -> ChannelSpaces:
    roots = _settle_forms(tracker)
    frozen = tracker.atoms.frozen_reasons(roots)
    groups = _group_roots(tracker, roots, frozen)
    unit_of = torch.full((tracker.atoms.n_atoms,), KEPT)
    start, starts = 0, []
    for group in groups:
        unit_of[group] = torch.arange(start, start + len(group))
        starts.append(start)
        start += len(group)
    unit_of = unit_of[roots]
    slices = tuple(s for a in tracker.slices if (s := _weight_slice(a, roots, unit_of)) is not None)
    nodes = {}
    for node, layout in tracker.layouts.items():
        if isinstance(layout, Layout) and (channels := _channels(layout.ids, roots, unit_of)) is not None:
            nodes[node.name] = channels
    return ChannelSpaces(
        spaces=_describe_spaces(groups, starts, slices),
        slices=slices,
        nodes=nodes,
        reads=_edges(tracker.reads, nodes),
        refills=_edges(tracker.refills, nodes),
        output=None if output is None else _channels(output.ids, roots, unit_of),
        frozen=_frozen_layers(tracker, roots, unit_of, frozen),
    )


def _edges(pairs: list[tuple[fx.Node, fx.Node]], nodes: Mapping[str, Channels]) -> tuple[tuple[str, str], ...]:
    """Edges of the graph along which units pass, each once, by name."""
    return tuple(dict.fromkeys((reader.name, source.name) for reader, source in pairs if source.name in nodes))


def _settle_forms(tracker: Tracker) -> Tensor:
    """Keep every tensor with atoms along several dims rectangular; returns the final roots.

    Only whole indices of one dim can be removed. Attention has already bound whole heads; where nothing has bound the
    atoms yet, as in a channel shuffle, the largest dim is chosen.
    """
    roots = tracker.atoms.roots()
    for ids, allowed in tracker.forms:
        if _carrier(roots[ids], allowed) is None:
            largest = max(allowed, key=lambda d: ids.shape[d])
            tracker.atoms.bind_whole(ids, (largest,), "tied to fixed channels by a reshape")
            roots = tracker.atoms.roots()
    return roots


def _carrier(roots: Tensor, allowed: tuple[int, ...]) -> int | None:
    """The largest dim along which every index belongs to one component as a whole."""
    for dim in sorted(allowed, key=lambda d: -roots.shape[d]):
        first = roots
        for other in range(roots.dim()):
            if other != dim:
                first = first.narrow(other, 0, 1)
        if bool((roots == first).all()):
            return dim
    return None


def _channels(ids: Tensor, roots: Tensor, unit_of: Tensor) -> Channels | None:
    dims = tuple(d for d, size in enumerate(ids.shape) if size > 1)
    dim = _carrier(roots[ids], dims)
    if dim is None:
        return None
    units = unit_of[ids[tuple(slice(None) if d == dim else 0 for d in range(ids.dim()))]]
    return Channels(dim, units) if bool((units != KEPT).any()) else None


def _weight_slice(atom_slice: AtomSlice, roots: Tensor, unit_of: Tensor) -> WeightSlice | None:
    weight, dim = atom_slice.weight, atom_slice.dim
    if dim is not None:
        units = unit_of[atom_slice.ids]
    else:
        channels = _channels(atom_slice.ids, roots, unit_of)
        if channels is None:
            return None
        dim, units = channels.dim - (atom_slice.ids.dim() - len(weight.shape)), channels.units
        if dim < 0 or weight.shape[dim] == 1:  # the operand is the same for all channels
            return None
    if not bool((units != KEPT).any()):
        return None
    return WeightSlice(
        weight.name, weight.user, dim, units, weight.shape, weight.is_parameter, weight.origin, atom_slice.zeroed
    )


def _group_roots(tracker: Tracker, roots: Tensor, frozen: Mapping[int, str]) -> list[Tensor]:
    """Removable roots, grouped into spaces: those that touch the same dims of the same weights equally often.

    Groups are found by a hash; a collision would only show two spaces as one.
    """
    signature = torch.zeros(tracker.atoms.n_atoms, dtype=torch.int64)
    produced = torch.zeros(tracker.atoms.n_atoms, dtype=torch.bool)
    for number, atom_slice in enumerate(tracker.slices):
        found, counts = torch.unique(roots[atom_slice.ids], return_counts=True)
        signature[found] = signature[found] * 6364136223846793005 + (number * 1_000_003 + counts)
        if atom_slice.zeroed:
            produced[found] = True
    produced[torch.tensor(sorted(frozen), dtype=torch.int64)] = False
    removable = produced.nonzero().reshape(-1)
    if len(removable) == 0:
        return []
    _, label = torch.unique(signature[removable], return_inverse=True)
    order = torch.argsort(label, stable=True)
    groups = torch.split(removable[order], label.bincount().tolist())
    # The only unit of a space can never be removed: at least one stays.
    return sorted((g for g in groups if len(g) > 1), key=lambda g: int(g[0]))


def _describe_spaces(
    groups: list[Tensor], starts: list[int], slices: tuple[WeightSlice, ...]
) -> tuple[ChannelSpace, ...]:
    space_of = torch.cat([torch.full((len(g),), i) for i, g in enumerate(groups)]) if groups else torch.zeros(0).long()
    producers: list[dict[str, int]] = [{} for _ in groups]
    consumers: list[dict[str, int]] = [{} for _ in groups]
    for s in slices:
        units = s.units[s.units != KEPT]
        counts = torch.bincount(space_of[units], minlength=len(groups))
        for space in counts.nonzero().reshape(-1).tolist():
            (producers if s.zeroed else consumers)[space].setdefault(s.origin, int(counts[space]))
    spaces = []
    taken: dict[str, int] = {}
    for i, group in enumerate(groups):
        first, count = next(iter(producers[i].items()))
        base = _layer(first)
        number = taken[base] = taken.get(base, -1) + 1
        name = f"{base}#{number}" if number else base
        granule = count // len(group)
        spaces.append(ChannelSpace(name, starts[i], len(group), granule, tuple(producers[i]), tuple(consumers[i])))
    return tuple(spaces)


def _layer(tensor: str) -> str:
    """The layer that a tensor belongs to; the tensor itself if it belongs to the network directly."""
    return tensor.rpartition(".")[0] or tensor


def _frozen_layers(tracker: Tracker, roots: Tensor, unit_of: Tensor, reasons: Mapping[int, str]) -> dict[str, str]:
    """Layers with output channels that can never be removed, with the reason of the first such channel."""
    found = dict(tracker.refused)
    for atom_slice in tracker.slices:
        if atom_slice.zeroed and atom_slice.dim == 0:
            ids = atom_slice.ids[(unit_of[atom_slice.ids] == KEPT) & (atom_slice.ids != FIXED)]
            if len(ids):
                name = _layer(atom_slice.weight.origin)
                found.setdefault(name, reasons.get(int(roots[ids[0]]), "only one unit"))
    return found
