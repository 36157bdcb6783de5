"""Compaction: a smaller module without the dropped channels that computes the same function as the masked one.

Both forms are deep copies; the original segment keeps its tensors. They are compared on random input in float64
whenever a segment is compacted, so that a wrong rule cannot give a wrong network.
"""

import copy
import dataclasses
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from pnc.channels.channel_masks import ChannelMasks
from pnc.channels.channel_spaces import Channels, ChannelSpaces, WeightSlice
from pnc.channels.mac_budget import Costs
from pnc.channels.module_inlining import opened
from pnc.channels.module_probes import owned_tensor, replace_tensor, resize_attributes
from pnc.channels.size_arguments import rewrite
from pnc.foundation.errors import MismatchError, PNCError
from pnc.graph.nodes import NodeInfo, constant_sources, info, shape_of

TOLERANCE = 1e-10
"""Largest accepted difference between masked and compacted outputs, relative to the largest output, in float64."""


def mask_segment(segment: fx.GraphModule, spaces: ChannelSpaces, masks: ChannelMasks) -> fx.GraphModule:
    """Copy of a segment with the dropped channels set to zero, including the weights and biases of their norms.

    All shapes stay; it is the reference for `compact`, and a cheap way to try masks.

    Args:
        segment: The one that `spaces` were found in.
    Raises:
        MismatchError: `masks` were made for other spaces.
    """
    return _own(_mask(_structure(opened(segment)), spaces, kept_flags(spaces, masks)))


def compact(segment: fx.GraphModule, spaces: ChannelSpaces, masks: ChannelMasks) -> fx.GraphModule:
    """Copy of a segment without the dropped channels: smaller weights, the same function as `mask_segment`.

    Has its own tensors, in evaluation mode and without gradients. If `spaces` were found with a free output, the output
    has only the channels `output_channels`.

    Args:
        segment: The one that `spaces` were found in.
    Raises:
        MismatchError: `masks` were made for other spaces.
        PNCError: the smaller network differs from the masked one, or cannot run.
    """
    flags = kept_flags(spaces, masks)
    segment = opened(segment)
    smaller = _shrink(_structure(segment), spaces, flags)
    masked = _mask(_structure(segment), spaces, flags)
    _check(masked, smaller, spaces, flags)
    return _own(_fold(smaller))


def output_channels(spaces: ChannelSpaces, masks: ChannelMasks) -> Tensor | None:
    """Indices of the output channels that a compacted segment keeps, int64; None if it keeps all."""
    if spaces.output is None:
        return None
    return kept_flags(spaces, masks)[spaces.output.units].nonzero().reshape(-1)


def _structure(segment: fx.GraphModule) -> fx.GraphModule:
    """Copy of graph and modules that shares the tensors, in evaluation mode, with parametrizations made plain weights.

    Tensors of the copy may be replaced but not written to; `_own` gives it tensors of its own.
    """
    structure = copy.deepcopy(segment, {id(t): t for t in [*segment.parameters(), *segment.buffers()]})
    for name, module in list(structure.named_modules()):
        module.training = False
        if parametrize.is_parametrized(module):
            owner, _, attribute = name.rpartition(".")
            setattr(structure.get_submodule(owner), attribute, _plain(module))
    return structure


def _plain(module: nn.Module) -> nn.Module:
    """A parametrized module as one of its original class, with its current weights as parameters.

    `remove_parametrizations` cannot be used: it changes the class, which the original shares, and writes to tensors.
    """
    plain_class: Any = parametrize.type_before_parametrizations(module)
    plain: nn.Module = plain_class.__new__(plain_class)
    plain.__dict__.update({k: copy.copy(v) if isinstance(v, dict) else v for k, v in module.__dict__.items()})
    parametrizations = plain._modules.pop("parametrizations")
    assert isinstance(parametrizations, nn.ModuleDict)
    for name in parametrizations:
        plain._parameters[name] = nn.Parameter(getattr(module, name).detach(), requires_grad=False)
    return plain


def _own(segment: fx.GraphModule, dtype: torch.dtype | None = None) -> fx.GraphModule:
    """Give a structure its own tensors, without gradients; floating-point ones converted to `dtype` if given."""
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
    """Kept flag of every unit, and True at the end, which `KEPT` (-1) selects; (n_units + 1,)."""
    if {s.name: s.size for s in spaces.spaces} != {name: len(mask) for name, mask in masks.kept.items()}:
        raise MismatchError(
            "masks: made for other channel spaces than the given ones; make them from these spaces, with channel_masks "
            "or masks_within"
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
    _correct_info(segment, spaces, flags)
    kept = [(s, flags[s.units].nonzero().reshape(-1)) for s in spaces.slices]
    kept = [(s, keep) for s, keep in kept if len(keep) < len(s.units)]
    for s, keep in kept:
        if s.user:
            _insert(segment, nodes, s, torch.index_select, keep)
    for reader, source in spaces.refills:
        _refill(segment, nodes[reader], nodes[source], spaces.nodes[source], flags)
    for node in nodes.values():  # with the layers still as they were, but the operands as they are now
        rewrite(node, spaces.nodes, flags)
        if node.op == "call_module":
            _resize_bare_norm(segment.get_submodule(str(node.target)), spaces.nodes.get(node.name), flags)
    for s, keep in kept:
        if not s.user:
            tensor = owned_tensor(segment, s.tensor)
            replace_tensor(segment, s.tensor, tensor.index_select(s.dim, keep.to(tensor.device)))
            _resize_module(segment.get_submodule(s.tensor.rpartition(".")[0]), len(s.units), len(keep))
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
    """Insert `function(operand, dim, index, ...)` between an operand inside the graph and the node that reads it."""
    operand, user = nodes[s.tensor], nodes[s.user]
    # An operand that follows several sets of channels shrinks once for each: the user reads the last result.
    while operand not in user.all_input_nodes:
        operand = next(n for n in operand.users if n.meta.get("cut_for") == s.user)
    with segment.graph.inserting_before(user):
        held = _hold(segment, index)
        result = segment.graph.call_function(function, (operand, s.dim, held, *arguments))
    result.meta.update(pnc=info(operand), cut_for=s.user)
    if function is torch.index_select:
        _resize_info(result, s.dim, len(index))
    user.replace_input_with(operand, result)


def _refill(segment: fx.GraphModule, reader: fx.Node, source: fx.Node, channels: Channels, flags: Tensor) -> None:
    """Insert zeros for removed channels before a node that needs its input in full size."""
    keep = flags[channels.units].nonzero().reshape(-1)
    if len(keep) == len(channels.units):
        return
    with segment.graph.inserting_before(reader):
        held = _hold(segment, keep)
        full = segment.graph.call_function(filled, (source, channels.dim, held, len(channels.units)))
    full.meta["pnc"] = info(source)
    _resize_info(full, channels.dim, len(channels.units))
    reader.replace_input_with(source, full)


def filled(x: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    """A tensor of `size` along `dim`, with the entries of `x` at `index` and zeros elsewhere."""
    if isinstance(x, fx.Proxy):  # the graph is traced again when it is unpickled
        return cast(Tensor, x.tracer.create_proxy("call_function", filled, (x, dim, index, size), {}))
    shape = [size if d == dim else n for d, n in enumerate(x.shape)]
    return x.new_zeros(shape).index_copy(dim, index, x)


def _hold(segment: fx.GraphModule, index: Tensor) -> fx.Node:
    """A node that holds indices, at the graph's insertion point."""
    name = f"_index{sum(key.startswith('_index') for key in segment._buffers)}"
    segment.register_buffer(name, index.to(_device(segment)), persistent=False)
    held = segment.graph.get_attr(name)
    shape = tuple(index.shape)
    held.meta["pnc"] = NodeInfo(shape, shape, index.dtype, is_tensor=True, from_input=False, scope="")
    return held


def _fold(segment: fx.GraphModule) -> fx.GraphModule:
    """Replace constants that shrank by parameters of their new size, and drop what they were computed from."""
    for node in list(segment.graph.nodes):
        last = "cut_for" in node.meta and not any(user.target is torch.index_select for user in node.users)
        sources = constant_sources(node) if last else None
        if sources is None:
            continue
        with torch.no_grad():
            value = _value(segment, node, {})
        is_parameter = any(isinstance(_attribute(segment, str(s.target)), nn.Parameter) for s in sources)
        name = f"_cut_{node.name}"
        if is_parameter:
            segment.register_parameter(name, nn.Parameter(value, requires_grad=False))
        else:
            segment.register_buffer(name, value)
        with segment.graph.inserting_before(node):
            held = segment.graph.get_attr(name)
        held.meta["pnc"] = dataclasses.replace(info(node), n_params=value.numel() if is_parameter else 0)
        node.replace_all_uses_with(held)
        _erase(segment, node)
    segment.graph.lint()
    segment.recompile()
    return segment


def _value(segment: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The value of a constant node."""
    if node.op == "get_attr":
        return _attribute(segment, str(node.target))
    if node not in known:
        for source in node.all_input_nodes:
            known[source] = _value(segment, source, known)
        args, kwargs = map_arg(node.args, known.__getitem__), map_arg(node.kwargs, known.__getitem__)
        call: Any = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
        known[node] = call(*args, **kwargs)
    return known[node]


def _attribute(segment: fx.GraphModule, name: str) -> Tensor:
    tensor = operator.attrgetter(name)(segment)
    assert isinstance(tensor, Tensor)
    return tensor


def _erase(segment: fx.GraphModule, node: fx.Node) -> None:
    """Erase a node and everything that only it used, including attributes of the segment."""
    sources = node.all_input_nodes
    target = str(node.target)
    was_attribute = node.op == "get_attr"
    segment.graph.erase_node(node)
    owner, _, name = target.rpartition(".")
    still_used = {("get_attr", target), ("call_module", owner)}
    if was_attribute and not any((n.op, n.target) in still_used for n in segment.graph.nodes):
        delattr(segment.get_submodule(owner), name)
    for source in sources:
        if not source.users and source in segment.graph.nodes:
            _erase(segment, source)


def _resize_module(module: nn.Module, old: int, new: int) -> None:
    """Correct the sizes that a layer stores as attributes, after one dim of a tensor shrank from `old` to `new`."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        before, module.out_channels = module.out_channels, module.weight.shape[0]
        if module.groups > 1:  # only whole groups are removed
            module.groups = module.groups * module.out_channels // before
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    else:
        if isinstance(module, nn.GroupNorm) and module.num_channels == old:
            module.num_groups = module.num_groups * new // old
        resize_attributes(module, old, new)


def _resize_bare_norm(module: nn.Module, channels: Channels | None, flags: Tensor) -> None:
    """Do the same for a norm without weights, which has no slices."""
    if channels is not None and isinstance(module, (_NormBase, nn.GroupNorm)) and module.weight is None:
        _resize_module(module, len(channels.units), int(flags[channels.units].sum()))


def _correct_info(segment: fx.GraphModule, spaces: ChannelSpaces, flags: Tensor) -> None:
    """Set shapes and costs of all nodes to those that a recording of the smaller segment would have."""
    nodes = {node.name: node for node in segment.graph.nodes}
    n_macs = Costs(segment, spaces).by_node(flags[:-1])
    left: dict[str, float] = {}  # of each weight, as a share
    for s in spaces.slices:
        if s.is_parameter and not s.user:
            left[s.tensor] = left.get(s.tensor, 1.0) * float(flags[s.units].double().mean())
    gone: dict[str, int] = {}
    for tensor, share in left.items():
        module = tensor.rpartition(".")[0]
        gone[module] = gone.get(module, 0) + round(owned_tensor(segment, tensor).numel() * (1 - share))
    for node in nodes.values():
        facts = info(node)
        n_gone = gone.get(str(node.target), 0) if node.op == "call_module" else 0
        node.meta["pnc"] = dataclasses.replace(
            facts,
            n_macs=n_macs.get(node.name, facts.n_macs),
            n_params=facts.n_params - n_gone if facts.n_params else 0,
        )
    for name, channels in spaces.nodes.items():
        _resize_info(nodes[name], channels.dim, int(flags[channels.units].sum()))


def _resize_info(node: fx.Node, dim: int, size: int) -> None:
    facts = info(node)
    assert facts.shape is not None and facts.shape3 is not None
    resized = [(*shape[:dim], size, *shape[dim + 1 :]) for shape in (facts.shape, facts.shape3)]
    node.meta["pnc"] = dataclasses.replace(facts, shape=resized[0], shape3=resized[1])


# ----------------------------------------------------------------------------------------------------------- check

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _as_double(segment: fx.GraphModule) -> fx.GraphModule:
    """Give a structure tensors of float64, and let the casts inside its graph give float64 too."""

    def double(value: Any) -> Any:
        return torch.float64 if value in _FLOATS else value

    for node in segment.graph.nodes:
        if node.op == "call_method" and node.target in ("float", "half", "bfloat16"):
            node.target = "double"
        node.args, node.kwargs = map_aggregate(node.args, double), map_aggregate(node.kwargs, double)
    segment.recompile()
    return _own(segment, torch.float64)


def _check(masked: fx.GraphModule, smaller: fx.GraphModule, spaces: ChannelSpaces, flags: Tensor) -> None:
    """Compare both on random input of the recorded shape, in float64 if the network supports it.

    Raises:
        PNCError: the outputs differ by more than `TOLERANCE` (by more than rounding if float64 is not supported).
    """
    given = next(node for node in masked.graph.nodes if node.op == "placeholder")
    x = torch.randn(shape_of(given), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, tolerance = x.to(_device(masked)), TOLERANCE
    with torch.no_grad():
        try:
            expected, smaller = _as_double(_structure(masked))(x.clone()), _as_double(_structure(smaller))
        except RuntimeError:  # layers fixed to one type, such as quantized ones
            dtype = info(given).dtype
            assert dtype is not None
            x, tolerance = x.to(dtype), torch.finfo(dtype).eps ** 0.5
            expected = masked(x.clone())
        try:
            found = smaller(x)
        except (RuntimeError, ValueError) as error:
            raise PNCError(f"the compacted segment cannot run ({str(error).splitlines()[0]}); {_WAY_OUT}") from error
    if spaces.output is not None:
        kept = flags[spaces.output.units].nonzero().reshape(-1)
        expected = expected.index_select(spaces.output.dim, kept.to(x.device))
    if found.shape != expected.shape:
        raise PNCError(f"the compacted segment gives {tuple(found.shape)}, not {tuple(expected.shape)}; {_WAY_OUT}")
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= tolerance * scale:
        raise PNCError(
            f"the compacted segment differs from the masked one by {difference:.2g} (largest output {scale:.2g}); "
            f"{_WAY_OUT}"
        )


_WAY_OUT = "please report the network, and clone it with density=1 meanwhile"


def _device(segment: fx.GraphModule) -> torch.device:
    tensors = [*segment.parameters(), *segment.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
