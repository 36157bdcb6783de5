"""Channel layouts as data: which removable atom every index of a tensor belongs to, and which atoms go together.

Every output channel of every convolution or linear layer is an *atom*, an integer. A tensor's layout says along which
of its dims atoms lie. Operations that only move data are run on the atom numbers themselves, so that reshapes,
permutations and slices need no rules of their own. Operations that tie two channels together unite their atoms; an
operation without a rule receives its input in full size (`opaque`).
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from pnc.graph.nodes import argument, constant_sources, describe, info, shape_of

FIXED = 0
"""The atom of every index that can never be removed."""


@dataclass(frozen=True)
class Layout:
    """Which atom each index of one tensor belongs to.

    Attributes:
        ids: int64, same rank as the tensor; size 1 along dims without atoms, the tensor's size otherwise.
        zero: Whether removed channels are exactly 0 here once the rows of their producers are zeroed.
    """

    ids: Tensor
    zero: bool = True

    @property
    def dims(self) -> tuple[int, ...]:
        """Dims along which atoms lie, ascending; empty when the whole tensor is fixed."""
        return tuple(d for d, size in enumerate(self.ids.shape) if size > 1)


def fixed(rank: int) -> Layout:
    """Layout of a tensor from which nothing can be removed."""
    return Layout(torch.full((1,) * rank, FIXED))


Result = Layout | tuple[Layout, ...]
"""Layout of a node's result: one per tensor."""


class Atoms:
    """Atoms, the pairs that can only be removed together, and the frozen ones with their reasons.

    Pairs are collected first; `roots` then finds their connected components at once, in a few vector operations instead
    of one Python step per channel.
    """

    def __init__(self) -> None:
        self.n_atoms = 1
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._frozen: list[tuple[Tensor, str]] = []

    def fresh(self, size: int) -> Tensor:
        """New atoms (size,), ascending."""
        ids = torch.arange(self.n_atoms, self.n_atoms + size)
        self.n_atoms += size
        return ids

    def freeze(self, ids: Tensor, reason: str) -> None:
        """Forbid removing any atom in `ids`."""
        self._frozen.append((ids.reshape(-1), reason))

    def unite(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Bind the atoms of two broadcastable arrays pairwise; an atom paired with a fixed index is frozen."""
        a, b = torch.broadcast_tensors(a, b)
        mixed = (a == FIXED) != (b == FIXED)
        if bool(mixed.any()):
            self.freeze((a + b)[mixed], reason)
        differ = (a != b) & ~mixed
        if bool(differ.any()):
            self._pairs.append((a[differ], b[differ]))

    def bind_whole(self, ids: Tensor, keep: Sequence[int], reason: str) -> Tensor:
        """Bind all atoms that share their index along the dims in `keep`.

        Used where an operation mixes the other dims: only whole indices of the kept ones remain removable.

        Returns:
            One representative per index of the kept dims; size 1 along the others.
        """
        first = ids
        for dim in range(ids.dim()):
            if dim not in keep:
                first = first.narrow(dim, 0, 1)
        if first.shape != ids.shape:
            self.unite(ids, first, reason)
        return first

    def roots(self) -> Tensor:
        """Smallest atom of each atom's component, (n_atoms,)."""
        parent = torch.arange(self.n_atoms)
        if not self._pairs:
            return parent
        a = torch.cat([p for p, _ in self._pairs])
        b = torch.cat([q for _, q in self._pairs])
        while True:
            root_a, root_b = parent[a], parent[b]
            if torch.equal(root_a, root_b):
                return parent
            low = torch.minimum(root_a, root_b)
            parent.scatter_reduce_(0, root_a, low, "amin")
            parent.scatter_reduce_(0, root_b, low, "amin")
            while not torch.equal(parent[parent], parent):
                parent = parent[parent]

    def frozen_reasons(self, roots: Tensor) -> dict[int, str]:
        """Reason per frozen root: the first one recorded for any atom of its component."""
        reasons = {FIXED: "fixed"}
        for ids, reason in self._frozen:
            for root in roots[ids].unique().tolist():
                reasons.setdefault(root, reason)
        return reasons


@dataclass(frozen=True)
class Weight:
    """A tensor that can shrink: a leaf module's parameter or buffer, or an operand inside the graph.

    Attributes:
        name: Qualified name of the module's tensor; name of the operand's node if `user` is set.
        user: Name of the node that reads the operand; "" for a module's tensor.
        shape: Its shape.
        is_parameter: Whether it is a parameter, or becomes one once it is shrunk (`constant_sources`), rather than a
            buffer.
        origin: Name of the tensor of the network that it is, or is computed from.
    """

    name: str
    user: str
    shape: tuple[int, ...]
    is_parameter: bool
    origin: str


@dataclass(frozen=True)
class AtomSlice:
    """One dim of a weight that follows atoms.

    Attributes:
        weight: The tensor.
        dim: The dim; None for an operand whose channel dim is not known yet.
        ids: Atoms (size of `dim`,); if `dim` is None, laid out like the result that the operand is broadcast to.
        zeroed: Whether a mask writes zeros there.
    """

    weight: Weight
    dim: int | None
    ids: Tensor
    zeroed: bool


class Tracker:
    """What one walk over a segment collects; the rules write here.

    Attributes:
        modules: All modules of the segment by qualified name.
        parameters: Qualified names of its parameters.
        data: Nodes whose content depends on the segment's input.
        shared: Leaf modules that are called, or whose weights are used, more than once.
        refused: Layers from which nothing can be removed, with the reason.
        reads: (reader, node that it reads) wherever channels end: in a layer that mixes them, in a sum, in the output.
        refills: (reader, node that it reads) wherever zeros are inserted for removed channels.
        layouts: Layout per node, a tuple for a node with several results.
        slices: Weights and operands that follow atoms.
        forms: (ids, dims allowed to shrink) of every tensor with atoms along several dims: only whole indices of one
            of them can be removed.
    """

    def __init__(self, segment: fx.GraphModule) -> None:
        self.modules: dict[str, nn.Module] = dict(segment.named_modules())
        self.parameters = {name for name, _ in segment.named_parameters()}
        self.atoms = Atoms()
        self.layouts: dict[fx.Node, Result] = {}
        self.slices: list[AtomSlice] = []
        self._followed: dict[tuple[Weight, int | None], Tensor] = {}
        self.forms: list[tuple[Tensor, tuple[int, ...]]] = []
        self.data: set[fx.Node] = set()
        self.refused: dict[str, str] = {}
        self.reads: list[tuple[fx.Node, fx.Node]] = []
        self.refills: list[tuple[fx.Node, fx.Node]] = []
        self.shared = _shared_leaves(segment, self.modules)
        self._position = {node: position for position, node in enumerate(segment.graph.nodes)}
        self._last_use: dict[fx.Node, int] = {}
        self._holders: dict[int, list[fx.Node]] = {}
        for node, position in self._position.items():
            self._last_use.update(dict.fromkeys((*node.all_input_nodes, node), position))
            for storage in info(node).holds:
                self._holders.setdefault(storage, []).append(node)

    def of(self, node: object) -> Layout:
        """Layout of a node with a single tensor output; that of a fixed scalar for anything else."""
        layout = self.layouts.get(node) if isinstance(node, fx.Node) else None
        return layout if isinstance(layout, Layout) else fixed(0)

    def inputs(self, node: fx.Node) -> list[Layout]:
        """Layouts of all tensors that a node reads, including those inside tuples."""
        found: list[Layout] = []
        for source in node.all_input_nodes:
            layout = self.layouts.get(source)
            found += [layout] if isinstance(layout, Layout) else list(layout or ())
        return found

    def weight(self, node: fx.Node, position: int, name: str) -> Weight | None:
        """A layer's weight: a tensor of the module, or an operand of the functional form; None if it has none."""
        if node.op != "call_module":
            operand = argument(node, position, name)
            return self.operand(node, operand) if isinstance(operand, fx.Node) else None
        module = self.modules[str(node.target)]
        tensor = getattr(module, name, None)
        if not isinstance(tensor, Tensor):
            return None
        return self.module_tensor(node, name, tuple(tensor.shape), name not in module._buffers)

    def module_tensor(self, node: fx.Node, name: str, shape: tuple[int, ...], is_parameter: bool) -> Weight:
        """A tensor of a leaf module."""
        name = f"{node.target}.{name}"
        return Weight(name, "", shape, is_parameter, origin=name)

    def operand(self, node: fx.Node, operand: fx.Node) -> Weight:
        """An operand that `node` reads, as a tensor that can shrink."""
        sources = constant_sources(operand)
        origins = [str(source.target) for source in sources or ()]
        is_parameter = any(origin in self.parameters for origin in origins)
        return Weight(operand.name, node.name, shape_of(operand), is_parameter, origins[0] if origins else operand.name)

    def follow(self, weight: Weight | None, dim: int | None, ids: Tensor, zeroed: bool) -> None:
        """Note that a dim of a weight follows atoms; does nothing for a weight that the layer lacks."""
        if weight is None or not bool((ids != FIXED).any()):
            return
        known = self._followed.get((weight, dim))
        if known is None:
            self._followed[weight, dim] = ids
            self.slices.append(AtomSlice(weight, dim, ids, zeroed))
        else:  # one operand as weight and as bias
            self.atoms.unite(known, ids, f"{weight.name} is used twice by {weight.user}")

    def freeze(self, node: fx.Node, reason: str) -> None:
        """Freeze all atoms that a node reads."""
        for layout in self.inputs(node):
            if layout.dims:
                self.atoms.freeze(layout.ids, reason)

    def may_be_replaced(self, source: fx.Node, reader: fx.Node) -> bool:
        """Whether `reader` may read a copy of `source`: it does not write to it, or nothing reads it later."""
        written = info(reader).writes & info(source).holds
        earlier = [
            node
            for storage in written
            for node in self._holders[storage]
            if self._position[node] < self._position[reader]
        ]
        return not any(self.is_read_after(node, reader) for node in earlier)

    def is_read_after(self, node: fx.Node, later: fx.Node) -> bool:
        """Whether anything after `later` reads `node`."""
        return self._last_use[node] > self._position[later]

    def rigid(self, ids: Tensor, dim: int, reason: str) -> None:
        """Keep the size of `dim` of a tensor: only indices of other dims can be removed, if any."""
        others = tuple(d for d, size in enumerate(ids.shape) if size > 1 and d != dim)
        if others:
            self.forms.append((ids, others))
        else:
            self.atoms.freeze(ids, reason)

    def store(self, node: fx.Node, result: Result) -> None:
        """Note a node's layout; if atoms lie along several dims, also that the tensor must stay rectangular."""
        self.layouts[node] = result
        for layout in (result,) if isinstance(result, Layout) else result:
            if len(layout.dims) > 1:
                self.forms.append((layout.ids, layout.dims))


def _shared_leaves(segment: fx.GraphModule, modules: dict[str, nn.Module]) -> set[str]:
    """Leaf modules whose weights are used by several calls: shrinking them for one would break the others."""
    users: dict[int, set[str]] = {}
    for node in segment.graph.nodes:
        held: list[object] = []
        if node.op == "call_module":
            held += modules[node.target].parameters()
            if isinstance(modules[node.target], (_NormBase, nn.GroupNorm)):  # holds sizes even without weights
                held.append(modules[node.target])
        elif node.op == "get_attr":
            held.append(operator.attrgetter(node.target)(segment))
        for item in held:
            users.setdefault(id(item), set()).add(node.name)
    busy = {name for names in users.values() if len(names) > 1 for name in names}
    return {str(n.target) for n in segment.graph.nodes if n.op == "call_module" and n.name in busy}


def opaque(t: Tracker, node: fx.Node, reason: str = "") -> Layout:
    """An operation without a rule: it receives every tensor in full size, and its result keeps all channels.

    Zeros are inserted for removed channels, as a mask would have them. Channels that would not be zero, or that are
    written to, freeze with the reason.
    """
    for source in node.all_input_nodes:
        layout = t.layouts.get(source)
        if isinstance(layout, Layout) and layout.dims and layout.zero and t.may_be_replaced(source, node):
            t.refills.append((node, source))
            t.reads.append((node, source))
            continue
        for part in (layout,) if isinstance(layout, Layout) else layout or ():
            t.atoms.freeze(part.ids, reason or f"no rule for {describe(node)}")
    return fixed(len(shape_of(node)))


def compress(full: Tensor) -> Tensor:
    """Reduce dims along which an array of atoms does not vary to size 1."""
    for dim in range(full.dim()):
        if full.shape[dim] > 1:
            first = full.narrow(dim, 0, 1)
            if full.stride(dim) == 0 or bool((full == first).all()):
                full = first
    return full.contiguous()


def align(ids: Tensor, rank: int) -> Tensor:
    """Prepend dims of size 1, like broadcasting."""
    return ids.reshape((1,) * (rank - ids.dim()) + tuple(ids.shape))
