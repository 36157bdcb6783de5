"""Rules for operations on tensors: arithmetic, pooling, reductions, products, data movement.

Operations that only move data are run on the atoms.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from pnc.channels.channel_layouts import FIXED, Layout, Result, Tracker, align, compress, fixed, opaque
from pnc.graph.nodes import argument, batch_dims, describe, info, scalar_value, shape_of

# ------------------------------------------------------------------------------------------------------- arithmetic


def elementwise(t: Tracker, node: fx.Node) -> Result:
    """A function of each entry alone; zero stays zero if f(0) = 0, which is tested."""
    source = t.of(node.args[0])
    if len(node.all_input_nodes) > 1:
        return opaque(t, node)
    zero = torch.zeros((1,) * source.ids.dim())
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        function = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
        out = function(zero, *node.args[1:], **node.kwargs)
    if not bool(out.isfinite().all()):
        t.freeze(node, f"{describe(node)} of removed channels would be infinite")
        return fixed(source.ids.dim())
    return Layout(source.ids, source.zero and not bool(out.any()))


def conversion(t: Tracker, node: fx.Node) -> Result:
    """Another type or device, perhaps that of a second tensor."""
    return t.of(node.args[0])


def total(t: Tracker, node: fx.Node) -> Result:
    """Addition, subtraction, maximum: zero where both operands are zero."""
    a, b = argument(node, 0, "input"), argument(node, 1, "other")
    return _total(t, node, (t.of(a), a), (t.of(b), b))


def product(t: Tracker, node: fx.Node) -> Result:
    """Multiplication: zero where either operand is zero; a constant operand shrinks with the channels."""
    a, b = argument(node, 0, "input"), argument(node, 1, "other")
    return _product(t, node, (t.of(a), a), (t.of(b), b))


def quotient(t: Tracker, node: fx.Node) -> Result:
    """Division: zero where the numerator is zero and the denominator is not."""
    a, b = argument(node, 0, "input"), argument(node, 1, "other")
    first, second = t.of(a), t.of(b)
    if second.dims and (second.zero or not first.dims):
        t.freeze(node, f"divided by channels that would be 0 in {describe(node)}")
        return fixed(len(shape_of(node)))
    if second.dims:
        return _united(t, node, first, second, zero=first.zero)
    return _product(t, node, (first, a), (second, b))


def sum_of_product(t: Tracker, node: fx.Node) -> Result:
    """`addcmul`: first + second * third."""
    first, second, third = ((t.of(a), a) for a in (*node.args, *node.kwargs.values())[:3])
    if not second[0].dims and not third[0].dims:
        return opaque(t, node)
    scaled = _product(t, node, second, third)
    return _total(t, node, first, (scaled, None))


_Operand = tuple[Layout, object]
"""Layout and the argument itself: a node, a number, or None for a value without a node."""


def _total(t: Tracker, node: fx.Node, a: _Operand, b: _Operand) -> Layout:
    if a[0].dims and b[0].dims:
        return _united(t, node, a[0], b[0], zero=a[0].zero and b[0].zero)
    (source, _), (_, other) = (a, b) if a[0].dims else (b, a)
    ids = align(source.ids, len(shape_of(node)))
    if other is not None and not isinstance(other, fx.Node):
        return Layout(ids, zero=source.zero and other == 0)
    if other is not None and not _varying(other, ids):
        return Layout(ids, zero=False)
    if other is None or other in t.data or (info(node).writes and other is node.args[0]):
        return opaque(t, node, f"added to fixed channels by {describe(node)}")
    # A constant with one entry per channel: shrunk and masked like a bias.
    t.follow(t.operand(node, other), None, ids, zeroed=source.zero)
    return Layout(ids, zero=source.zero and _varying(other, ids) == Layout(ids).dims)


def _product(t: Tracker, node: fx.Node, a: _Operand, b: _Operand) -> Layout:
    if a[0].dims and b[0].dims:
        return _united(t, node, a[0], b[0], zero=a[0].zero or b[0].zero)
    (source, _), (_, other) = (a, b) if a[0].dims else (b, a)
    ids = align(source.ids, len(shape_of(node)))
    if isinstance(other, fx.Node) and _varying(other, ids):
        if info(node).writes and other is node.args[0]:
            return opaque(t, node, f"written into fixed channels by {describe(node)}")
        t.follow(t.operand(node, other), None, ids, zeroed=False)
    return Layout(ids, source.zero)


def _united(t: Tracker, node: fx.Node, first: Layout, second: Layout, zero: bool) -> Layout:
    rank = len(shape_of(node))
    a, b = align(first.ids, rank), align(second.ids, rank)
    t.atoms.unite(a, b, f"combined with fixed channels by {describe(node)}")
    return Layout(a if a.numel() >= b.numel() else b, zero)


def _varying(operand: fx.Node, ids: Tensor) -> tuple[int, ...]:
    """Dims with atoms along which an operand, broadcast to the result, has more than one entry."""
    shape = (1,) * (ids.dim() - len(shape_of(operand))) + shape_of(operand)
    return tuple(d for d in Layout(ids).dims if shape[d] > 1)


# -------------------------------------------------------------------------------------- pooling, reductions, attention


def spatial(t: Tracker, node: fx.Node, n_dims: int = 0) -> Result:
    """Pooling and resizing over the last `n_dims` dims (0: all after the second), channel by channel."""
    source = t.of(node.args[0])
    rank = source.ids.dim()
    if source.dims and source.dims[-1] >= (rank - n_dims if n_dims else 2):
        return opaque(t, node, f"{describe(node)} pools over channels")
    return source


def reduction(t: Tracker, node: fx.Node, over_channels: bool, position: int = 1) -> Result:
    """Mean, sum, norm or maximum over some dims.

    Args:
        over_channels: The channel dim may be reduced, since zeros add nothing (`compaction` keeps the denominator of a
            mean).
        position: Of the argument `dim`.
    """
    source, dims = t.of(node.args[0]), argument(node, position, "dim")
    rank = source.ids.dim()
    if dims is None:
        return opaque(t, node)
    reduced = sorted({d % rank for d in ((dims,) if isinstance(dims, int) else dims)})
    others = [d for d in source.dims if d not in reduced]
    if others:
        ids = t.atoms.bind_whole(source.ids, others, f"mixed with fixed channels by {describe(node)}")
    elif over_channels and source.zero:
        ids = torch.full((1,) * rank, FIXED)
        t.reads.append((node, node.all_input_nodes[0]))
    else:
        return opaque(t, node, f"{describe(node)} mixes the channels")
    if len(shape_of(node)) < rank:
        ids = ids.reshape([size for d, size in enumerate(ids.shape) if d not in reduced])
    return Layout(ids, source.zero)


def vector_norm(t: Tracker, node: fx.Node) -> Result:
    """A norm along some dims; zeros add nothing if its order is positive."""
    order = argument(node, 1, "p", node.kwargs.get("ord", 2))
    return reduction(t, node, over_channels=isinstance(order, (int, float)) and order > 0, position=2)


def _contract(t: Tracker, node: fx.Node, sources: Sequence[fx.Node], letters: Sequence[str], out: str) -> Result:
    """Product of two operands summed over the letters that `out` lacks, in einsum's notation.

    Channels along batch letters (attention heads) or a summed letter go together in both operands.
    """
    layouts = [t.of(source) for source in sources]
    tracked = [{ls[d] for d in layout.dims} for ls, layout in zip(letters, layouts, strict=True)]
    batch = set(letters[0]) & set(letters[1]) & set(out)
    reason = f"multiplied with fixed channels by {describe(node)}"
    if (tracked[0] | tracked[1]) & batch:
        parts = []
        for source, layout, ls in zip(sources, layouts, letters, strict=True):
            whole = t.atoms.bind_whole(layout.ids, [d for d, c in enumerate(ls) if c in batch], reason)
            sizes = dict(zip(ls, shape_of(source), strict=True))
            if any(sizes.get(c, 1) > 1 for c in batch & (tracked[0] | tracked[1])):
                parts.append(_arranged(whole, ls, out))
        if len(parts) > 1:
            t.atoms.unite(parts[0], parts[1], reason)
        zero = any(bool(layout.dims) and layout.zero for layout in layouts)
        return Layout(max(parts, key=Tensor.numel), zero)
    summed = (set(letters[0]) & set(letters[1])) - set(out)
    if len(tracked[0]) == 1 and tracked[0] == tracked[1] <= summed and (layouts[0].zero or layouts[1].zero):
        t.atoms.unite(layouts[0].ids.reshape(-1), layouts[1].ids.reshape(-1), reason)
        t.reads.append((node, sources[0]))  # one gate per product is enough
        return fixed(len(out))
    for one, other in ((0, 1), (1, 0)):
        if not tracked[other] and len(tracked[one]) == 1 and tracked[one] <= set(out):
            return Layout(_arranged(layouts[one].ids, letters[one], out), layouts[one].zero)
    return opaque(t, node, reason)


def _arranged(ids: Tensor, letters: str, out: str) -> Tensor:
    """Atoms of an operand, arranged like the result's dims; size 1 for letters that only one of them has."""
    shared = [c for c in out if c in letters]
    ids = ids.movedim([letters.index(c) for c in shared], list(range(len(shared))))
    ids = ids[(...,) + (0,) * (ids.dim() - len(shared))] if ids.dim() > len(shared) else ids
    sizes = dict(zip(shared, ids.shape, strict=True))
    return ids.reshape([sizes.get(c, 1) for c in out])


def matmul(t: Tracker, node: fx.Node) -> Result:
    """Matrix product of two tensors with at least two dims."""
    a, b = node.args[0], argument(node, 1, "other", node.kwargs.get("mat2"))
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or min(len(shape_of(a)), len(shape_of(b))) < 2:
        return opaque(t, node)
    batch = "abcdefgh"[: len(shape_of(node)) - 2]
    first, second = (batch[len(batch) + 2 - len(shape_of(n)) :] for n in (a, b))
    return _contract(t, node, (a, b), (first + "xy", second + "yz"), batch + "xz")


def einsum(t: Tracker, node: fx.Node) -> Result:
    """Einsum of two operands, without repeated letters or ellipsis."""
    operands = node.args[1:] if not isinstance(node.args[1], (tuple, list)) else tuple(node.args[1])
    inputs, _, out = str(node.args[0]).replace(" ", "").partition("->")
    letters = inputs.split(",")
    sources = [o for o in operands if isinstance(o, fx.Node)]
    if len(sources) != 2 or not out or "." in inputs or any(len(set(ls)) < len(ls) for ls in letters):
        return opaque(t, node)
    return _contract(t, node, sources, letters, out)


def attention(t: Tracker, node: fx.Node) -> Result:
    """Scaled dot product attention: whole heads can go, from queries, keys, values and mask together."""
    sources = [argument(node, i, name) for i, name in enumerate(("query", "key", "value"))]
    mask, rank = argument(node, 3, "attn_mask"), len(shape_of(node))
    layouts = [t.of(source) for source in sources]
    heads = [d for d in range(rank - 2) if any(d in layout.dims for layout in layouts)]
    same = len({shape_of(source)[:-2] for source in sources}) == 1
    if not heads or not same or (isinstance(mask, fx.Node) and t.of(mask).dims):
        return opaque(t, node, f"{describe(node)} mixes the channels")
    reason = f"attends together with fixed channels in {describe(node)}"
    parts = [t.atoms.bind_whole(layout.ids, heads, reason) for layout in layouts]
    t.atoms.unite(parts[0], parts[1], reason)
    t.atoms.unite(parts[0], parts[2], reason)
    ids = max(parts, key=Tensor.numel)
    if isinstance(mask, fx.Node) and _varying(mask, ids):
        t.follow(t.operand(node, mask), None, ids, zeroed=False)
    return Layout(ids, layouts[2].zero)


# ------------------------------------------------------------------------------------------------------- data movement


def movement(t: Tracker, node: fx.Node) -> Result:
    """An operation that only moves entries, run on the atoms."""
    sources = t.inputs(node)

    def atoms_of(source: fx.Node) -> Any:
        return t.of(source).ids.expand(shape_of(source)) if shape_of(source) else scalar_value(source)

    args, kwargs = map_arg(node.args, atoms_of), map_arg(node.kwargs, atoms_of)
    if node.op == "call_module":
        function = t.modules[str(node.target)].forward
    else:
        # The atoms may lie in memory differently from the tensor, so that a view may be impossible.
        target = "reshape" if node.target == "view" else node.target
        function = getattr(torch.Tensor, target) if isinstance(target, str) else target
    out = function(*args, **kwargs)
    zero = all(source.zero for source in sources if source.dims)
    if isinstance(out, Tensor):
        return _moved(t, node, compress(out), batch_dims(node), zero)
    return tuple(_moved(t, node, compress(part), (), zero) for part in out)


def _moved(t: Tracker, node: fx.Node, ids: Tensor, follow_batch: Sequence[int], zero: bool) -> Layout:
    lone = ids.numel() == 1 and bool((ids != FIXED).any())
    if lone or any(ids.shape[d] > 1 for d in follow_batch):
        t.atoms.freeze(ids, f"{describe(node)} merges channels with the batch or takes one of them")
        return fixed(ids.dim())
    return Layout(ids, zero)


def shaped_like(t: Tracker, node: fx.Node) -> Result:
    """`x.reshape_as(other)` and the like: the other tensor must lose the same channels, or be read in full size."""
    other = t.of(argument(node, 1, "other"))
    if not t.of(node.args[0]).dims or not other.dims:
        return opaque(t, node)
    result = movement(t, node)
    assert isinstance(result, Layout)
    t.atoms.unite(result.ids, other.ids, f"shaped like fixed channels by {describe(node)}")
    return result


def indexing(t: Tracker, node: fx.Node) -> Result:
    """Indexing: an element of a tuple, or integers and slices along the dims of a tensor."""
    source, index = node.args[0], node.args[1]
    layout = t.layouts.get(source) if isinstance(source, fx.Node) else None
    if isinstance(layout, tuple):
        assert isinstance(index, int)
        return layout[index]
    places = index if isinstance(index, tuple) else (index,)
    if not all(p is None or p is Ellipsis or isinstance(p, (int, slice)) for p in places) or not t.of(source).dims:
        return opaque(t, node)
    for dim, place in indexed_dims(places, t.of(source).ids.dim()):
        if dim in t.of(source).dims and (isinstance(place, int) or place.step not in (None, 1)):
            t.rigid(t.of(source).ids, dim, f"{describe(node)} takes single channels")
    return movement(t, node)


def indexed_dims(places: Sequence[object], rank: int) -> list[tuple[int, int | slice]]:
    """(dim of the tensor, integer or slice) for every entry of an index, except `None` and `...`."""
    n_used = sum(isinstance(p, (int, slice)) for p in places)
    found: list[tuple[int, int | slice]] = []
    dim = 0
    for place in places:
        if place is Ellipsis:
            dim += rank - n_used
        elif isinstance(place, (int, slice)):
            found.append((dim, place))
            dim += 1
    return found


def keep_size(t: Tracker, node: fx.Node, position: int, name: str, default: object) -> Result:
    """Data movement along dims whose size must not change: unbind, select, flip, roll."""
    source, dims = t.of(node.args[0]), argument(node, position, name, default)
    rank = source.ids.dim()
    for dim in range(rank) if dims is None else (dims,) if isinstance(dims, int) else dims:
        if dim % rank in source.dims:
            t.rigid(source.ids, dim % rank, f"{describe(node)} depends on the order of the channels")
    return movement(t, node)


def concatenate(t: Tracker, node: fx.Node) -> Result:
    """Concatenation, on the atoms without expanding the other dims."""
    sources, dim = list(argument(node, 0, "tensors")), argument(node, 1, "dim", 0)
    rank = len(shape_of(node))
    dim %= rank
    layouts = [t.of(source) for source in sources]
    others = {d for layout in layouts for d in layout.dims if d != dim}
    parts = []
    for source, layout in zip(sources, layouts, strict=True):
        shape = shape_of(source)
        parts.append(layout.ids.expand([shape[d] if d == dim or d in others else 1 for d in range(rank)]))
    ids = compress(torch.cat(parts, dim))
    if others:  # such as joined tokens: channels of the same index go together in all parts
        keep = [d for d in range(rank) if d != dim]
        ids = t.atoms.bind_whole(ids, keep, f"joined with fixed channels along another dim by {describe(node)}")
    return Layout(ids, all(layout.zero for layout in layouts if layout.dims))


def gated_halves(t: Tracker, node: fx.Node) -> Result:
    """`glu`: the first half times a function of the second; their channels are removed in pairs."""
    source = t.of(node.args[0])
    module = t.modules[str(node.target)] if node.op == "call_module" else None
    dim = int(module.dim if isinstance(module, nn.GLU) else argument(node, 1, "dim", -1)) % source.ids.dim()
    if dim not in source.dims:
        return source
    first, second = source.ids.chunk(2, dim)
    t.atoms.unite(first, second, f"gated by fixed channels in {describe(node)}")
    return Layout(first, source.zero)


def stacking(t: Tracker, node: fx.Node) -> Result:
    """Stacking: channels of the same index go together in all operands."""
    result = movement(t, node)
    assert isinstance(result, Layout)
    rank = len(shape_of(node))
    keep = [d for d in range(rank) if d != argument(node, 1, "dim", 0) % rank]
    ids = t.atoms.bind_whole(result.ids, keep, f"stacked with fixed channels by {describe(node)}")
    return Layout(ids, result.zero)


def padding(t: Tracker, node: fx.Node) -> Result:
    """Padding; padded channels are atoms of their own, which go with the channels that they are added to later."""
    source, widths = t.of(node.args[0]), argument(node, 1, "pad")
    mode, value = argument(node, 2, "mode", "constant"), argument(node, 3, "value")
    rank = source.ids.dim()
    padded = [rank - 1 - i // 2 for i, width in enumerate(widths) if width != 0]
    inside = [d for d in source.dims if d in padded]
    if not inside:
        return Layout(source.ids, source.zero and not value)
    dim = inside[0]
    before, after = widths[2 * (rank - 1 - dim) : 2 * (rank - 1 - dim) + 2]
    if len(source.dims) > 1 or mode != "constant" or value or min(before, after) < 0:
        return opaque(t, node)
    parts = (t.atoms.fresh(before), source.ids.reshape(-1), t.atoms.fresh(after))
    return Layout(torch.cat(parts).reshape([-1 if d == dim else 1 for d in range(rank)]), source.zero)
