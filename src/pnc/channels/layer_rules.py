"""Rules for layers with weights: convolution, linear, normalisation, and leaf modules tested by experiment.

A rule reads the layouts of a node's inputs, notes in the `Tracker` which weights follow which atoms and which atoms
go together, and returns the layout of the node's result.
"""

from collections.abc import Sequence

from torch import Tensor, fx, nn

from pnc.channels import module_probes
from pnc.channels.channel_layouts import Layout, Result, Tracker, Weight, fixed, opaque
from pnc.graph.nodes import argument, describe, family, shape_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# ---------------------------------------------------------------------------------------------- convolution and linear


def _read_channels(t: Tracker, node: fx.Node, source: Layout, dim: int) -> Tensor | None:
    """Atoms along the channel dim of a layer's input; None if there are none, or atoms along other dims."""
    if source.dims == (dim,):
        return source.ids.reshape(-1)
    if source.dims:
        opaque(t, node, f"{describe(node)} reads channels along another dim")
    return None


def _on_dim(ids: Tensor, dim: int, rank: int) -> Tensor:
    return ids.reshape([-1 if d == dim else 1 for d in range(rank)])


def _mixing_layer(t: Tracker, node: fx.Node, dim: int) -> Result:
    """Linear, or convolution without groups: reads one set of channels and opens a new one."""
    weight, bias = t.weight(node, 1, "weight"), t.weight(node, 2, "bias")
    source = t.of(node.args[0])
    channels = _read_channels(t, node, source, dim)
    if channels is not None:
        # If removed channels are not 0 (an offset after the activation), a mask must zero the reader's columns too.
        t.follow(weight, 1, channels, zeroed=not source.zero)
        t.reads.append((node, node.all_input_nodes[0]))
    assert weight is not None
    n_out = weight.shape[0]
    if n_out < 2:
        return fixed(len(shape_of(node)))
    ids = t.atoms.fresh(n_out)
    t.follow(weight, 0, ids, zeroed=True)
    t.follow(bias, 0, ids, zeroed=True)
    return Layout(_on_dim(ids, dim, len(shape_of(node))))


def linear(t: Tracker, node: fx.Node) -> Result:
    """Linear layer over the last dim; channels along another dim pass through one by one."""
    source, last = t.of(node.args[0]), len(shape_of(node)) - 1
    if source.dims and last not in source.dims:
        return Layout(source.ids, source.zero and t.weight(node, 2, "bias") is None)
    return _mixing_layer(t, node, last)


def convolution(t: Tracker, node: fx.Node) -> Result:
    """Convolution, with any number of groups."""
    module = t.modules[str(node.target)] if node.op == "call_module" else None
    groups = int(module.groups if isinstance(module, CONVOLUTIONS) else argument(node, 6, "groups", 1))
    if groups == 1:
        return _mixing_layer(t, node, 1)
    return _grouped_conv(t, node, groups)


def _grouped_conv(t: Tracker, node: fx.Node, groups: int) -> Result:
    """Whole groups are removed, with their inputs and outputs; depthwise means one group per channel."""
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
    """A convolution with its own forward ("same" padding, standardised weights), tested by experiment."""
    module = t.modules[str(node.target)]
    assert isinstance(module, CONVOLUTIONS)
    rows, columns = module_probes.sliceable_conv(module, shape_of(node.args[0]))
    if rows and columns:
        return convolution(t, node)
    return refuse(t, node, f"{type(module).__name__} ({node.name}) computes its weight from all channels")


def refuse(t: Tracker, node: fx.Node, reason: str) -> Result:
    """A layer from which nothing can be removed, neither inputs nor outputs."""
    t.refused[str(node.target)] = reason
    return opaque(t, node, reason)


# --------------------------------------------------------------------------------------------------- normalisation


def channel_norm(t: Tracker, node: fx.Node) -> Result:
    """BatchNorm and InstanceNorm in evaluation mode: channel by channel; zero weight and bias give zero."""
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
    # Without running statistics (InstanceNorm) a channel of zeros stays zero; otherwise the mean is subtracted.
    return Layout(source.ids, zero=weight is not None or (source.zero and statistics == [None, None]))


def group_norm(t: Tracker, node: fx.Node) -> Result:
    """Whole groups are removed; single channels if there is only one group."""
    module = t.modules[str(node.target)] if node.op == "call_module" else None
    groups = int(module.num_groups if isinstance(module, nn.GroupNorm) else argument(node, 1, "num_groups"))
    source = t.of(node.args[0])
    channels = _read_channels(t, node, source, 1)
    if channels is None:
        return fixed(len(shape_of(node)))
    if groups == 1:
        return _shared_norm(t, node, channels, (t.weight(node, 2, "weight"), t.weight(node, 3, "bias")))
    group_ids = t.atoms.bind_whole(channels.reshape(groups, -1), (0,), f"normalised with fixed channels by {node.name}")
    ids = group_ids.expand(groups, len(channels) // groups).reshape(-1)
    weight, bias = t.weight(node, 2, "weight"), t.weight(node, 3, "bias")
    t.follow(weight, 0, ids, zeroed=True)
    t.follow(bias, 0, ids, zeroed=True)
    return Layout(_on_dim(ids, 1, len(shape_of(node))), zero=weight is not None or source.zero)


def layer_norm(t: Tracker, node: fx.Node) -> Result:
    """LayerNorm and RMSNorm over the last dims: single channels can go; if they act per head, whole heads."""
    source, last = t.of(node.args[0]), len(shape_of(node)) - 1
    weight = t.weight(node, 2, "weight")
    bias = t.weight(node, 3, "bias") if "rms" not in family(node).lower() else None
    module = t.modules[str(node.target)] if node.op == "call_module" else None
    shape = module.normalized_shape if module is not None else argument(node, 1, "normalized_shape")
    n_dims = len(tuple(shape)) if isinstance(shape, (tuple, list)) else 1
    if source.dims == (last,) and n_dims == 1:
        return _shared_norm(t, node, source.ids.reshape(-1), (weight, bias))
    return _mix(t, node, range(-n_dims, 0), zero=bias is None)


def _shared_norm(t: Tracker, node: fx.Node, channels: Tensor, affine: Sequence[Weight | None]) -> Result:
    """A norm over all channels of a sample or token.

    Removed channels count as zeros: `compaction` computes the norm of the remaining ones with the old number of
    channels in the denominators.
    """
    source = t.of(node.args[0])
    if not source.zero:
        return opaque(t, node, f"{describe(node)} would count removed channels that are not 0")
    for tensor in affine:
        t.follow(tensor, 0, channels, zeroed=True)
    return Layout(source.ids, zero=affine[0] is not None)


def _mix(t: Tracker, node: fx.Node, dims: Sequence[int], zero: bool) -> Result:
    """An operation that mixes `dims` and keeps the shape: whole indices of the other dims can be removed."""
    source = t.of(node.args[0])
    mixed = [d % max(source.ids.dim(), 1) for d in dims]
    others = [d for d in source.dims if d not in mixed]
    if not others and source.dims:
        return opaque(t, node, f"{describe(node)} mixes the channels")
    ids = t.atoms.bind_whole(source.ids, others, f"mixed with fixed channels by {describe(node)}")
    return Layout(ids, zero and source.zero)


def softmax(t: Tracker, node: fx.Node) -> Result:
    """Softmax mixes one dim, and turns zeros into uniform weights."""
    dim = getattr(t.modules[str(node.target)], "dim", None) if node.op == "call_module" else argument(node, 1, "dim")
    return opaque(t, node) if dim is None else _mix(t, node, (int(dim),), zero=False)


def normalize(t: Tracker, node: fx.Node) -> Result:
    """Division by the norm along one dim, or by eps if that is larger: zeros stay zero."""
    return _mix(t, node, (int(argument(node, 2, "dim", 1)),), zero=True)


def activation(t: Tracker, node: fx.Node) -> Result:
    """A function of each entry alone; zero stays zero if f(0) = 0, which is tested."""
    source, module = t.of(node.args[0]), t.modules[str(node.target)]
    return Layout(source.ids, source.zero and module_probes.maps_zero_to_zero(module, source.ids.dim()))


def foreign_leaf(t: Tracker, node: fx.Node) -> Result:
    """A module without a rule: elementwise, or channel by channel with parameters, if experiments show it."""
    module, sources = t.modules[str(node.target)], node.all_input_nodes
    reason = f"no rule for {type(module).__name__} ({node.target})"
    if len(sources) != 1 or node.args != (sources[0],) or node.kwargs:
        return opaque(t, node, reason)
    source, rank = t.of(sources[0]), len(shape_of(sources[0]))
    if module_probes.is_elementwise(module, rank):
        return Layout(source.ids, source.zero and module_probes.maps_zero_to_zero(module, rank))
    if len(source.dims) != 1:
        return opaque(t, node, reason)
    found = module_probes.per_channel(module, shape_of(sources[0]), source.dims[0])
    if found is None:
        return opaque(t, node, reason)
    parameters = {name for name, _ in module.named_parameters()}
    for name, dim in found.tensors:
        shape = tuple(module_probes.owned_tensor(module, name).shape)
        weight = t.module_tensor(node, name, shape, name in parameters)
        t.follow(weight, dim, source.ids.reshape(-1), zeroed=weight.is_parameter)
    return Layout(source.ids, found.makes_zero or (source.zero and found.keeps_zero))
