"""Folding of layers that only scale, shift or mix channels into their neighbours: the same function up to rounding."""

import copy
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

from pnc.channels.compaction import filled, own_copy
from pnc.channels.rule_table import has_hooks
from pnc.clones.adapter import Adapter, Stitched
from pnc.clones.position_grids import grid_size
from pnc.composite.direct_calls import called_directly, flattened, reusing_memory
from pnc.graph.nodes import info

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONV2D = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_LANES = 16
"""Channels that a processor computes at once."""


@dataclass
class FoldedPart:
    """The folded adapter and body of one clone.

    Attributes:
        tap: Index of the trunk's tensor that it reads.
        adapter: A copy; later layers may be folded into its `weight` and `bias`.
        stride: Stride of the adapter's convolution.
        body: The source's part.
        channels_last: Whether it accepts channels-last maps.
    """

    tap: int
    adapter: Adapter
    stride: tuple[int, ...]
    body: fx.GraphModule
    channels_last: bool = False


def folded(module: fx.GraphModule) -> fx.GraphModule:
    """A recorded network, or a part of one, with BatchNorm folded into the layer before it, where possible.

    The result is in eval mode and shares unchanged layers with `module`.
    """
    given = next(node for node in module.graph.nodes if node.op == "placeholder")
    facts = info(given)
    assert facts.shape is not None
    tensor = next(iter(module.parameters()), torch.empty(0))
    body = flattened(module)
    _fold(body, torch.zeros(facts.shape, dtype=facts.dtype, device=tensor.device))
    return body


def _fold(body: fx.GraphModule, given: Tensor) -> "_Layers":
    """Fold norms in place. Returns the remaining layers; `given` is an example of the input."""
    with torch.no_grad():
        ShapeProp(body).propagate(given)
    _make_layers(body)
    layers = _Layers(body)
    _fold_norms(body)
    _fold_fills(body, layers)
    body.delete_all_unused_submodules()
    body.recompile()
    return layers


def folded_part(tap: int, stitched: Stitched) -> FoldedPart:
    """Fold everything possible in a copy of a clone's adapter and body."""
    adapter = copy.deepcopy(stitched.adapter)
    body = flattened(own_copy(cast(fx.GraphModule, stitched.body)))
    cut = adapter.source_cut
    layers = _fold(body, torch.zeros(2, *cut.shape, dtype=adapter.weight.dtype, device=adapter.weight.device))
    part = FoldedPart(tap, adapter, (1, 1), body)
    while _fold_into_adapter(part, layers):
        pass
    body.delete_all_unused_submodules()
    body.recompile()
    part.channels_last = _takes_channels_last(part)
    reusing_memory(called_directly(body))
    return part


def _takes_channels_last(part: FoldedPart) -> bool:
    """Whether the part has convolutions and runs on channels-last input."""
    given = next(node for node in part.body.graph.nodes if node.op == "placeholder")
    shape = given.meta["tensor_meta"].shape
    if len(shape) != 4 or not any(isinstance(layer, nn.Conv2d) for layer in part.body.modules()):
        return False
    tensor = torch.zeros(shape, dtype=part.adapter.weight.dtype, device=part.adapter.weight.device)
    try:
        with torch.no_grad():
            part.body(tensor.contiguous(memory_format=torch.channels_last))
    except RuntimeError:  # a view that needs the usual layout
        return False
    return True


class _Layers:
    """The layers of a graph that may be changed: called by one node, without hooks or a replaced `forward`."""

    def __init__(self, body: fx.GraphModule) -> None:
        self._body = body
        self._calls = Counter(node.target for node in body.graph.nodes if node.op == "call_module")

    def of(self, node: fx.Node) -> nn.Module | None:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs or self._calls[node.target] > 1:
            return None
        layer = self._body.get_submodule(str(node.target))
        return None if has_hooks(layer) or "forward" in vars(layer) else layer


def _is_norm(layer: nn.Module | None) -> bool:
    return type(layer) in _NORMS and cast(nn.BatchNorm2d, layer).running_mean is not None


def norms_after_layers(body: fx.GraphModule) -> Iterator[tuple[fx.Node, nn.Module, fx.Node, nn.Module]]:
    """Yield each BatchNorm and the layer before it, if nothing else reads that layer's result.

    A layer's node and the layer come first, then the norm's node and the norm.
    Layers that are called more than once, have hooks or a replaced `forward` are left out.
    """
    layers = _Layers(body)
    for node in list(body.graph.nodes):
        norm = layers.of(node)
        if norm is None or not _is_norm(norm):
            continue
        source = node.all_input_nodes[0]
        layer = layers.of(source)
        if layer is not None and len(source.users) == 1:
            yield source, layer, node, norm


def _make_layers(body: fx.GraphModule) -> None:
    """Make convolutions that are called as functions into layers of the same weights, so that norms can be folded."""
    for node in list(body.graph.nodes):
        if node.op != "call_function" or node.target is not torch.conv2d:
            continue
        given = {**dict(zip(_CONV2D, node.args, strict=False)), **node.kwargs}
        image, own_weight, own_bias = (given.pop(name, None) for name in _CONV2D[:3])
        weight, bias = (_constant(body, given_as) for given_as in (own_weight, own_bias))
        if weight is None or (bias is None) != (own_bias is None):
            continue
        settings = {name: value for name, value in given.items() if value is not None}
        n_in = weight.shape[1] * settings.get("groups", 1)
        layer = nn.Conv2d(
            n_in, len(weight), (weight.shape[2], weight.shape[3]), **settings, bias=bias is not None, device="meta"
        )
        layer.weight, layer.bias = weight, bias
        name = f"{node.name}_layer"
        body.add_submodule(name, layer.eval())
        with body.graph.inserting_before(node):
            made = body.graph.call_module(name, (image,))
        made.meta = dict(node.meta)
        constants = [used for used in node.all_input_nodes if used.op == "get_attr"]
        bypass(node, made)
        for unused in (used for used in constants if not used.users):
            body.graph.erase_node(unused)
            if all(other.target != unused.target for other in body.graph.nodes):
                delattr(body, str(unused.target))


def _constant(body: fx.GraphModule, given: object) -> nn.Parameter | None:
    """The parameter that a node of a flattened graph stands for, if it does."""
    found = getattr(body, str(given.target)) if isinstance(given, fx.Node) and given.op == "get_attr" else None
    return found if isinstance(found, nn.Parameter) else None


def _fold_norms(body: fx.GraphModule) -> None:
    """Fold each BatchNorm into the convolution or linear layer before it."""
    for source, layer, node, norm in norms_after_layers(body):
        if type(layer) in CONVOLUTIONS:
            fused: nn.Module = fuse_conv_bn_eval(_double(layer), _double(norm))
        elif type(layer) is nn.Linear and len(source.meta["tensor_meta"].shape) == 2:
            fused = fuse_linear_bn_eval(_double(layer), _double(norm))
        else:
            continue
        weight = cast(nn.Conv2d, layer).weight
        body.set_submodule(str(source.target), fused.to(weight.device, weight.dtype))
        bypass(node, source)


def _fold_fills(body: fx.GraphModule, layers: _Layers) -> None:
    """Let convolutions compute the zeros that would be filled in after them for removed channels.

    If the processor computes these channels anyway, `_LANES` at once, that saves two passes over the map.
    """
    for node in list(body.graph.nodes):
        if node.target is not filled:
            continue
        source, dim, index, size = node.args
        layer = layers.of(source)
        if type(layer) is not nn.Conv2d or layer.groups > 1 or dim != 1 or len(source.users) > 1:
            continue
        if math.ceil(size / _LANES) > math.ceil(layer.out_channels / _LANES):
            continue
        wide, kept = copy.deepcopy(layer), getattr(body, index.target)
        wide.out_channels = size
        for name, tensor in layer.named_parameters():
            full = tensor.new_zeros(size, *tensor.shape[1:]).index_copy(0, kept, tensor)
            setattr(wide, name, nn.Parameter(full, requires_grad=False))
        body.set_submodule(str(source.target), wide)
        source.meta.update(node.meta)
        bypass(node, source)


def _double(layer: Any) -> Any:
    """A copy in float64, so that folding rounds once."""
    return copy.deepcopy(layer).double()


def bypass(node: fx.Node, source: fx.Node) -> None:
    """Let what reads a node read `source` in its place."""
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def _fold_into_adapter(part: FoldedPart, layers: _Layers) -> bool:
    """Fold the layer after the adapter into it if it is linear, its only reader and that saves work; whether it did."""
    given = next(iter(part.body.graph.nodes))
    adapter, cut = part.adapter, part.adapter.source_cut
    is_plain = (cut.kind == "map" and cut.channel_dim == 1) or cut.kind == "vector"
    if adapter.is_identity or adapter.rectify or not is_plain or grows(adapter) or len(given.users) != 1:
        return False
    node = next(iter(given.users))
    layer = layers.of(node)
    weight, bias = adapter.weight.double(), adapter.bias.double()
    if _is_norm(layer):
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
        conv.weight, conv.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))
        fused = fuse_conv_bn_eval(conv.eval(), _double(layer))
        weight, bias = fused.weight.detach(), cast(Tensor, fused.bias).detach()
    elif (type(layer) is nn.Linear and cut.kind == "vector") or _is_pointwise(layer):
        linear = cast(nn.Conv2d, layer)
        stride = linear.stride if isinstance(layer, nn.Conv2d) else (1, 1)
        own = linear.weight.double().flatten(1)
        n_inside = weight[0].numel()
        # Multiplications per output position: the product against both layers.
        if len(own) * n_inside > len(weight) * (n_inside * math.prod(stride) + len(own)):
            return False
        bias = own @ bias + (0 if linear.bias is None else linear.bias.double())
        weight = torch.einsum("oc,cikl->oikl", own, weight)
        part.stride = part.stride[0] * stride[0], part.stride[1] * stride[1]
    else:
        return False
    adapter.weight, adapter.bias = weight.to(adapter.weight.dtype), bias.to(adapter.bias.dtype)
    given.meta["tensor_meta"] = node.meta["tensor_meta"]
    bypass(node, given)
    return True


def _is_pointwise(layer: nn.Module | None) -> bool:
    if type(layer) is not nn.Conv2d:
        return False
    return layer.kernel_size == (1, 1) and layer.padding in ((0, 0), "valid") and layer.groups == 1


def grows(adapter: Adapter) -> bool:
    """Whether the adapter convolves before it resizes, as the source's grid is larger than the target's."""
    return math.prod(grid_size(adapter.source_cut)) > math.prod(grid_size(adapter.target_cut))
