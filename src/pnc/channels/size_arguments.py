"""Size arguments of calls, corrected after channels were removed.

Most operations adapt to their input. Some carry sizes (reshapes, splits, groups); others count channels (means, norms
over all channels) and keep their old denominators.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from pnc.channels.channel_spaces import Channels
from pnc.channels.tensor_rules import indexed_dims
from pnc.graph.nodes import NodeInfo, argument, family, shape_of

Nodes = Mapping[str, Channels]
"""Where units lie in the tensors of the graph, by node (`ChannelSpaces.nodes`)."""


def rewrite(node: fx.Node, nodes: Nodes, flags: Tensor) -> None:
    """Correct the size arguments of a call along the dims that lost channels.

    Args:
        node: Changed in place.
        nodes: As found in the original graph.
        flags: Kept flag of every unit, and True at the end (`compaction.kept_flags`).
    """
    rule = _REWRITES.get(family(node)) if node.op in ("call_function", "call_method") else None
    if node.op == "call_module":
        rule = next((_MODULE_REWRITES[t] for t in type(_module(node)).__mro__ if t in _MODULE_REWRITES), None)
    if rule is not None:
        rule(node, nodes, flags)


def _n_kept(channels: Channels, flags: Tensor) -> int:
    return int(flags[channels.units].sum())


def _sizes(node: fx.Node, nodes: Nodes, flags: Tensor) -> None:
    """`reshape`, `view`, `expand`: one size per dim of the result."""
    channels = nodes.get(node.name)
    if channels is None:
        return
    given = argument(node, 1, "shape", node.kwargs.get("size"))
    packed = isinstance(given, (tuple, list))
    sizes = list(given) if packed else list(node.args[1:])
    if sizes[channels.dim] != -1:
        sizes[channels.dim] = _n_kept(channels, flags)
    node.args, node.kwargs = ((node.args[0], tuple(sizes)) if packed else (node.args[0], *sizes)), {}


def _unflatten(node: fx.Node, nodes: Nodes, flags: Tensor) -> None:
    channels, source = nodes.get(node.name), node.args[0]
    if channels is None:
        return
    dim, sizes = argument(node, 1, "dim") % len(shape_of(source)), list(argument(node, 2, "sizes"))
    if dim <= channels.dim < dim + len(sizes) and sizes[channels.dim - dim] != -1:
        sizes[channels.dim - dim] = _n_kept(channels, flags)
    node.args, node.kwargs = (source, dim, tuple(sizes)), {}


def _pieces(node: fx.Node, nodes: Nodes, flags: Tensor) -> None:
    """`split` and `chunk` along the channels: the sizes of all pieces are given."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    channels = nodes.get(source.name)
    if channels is None:
        return
    name = {"split": "split_size_or_sections", "chunk": "chunks"}[family(node)]
    how, dim = argument(node, 1, name, node.kwargs.get("split_size")), argument(node, 2, "dim", 0)
    if dim % len(shape_of(source)) == channels.dim:
        kept = flags[channels.units]
        pieces = torch.split(kept, how) if family(node) == "split" else torch.chunk(kept, how)
        node.op, node.target = "call_function", torch.split
        node.args, node.kwargs = (source, [int(piece.sum()) for piece in pieces], dim), {}


def _index(node: fx.Node, nodes: Nodes, flags: Tensor) -> None:
    """Slices along the channels."""
    source, index = node.args
    channels = nodes.get(source.name) if isinstance(source, fx.Node) else None
    if channels is None:
        return
    places = list(index) if isinstance(index, tuple) else [index]
    used = [i for i, place in enumerate(places) if isinstance(place, (int, slice))]
    for i, (dim, place) in zip(used, indexed_dims(places, len(shape_of(source))), strict=True):
        if dim == channels.dim and isinstance(place, slice):
            kept = flags[channels.units]
            first, last, _ = place.indices(len(kept))
            places[i] = slice(int(kept[:first].sum()), int(kept[:last].sum()))
    node.args = (source, tuple(places))


def _padding(node: fx.Node, nodes: Nodes, flags: Tensor) -> None:
    channels = nodes.get(node.name)
    if channels is None:
        return
    widths = list(argument(node, 1, "pad"))
    place = 2 * (len(shape_of(node)) - 1 - channels.dim)
    if place + 1 < len(widths):
        kept, (before, after) = flags[channels.units], widths[place : place + 2]
        widths[place : place + 2] = int(kept[:before].sum()), int(kept[len(kept) - after :].sum())
    node.args = (node.args[0], widths, *node.args[2:])
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "pad"}


def _groups(position: int, name: str) -> Callable[[fx.Node, Nodes, Tensor], None]:
    """Number of groups of a functional convolution or group norm: only whole groups are removed."""

    def rewrite(node: fx.Node, nodes: Nodes, flags: Tensor) -> None:
        channels, groups = nodes.get(node.name), argument(node, position, name, 1)
        if channels is None or groups == 1:
            return
        groups = groups * _n_kept(channels, flags) // len(channels.units)
        if len(node.args) > position:
            node.args = (*node.args[:position], groups, *node.args[position + 1 :])
        else:
            node.kwargs = {**node.kwargs, name: groups}

    return rewrite


# ------------------------------------------------------------------------------------------- calls that count channels


def _mean(node: fx.Node, nodes: Nodes, flags: Tensor) -> None:
    """A mean over the channels: removed ones count as zeros."""
    source, dims = node.args[0], argument(node, 1, "dim")
    channels = nodes.get(source.name) if isinstance(source, fx.Node) else None
    if channels is None or dims is None:
        return
    rank = len(shape_of(source))
    if channels.dim in {d % rank for d in ((dims,) if isinstance(dims, int) else dims)}:
        share = _n_kept(channels, flags) / len(channels.units)
        node.args, node.kwargs = (source, dims, bool(argument(node, 2, "keepdim", False)), share), {}
        node.op, node.target = "call_function", part_mean


def part_mean(x: Tensor, dims: int | list[int], keepdim: bool, share: float) -> Tensor:
    """Mean of a tensor without its channels of zeros; `share` of the entries that the mean counts remain."""
    return x.mean(dims, keepdim) * share


def part_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dim: int,
    n_dims: int,
    share: float,
    eps: float | None,
    centred: bool,
) -> Tensor:
    """LayerNorm, RMSNorm or GroupNorm with one group, of a tensor without its channels of zeros.

    Eight arguments, because a graph can only pass plain values.

    Args:
        x: Any shape.
        weight: Scale of the remaining channels, (size of `dim`,).
        bias: Likewise.
        dim: Of the channels.
        n_dims: Number of last dims that mean and variance are taken over.
        share: Remaining channels as a share of those that mean and variance count.
        eps: Added to the variance; None for the machine epsilon of the type, as in RMSNorm.
        centred: Subtract the mean (RMSNorm does not).
    """
    dims = list(range(-n_dims, 0))
    if centred:
        mean = x.mean(dims, keepdim=True) * share
        variance = (x - mean).square().mean(dims, keepdim=True) * share + mean.square() * (1 - share)
        x = x - mean
    else:
        variance = x.square().mean(dims, keepdim=True) * share
    x = x * torch.rsqrt(variance + (torch.finfo(x.dtype).eps if eps is None else eps))
    shape = [-1 if d == dim else 1 for d in range(x.dim())]
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _norm(node: fx.Node, nodes: Nodes, flags: Tensor) -> None:
    """A norm over all channels, some of them removed: replaced by a call of `part_norm`."""
    source, rank = node.args[0], len(shape_of(node))
    channels = nodes.get(source.name) if isinstance(source, fx.Node) else None
    if channels is None or _n_kept(channels, flags) == len(channels.units):
        return
    weight, bias, n_dims, eps, centred = (
        _module_norm(node, rank) if node.op == "call_module" else _call_norm(node, rank)
    )
    if channels.dim >= rank - n_dims:
        share = _n_kept(channels, flags) / len(channels.units)
        node.args, node.kwargs = (source, weight, bias, channels.dim, n_dims, share, eps, centred), {}
        node.op, node.target = "call_function", part_norm


_NormFacts = tuple[Any, Any, int, float | None, bool]
"""Weight and bias (nodes or None), number of last dims, eps, whether the mean is subtracted."""


def _call_norm(node: fx.Node, rank: int) -> _NormFacts:
    if family(node) == "rms_norm":
        weight, eps = argument(node, 2, "weight"), argument(node, 3, "eps")
        return weight, None, len(argument(node, 1, "normalized_shape")), eps, False
    weight, bias, eps = argument(node, 2, "weight"), argument(node, 3, "bias"), argument(node, 4, "eps", 1e-5)
    if family(node) == "group_norm":
        return weight, bias, rank - 1, eps, True
    return weight, bias, len(argument(node, 1, "normalized_shape")), eps, True


def _module_norm(node: fx.Node, rank: int) -> _NormFacts:
    module = _module(node)
    assert isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm))
    affine: list[fx.Node | None] = []
    for name in ("weight", "bias"):
        tensor = getattr(module, name, None)
        if tensor is None:
            affine.append(None)
            continue
        with node.graph.inserting_before(node):
            held = node.graph.get_attr(f"{node.target}.{name}")
        shape = tuple(tensor.shape)
        held.meta["pnc"] = NodeInfo(shape, shape, tensor.dtype, is_tensor=True, from_input=False, scope="")
        affine.append(held)
    n_dims = rank - 1 if isinstance(module, nn.GroupNorm) else len(module.normalized_shape)
    return affine[0], affine[1], n_dims, module.eps, not isinstance(module, nn.RMSNorm)


def _group_norm(node: fx.Node, nodes: Nodes, flags: Tensor) -> None:
    groups = _module(node).num_groups if node.op == "call_module" else argument(node, 1, "num_groups")
    if groups == 1:
        _norm(node, nodes, flags)
    elif node.op == "call_function":
        _groups(1, "num_groups")(node, nodes, flags)


def _module(node: fx.Node) -> Any:
    owner = node.graph.owning_module
    assert owner is not None
    return owner.get_submodule(str(node.target))


_REWRITES: dict[str, Callable[[fx.Node, Nodes, Tensor], None]] = {
    **dict.fromkeys(("reshape", "view", "expand"), _sizes),
    "unflatten": _unflatten,
    **dict.fromkeys(("split", "chunk"), _pieces),
    "getitem": _index,
    "pad": _padding,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _groups(6, "groups")),
    "mean": _mean,
    "group_norm": _group_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm),
}

_MODULE_REWRITES: dict[type[nn.Module], Callable[[fx.Node, Nodes, Tensor], None]] = {
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _norm,
    nn.RMSNorm: _norm,
}
