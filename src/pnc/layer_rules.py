"""Rules for layers with weights: convolution, linear, normalisation, and leaf modules that experiments understand.

A rule reads the layouts of a node's inputs, notes in the `Tracker` which weights follow which atoms and which atoms
must go together, and returns the layout of the node's result.
"""

from collections.abc import Sequence

from torch import Tensor, fx, nn

from pnc import leaf_probes
from pnc.layouts import (
    Layout,
    Result,
    Tracker,
    Weight,
    argument,
    describe,
    family,
    fixed,
    opaque,
    shape_of,
)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# ---------------------------------------------------------------------------------------------- convolution and linear


def _read_channels(t: Tracker, node: fx.Node, source: Layout, dim: int) -> Tensor | None:
    """Atoms along the channel dim of a layer's input; None (all frozen) where others than these are tracked."""
    if source.dims == (dim,):
        return source.ids.reshape(-1)
    if source.dims:
        t.freeze(node, f"{describe(node)} reads channels that lie along another dim")
    return None


def _on_dim(ids: Tensor, dim: int, rank: int) -> Tensor:
    return ids.reshape([-1 if d == dim else 1 for d in range(rank)])


def _mixing_layer(t: Tracker, node: fx.Node, dim: int) -> Result:
    """Linear, or convolution without groups: reads one set of channels and opens a new one."""
    weight, bias = t.weight(node, 1, "weight"), t.weight(node, 2, "bias")
    source = t.of(node.args[0])
    channels = _read_channels(t, node, source, dim)
    if channels is not None and source.zero:
        t.follow(weight, 1, channels, zeroed=False)
    elif channels is not None:
        t.freeze(node, f"removed channels would not be 0 before {describe(node)}")
    assert weight is not None
    n_out = weight.shape[0]
    if n_out < 2:
        return fixed(len(shape_of(node)))
    ids = t.atoms.fresh(n_out)
    t.follow(weight, 0, ids, zeroed=True)
    t.follow(bias, 0, ids, zeroed=True)
    return Layout(_on_dim(ids, dim, len(shape_of(node))))


def linear(t: Tracker, node: fx.Node) -> Result:
    """Linear layer, over the last dim."""
    return _mixing_layer(t, node, len(shape_of(node)) - 1)


def convolution(t: Tracker, node: fx.Node) -> Result:
    """Convolution, with any number of groups."""
    module = t.modules[str(node.target)] if node.op == "call_module" else None
    groups = int(module.groups if isinstance(module, CONVOLUTIONS) else argument(node, 6, "groups", 1))
    if groups == 1:
        return _mixing_layer(t, node, 1)
    return _grouped_conv(t, node, groups)


def _grouped_conv(t: Tracker, node: fx.Node, groups: int) -> Result:
    """Channels go in whole groups, a group's inputs and outputs together; depthwise is a group per channel."""
    weight, bias = t.weight(node, 1, "weight"), t.weight(node, 2, "bias")
    source, rank = t.of(node.args[0]), len(shape_of(node))
    channels = _read_channels(t, node, source, 1)
    if channels is None:
        return fixed(rank)
    inputs = channels.reshape(groups, -1)
    group_ids = t.atoms.bind_whole(inputs, (0,), f"grouped with fixed channels by {describe(node)}")
    assert weight is not None
    outputs = group_ids.expand(groups, weight.shape[0] // groups).reshape(-1)
    t.follow(weight, 0, outputs, zeroed=True)
    t.follow(bias, 0, outputs, zeroed=True)
    return Layout(_on_dim(outputs, 1, rank))


def foreign_convolution(t: Tracker, node: fx.Node) -> Result:
    """A convolution with a forward of its own ("same" padding, standardised weights): tried out."""
    module = t.modules[str(node.target)]
    assert isinstance(module, CONVOLUTIONS)
    rows, columns = leaf_probes.sliceable_conv(module, shape_of(node.args[0]))
    if rows and columns:
        return convolution(t, node)
    return refuse(t, node, f"{type(module).__name__} ({node.name}) computes its weight from all channels")


def refuse(t: Tracker, node: fx.Node, reason: str) -> Result:
    """A layer of which nothing can be removed, neither what it reads nor what it makes."""
    t.refused[str(node.target)] = reason
    return opaque(t, node, reason)


# --------------------------------------------------------------------------------------------------- normalisation


def channel_norm(t: Tracker, node: fx.Node) -> Result:
    """BatchNorm and InstanceNorm in evaluation mode: channel by channel; zero weight and bias make zero."""
    source = t.of(node.args[0])
    channels = _read_channels(t, node, source, 1)
    if channels is None:
        return fixed(len(shape_of(node)))
    statistics = [t.weight(node, 1, "running_mean"), t.weight(node, 2, "running_var")]
    weight, bias = t.weight(node, 3, "weight"), t.weight(node, 4, "bias")
    for tensor in statistics:
        t.follow(tensor, 0, channels, zeroed=False)
    for tensor in (weight, bias):
        t.follow(tensor, 0, channels, zeroed=True)
    # Without statistics (InstanceNorm) a channel of zeros stays zero; with them the mean is subtracted.
    return Layout(source.ids, zero=weight is not None or (source.zero and statistics == [None, None]))


def group_norm(t: Tracker, node: fx.Node) -> Result:
    """Channels go in whole groups."""
    module = t.modules[str(node.target)] if node.op == "call_module" else None
    groups = int(module.num_groups if isinstance(module, nn.GroupNorm) else argument(node, 1, "num_groups"))
    source = t.of(node.args[0])
    channels = _read_channels(t, node, source, 1)
    if channels is None or groups == 1:
        return opaque(t, node, f"{describe(node)} mixes all channels")
    group_ids = t.atoms.bind_whole(channels.reshape(groups, -1), (0,), f"normalised with fixed channels by {node.name}")
    ids = group_ids.expand(groups, len(channels) // groups).reshape(-1)
    weight, bias = t.weight(node, 2, "weight"), t.weight(node, 3, "bias")
    t.follow(weight, 0, ids, zeroed=True)
    t.follow(bias, 0, ids, zeroed=True)
    return Layout(_on_dim(ids, 1, len(shape_of(node))), zero=weight is not None or source.zero)


def _mix(t: Tracker, node: fx.Node, dims: Sequence[int], zero: bool) -> Result:
    """An operation that mixes what lies along `dims` and keeps the shape: whole indices of the other dims survive."""
    source = t.of(node.args[0])
    mixed = [d % max(source.ids.dim(), 1) for d in dims]
    others = [d for d in source.dims if d not in mixed]
    if not others and source.dims:
        return opaque(t, node, f"{describe(node)} mixes the channels")
    ids = t.atoms.bind_whole(source.ids, others, f"mixed with fixed channels by {describe(node)}")
    return Layout(ids, zero and source.zero)


def layer_norm(t: Tracker, node: fx.Node) -> Result:
    """LayerNorm and RMSNorm: mix the last dims; per head, whole heads can go."""
    if node.op == "call_module":
        module = t.modules[str(node.target)]
        shape, bias = module.normalized_shape, getattr(module, "bias", None)
    else:
        shape, bias = argument(node, 1, "normalized_shape"), argument(node, 3, "bias")
        if family(node) == "rms_norm":
            bias = None
    return _mix(t, node, range(-len(tuple(shape)), 0), zero=bias is None)


def softmax(t: Tracker, node: fx.Node) -> Result:
    """Mixes one dim, and makes uniform weights of zeros."""
    dim = getattr(t.modules[str(node.target)], "dim", None) if node.op == "call_module" else argument(node, 1, "dim")
    return opaque(t, node) if dim is None else _mix(t, node, (int(dim),), zero=False)


def normalize(t: Tracker, node: fx.Node) -> Result:
    """Division by the norm along one dim (never by less than eps): zeros stay zero."""
    return _mix(t, node, (int(argument(node, 2, "dim", 1)),), zero=True)


def foreign_leaf(t: Tracker, node: fx.Node) -> Result:
    """A module without a rule: elementwise, or channel by channel with parameters, if experiments show so."""
    module, sources = t.modules[str(node.target)], node.all_input_nodes
    reason = f"no rule for {type(module).__name__} ({node.target})"
    if len(sources) != 1 or node.args != (sources[0],) or node.kwargs:
        return opaque(t, node, reason)
    source, rank = t.of(sources[0]), len(shape_of(sources[0]))
    if leaf_probes.is_elementwise(module, rank):
        return Layout(source.ids, source.zero and leaf_probes.maps_zero_to_zero(module, rank))
    if len(source.dims) != 1:
        return opaque(t, node, reason)
    found = leaf_probes.per_channel(module, shape_of(sources[0]), source.dims[0])
    if found is None:
        return opaque(t, node, reason)
    parameters = {name for name, _ in module.named_parameters()}
    for name, dim in found.tensors:
        weight = Weight(
            f"{node.target}.{name}",
            user="",
            shape=tuple(leaf_probes.owned_tensor(module, name).shape),
            is_parameter=name in parameters,
        )
        t.follow(weight, dim, source.ids.reshape(-1), zeroed=weight.is_parameter)
    return Layout(source.ids, found.makes_zero or (source.zero and found.keeps_zero))
