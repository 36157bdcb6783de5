"""From masks to a smaller module: the same function as the masked one, with the dropped channels really gone.

Both forms are deep copies; the segment that they come from keeps its tensors. That they agree is checked on random
input in float64 whenever a segment is compacted, so that a wrong rule about an operation cannot give a wrong network.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from pnc.channels import Channels, ChannelSpaces, WeightSlice
from pnc.errors import MismatchError, PNCError
from pnc.layouts import argument, family, shape_of
from pnc.leaf_probes import owned_tensor, replace_tensor, resize_attributes
from pnc.masks import ChannelMasks
from pnc.tensor_rules import indexed_dims
from pnc.tracing import info

TOLERANCE = 1e-10
"""Largest accepted difference of masked and compacted outputs, relative to the largest output, in float64."""


def mask_segment(segment: fx.GraphModule, spaces: ChannelSpaces, masks: ChannelMasks) -> fx.GraphModule:
    """Copy of a segment in which the dropped channels are zero, with the weights and biases of their norms.

    Same shapes as before; the reference for what `compact` computes, and a cheap way to try masks.

    Args:
        segment: The one that `spaces` were found in.
    Raises:
        MismatchError: `masks` were made for other spaces.
    """
    return _own(_mask(_structure(segment), spaces, kept_flags(spaces, masks)))


def compact(segment: fx.GraphModule, spaces: ChannelSpaces, masks: ChannelMasks) -> fx.GraphModule:
    """Copy of a segment without the dropped channels: smaller weights, same function as `mask_segment`.

    Has its own tensors, in evaluation mode and without gradients. Where `spaces` were found with a free output, the
    output has the channels `output_channels` only.

    Args:
        segment: The one that `spaces` were found in.
    Raises:
        MismatchError: `masks` were made for other spaces.
        PNCError: the smaller network differs from the masked one, or cannot run.
    """
    flags = kept_flags(spaces, masks)
    smaller = _own(_shrink(_structure(segment), spaces, flags))
    masked = _mask(_structure(segment), spaces, flags)
    _check(_as_double(masked), _as_double(_structure(smaller)), spaces, flags)
    return smaller


def output_channels(spaces: ChannelSpaces, masks: ChannelMasks) -> Tensor | None:
    """Indices of the output's channels that a compacted segment still has, int64; None where it has all of them."""
    if spaces.output is None:
        return None
    return kept_flags(spaces, masks)[spaces.output.units].nonzero().reshape(-1)


def _structure(segment: fx.GraphModule) -> fx.GraphModule:
    """Copy of graph and modules that still shares the tensors, in evaluation mode, parametrizations made plain weights.

    Tensors of the copy may be replaced but not written to; `_own` ends the sharing.
    """
    tensors = [*segment.named_parameters(), *segment.named_buffers()]
    # Taking a parametrization off writes to its tensors.
    shared = {id(tensor): tensor for name, tensor in tensors if "parametrizations" not in name.split(".")}
    structure = copy.deepcopy(segment, dict(shared))
    for module in structure.modules():
        module.training = False
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return structure


def _own(segment: fx.GraphModule, dtype: torch.dtype | None = None) -> fx.GraphModule:
    """Give a structure its own tensors, without gradients; floating-point ones converted if `dtype` says so."""
    for module in segment.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None:
                    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                    copied = tensor.detach().to(wanted, copy=True)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    table[name] = nn.Parameter(copied, requires_grad=False) if is_parameter else copied
    return segment


def own_copy(segment: fx.GraphModule) -> fx.GraphModule:
    """Copy of a segment with its own tensors, in evaluation mode, without gradients, parametrizations made plain."""
    return _own(_structure(segment))


def kept_flags(spaces: ChannelSpaces, masks: ChannelMasks) -> Tensor:
    """Kept flag of every unit, and True at the end, where `KEPT` (-1) points; (n_units + 1,)."""
    if {s.name: s.size for s in spaces.spaces} != {name: len(mask) for name, mask in masks.kept.items()}:
        raise MismatchError(
            "masks: made for other channel spaces than the given ones; make them with channel_masks or "
            "masks_for_density from these spaces"
        )
    return torch.cat([masks.flat, torch.ones(1, dtype=torch.bool)])


# --------------------------------------------------------------------------------------------------------- weights


def _mask(segment: fx.GraphModule, spaces: ChannelSpaces, flags: Tensor) -> fx.GraphModule:
    nodes = {node.name: node for node in segment.graph.nodes}
    for s in spaces.slices:
        dropped = (~flags[s.units]).nonzero().reshape(-1)
        if s.zeroed and len(dropped):
            if s.user:
                _insert(segment, nodes, s, torch.index_fill, dropped, 0.0)
            else:
                tensor = owned_tensor(segment, s.tensor)
                replace_tensor(segment, s.tensor, tensor.index_fill(s.dim, dropped.to(tensor.device), 0.0))
    segment.recompile()
    return segment


def _shrink(segment: fx.GraphModule, spaces: ChannelSpaces, flags: Tensor) -> fx.GraphModule:
    nodes = {node.name: node for node in segment.graph.nodes}
    for s in spaces.slices:
        keep = flags[s.units].nonzero().reshape(-1)
        if len(keep) == s.shape[s.dim]:
            continue
        if s.user:
            _insert(segment, nodes, s, torch.index_select, keep)
        else:
            tensor = owned_tensor(segment, s.tensor)
            replace_tensor(segment, s.tensor, tensor.index_select(s.dim, keep.to(tensor.device)))
            _resize_module(segment.get_submodule(s.tensor.rpartition(".")[0]), s.shape[s.dim], len(keep))
    for node in nodes.values():
        if node.op == "call_module":
            _resize_bare_norm(segment.get_submodule(str(node.target)), spaces.nodes.get(node.name), flags)
        else:
            _rewrite(node, spaces, flags)
    for name, channels in spaces.nodes.items():
        n_kept = int(flags[channels.units].sum())
        _resize_info(nodes[name], channels.dim, n_kept)
    segment.graph.lint()
    segment.recompile()
    return segment


def _insert(
    segment: fx.GraphModule,
    nodes: dict[str, fx.Node],
    s: WeightSlice,
    function: Callable[..., Tensor],
    index: Tensor,
    *arguments: float,
) -> None:
    """Put `function(operand, dim, index, ...)` between an operand inside the graph and the node that reads it."""
    operand, user = nodes[s.tensor], nodes[s.user]
    # An operand that follows several sets of channels is cut once for each: what the user reads now is the last result.
    while operand not in user.all_input_nodes:
        operand = next(n for n in operand.users if n.meta.get("cut_for") == s.user)
    name = f"_index{sum(key.startswith('_index') for key in segment._buffers)}"
    segment.register_buffer(name, index.to(_device(segment)), persistent=False)
    with segment.graph.inserting_before(user):
        held = segment.graph.get_attr(name)
        held.meta["pnc"] = dataclasses.replace(
            info(operand), shape=tuple(index.shape), shape3=tuple(index.shape), dtype=index.dtype, from_input=False
        )
        result = segment.graph.call_function(function, (operand, s.dim, held, *arguments))
    result.meta.update(pnc=info(operand), cut_for=s.user)
    user.replace_input_with(operand, result)


def _resize_module(module: nn.Module, old: int, new: int) -> None:
    """Correct the numbers that a layer keeps beside its tensors, of which one dim shrank from `old` to `new`."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        before, module.out_channels = module.out_channels, module.weight.shape[0]
        if module.groups > 1:  # only whole groups go
            module.groups = module.groups * module.out_channels // before
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    else:
        if isinstance(module, nn.GroupNorm) and module.num_channels == old:
            module.num_groups = module.num_groups * new // old
        resize_attributes(module, old, new)


def _resize_bare_norm(module: nn.Module, channels: Channels | None, flags: Tensor) -> None:
    """The same for a norm without weights, which no slice leads to."""
    if channels is not None and isinstance(module, (_NormBase, nn.GroupNorm)) and module.weight is None:
        _resize_module(module, len(channels.units), int(flags[channels.units].sum()))


# --------------------------------------------------------------------------- calls that carry sizes in their arguments


def _rewrite(node: fx.Node, spaces: ChannelSpaces, flags: Tensor) -> None:
    """Correct the sizes in the arguments of a call, if channels lie along the dims that they are about."""
    rule = _REWRITES.get(family(node)) if node.op in ("call_function", "call_method") else None
    if rule is not None:
        rule(node, spaces, flags)


def _sizes(node: fx.Node, spaces: ChannelSpaces, flags: Tensor) -> None:
    """`reshape`, `view`, `expand`: one size per dim of the result."""
    channels = spaces.nodes.get(node.name)
    if channels is None:
        return
    packed = isinstance(node.args[1], (tuple, list))
    sizes = list(node.args[1]) if packed else list(node.args[1:])  # type: ignore[arg-type]
    if sizes[channels.dim] != -1:
        sizes[channels.dim] = int(flags[channels.units].sum())
    node.args = (node.args[0], tuple(sizes)) if packed else (node.args[0], *sizes)


def _unflatten(node: fx.Node, spaces: ChannelSpaces, flags: Tensor) -> None:
    channels, source = spaces.nodes.get(node.name), node.args[0]
    if channels is None:
        return
    dim, sizes = argument(node, 1, "dim") % len(shape_of(source)), list(argument(node, 2, "sizes"))
    if dim <= channels.dim < dim + len(sizes) and sizes[channels.dim - dim] != -1:
        sizes[channels.dim - dim] = int(flags[channels.units].sum())
    node.args, node.kwargs = (source, dim, tuple(sizes)), {}


def _pieces(node: fx.Node, spaces: ChannelSpaces, flags: Tensor) -> None:
    """`split` and `chunk` along the channels: the sizes of the pieces are spelt out."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    channels = spaces.nodes.get(source.name)
    if channels is None:
        return
    name = {"split": "split_size_or_sections", "chunk": "chunks"}[family(node)]
    how, dim = argument(node, 1, name, node.kwargs.get("split_size")), argument(node, 2, "dim", 0)
    if dim % len(shape_of(source)) == channels.dim:
        kept = flags[channels.units]
        pieces = torch.split(kept, how) if family(node) == "split" else torch.chunk(kept, how)
        node.op, node.target = "call_function", torch.split
        node.args, node.kwargs = (source, [int(piece.sum()) for piece in pieces], dim), {}


def _index(node: fx.Node, spaces: ChannelSpaces, flags: Tensor) -> None:
    """Slices along the channels."""
    source, index = node.args
    channels = spaces.nodes.get(source.name) if isinstance(source, fx.Node) else None
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


def _padding(node: fx.Node, spaces: ChannelSpaces, flags: Tensor) -> None:
    channels = spaces.nodes.get(node.name)
    if channels is None:
        return
    widths = list(argument(node, 1, "pad"))
    place = 2 * (len(shape_of(node)) - 1 - channels.dim)
    if place + 1 < len(widths):
        kept, (before, after) = flags[channels.units], widths[place : place + 2]
        widths[place : place + 2] = int(kept[:before].sum()), int(kept[len(kept) - after :].sum())
    node.args = (node.args[0], widths, *node.args[2:])
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "pad"}


def _groups(position: int, name: str) -> Callable[[fx.Node, ChannelSpaces, Tensor], None]:
    """Number of groups of a functional convolution or group norm: only whole groups go."""

    def rewrite(node: fx.Node, spaces: ChannelSpaces, flags: Tensor) -> None:
        channels, groups = spaces.nodes.get(node.name), argument(node, position, name, 1)
        if channels is None or groups == 1:
            return
        groups = groups * int(flags[channels.units].sum()) // len(channels.units)
        if len(node.args) > position:
            node.args = (*node.args[:position], groups, *node.args[position + 1 :])
        else:
            node.kwargs = {**node.kwargs, name: groups}

    return rewrite


_REWRITES: dict[str, Callable[[fx.Node, ChannelSpaces, Tensor], None]] = {
    **dict.fromkeys(("reshape", "view", "expand"), _sizes),
    "unflatten": _unflatten,
    **dict.fromkeys(("split", "chunk"), _pieces),
    "getitem": _index,
    "pad": _padding,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _groups(6, "groups")),
    "group_norm": _groups(1, "num_groups"),
}


def _resize_info(node: fx.Node, dim: int, size: int) -> None:
    facts = info(node)
    assert facts.shape is not None and facts.shape3 is not None
    resized = [(*shape[:dim], size, *shape[dim + 1 :]) for shape in (facts.shape, facts.shape3)]
    node.meta["pnc"] = dataclasses.replace(facts, shape=resized[0], shape3=resized[1])


# ----------------------------------------------------------------------------------------------------------- check

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _as_double(segment: fx.GraphModule) -> fx.GraphModule:
    """Give a structure tensors of float64, and turn the casts inside its graph to float64 too."""

    def double(value: Any) -> Any:
        return torch.float64 if value in _FLOATS else value

    for node in segment.graph.nodes:
        if node.op == "call_method" and node.target in ("float", "half", "bfloat16"):
            node.target = "double"
        node.args, node.kwargs = map_aggregate(node.args, double), map_aggregate(node.kwargs, double)
    segment.recompile()
    return _own(segment, torch.float64)


def _check(masked: fx.GraphModule, smaller: fx.GraphModule, spaces: ChannelSpaces, flags: Tensor) -> None:
    """Compare both on random input of the recorded shape.

    Raises:
        PNCError: the outputs differ by more than `TOLERANCE`.
    """
    given = next(node for node in masked.graph.nodes if node.op == "placeholder")
    x = torch.randn(shape_of(given), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.to(_device(masked))
    with torch.no_grad():
        expected = masked(x.clone())
        if spaces.output is not None:
            kept = flags[spaces.output.units].nonzero().reshape(-1)
            expected = expected.index_select(spaces.output.dim, kept.to(x.device))
        try:
            found = smaller(x)
        except (RuntimeError, ValueError) as error:
            raise PNCError(f"the compacted segment cannot run ({str(error).splitlines()[0]}); {_WAY_OUT}") from error
    if found.shape != expected.shape:
        raise PNCError(f"the compacted segment gives {tuple(found.shape)}, not {tuple(expected.shape)}; {_WAY_OUT}")
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= TOLERANCE * scale:
        raise PNCError(
            f"the compacted segment differs from the masked one by {difference:.2g} (largest output {scale:.2g}); "
            f"{_WAY_OUT}"
        )


_WAY_OUT = "please report the network, and clone it with density=1 meanwhile"


def _device(segment: fx.GraphModule) -> torch.device:
    tensors = [*segment.parameters(), *segment.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
