"""Graphs that run with less Python overhead, which dominates the time of small networks."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from pnc.channels.rule_table import has_hooks
from pnc.graph.graph_builder import eval_module
from pnc.graph.nodes import info


def flattened(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph on the same modules and tensors, under names without dots, which Python looks up faster.

    The result is in eval mode; the given module does not change.
    """
    graph, root = fx.Graph(), dict[str, Any]()
    names: dict[str, str] = {}
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copies[node] = copied = graph.node_copy(node, copies.__getitem__)
        if node.op in ("call_module", "get_attr"):
            copied.target = names.setdefault(node.target, f"part{len(names)}")
            root[copied.target] = operator.attrgetter(node.target)(module)
    return eval_module(root, graph)


def called_directly(module: fx.GraphModule) -> fx.GraphModule:
    """Call plain layers of a flattened graph as functions: same kernels, same tensors, same bits. Changes the graph.

    Calling a module takes about as long as its kernel on one image. Layers that have hooks, belong to subclasses, or
    have a replaced `forward` are still called as modules.
    """
    graph = module.graph
    for node in list(graph.nodes):
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if layer is None or type(layer) not in (*_CALLS, *_IDENTITIES) or len(node.args) != 1 or node.kwargs:
            continue
        is_plain = getattr(layer, "padding_mode", "zeros") == "zeros" and not layer.training
        if not is_plain or has_hooks(layer) or "forward" in vars(layer):
            continue
        if isinstance(layer, _IDENTITIES):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        function, tensors, settings = _CALLS[type(layer)](layer)
        with graph.inserting_before(node):
            named = {name: _attribute(module, node, name, layer) for name in tensors}
            made = graph.call_function(function, (node.args[0],), {**named, **settings})
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def reusing_memory(module: fx.GraphModule) -> fx.GraphModule:
    """Let additions and ReLUs overwrite inputs that nothing else reads and no gradient needs. Changes the graph.

    Only for graphs whose intermediate tensors are not read from outside, as some are overwritten.
    """
    free = {node for node in module.graph.nodes if node.target in _FRESH or _is_addition(node)}
    for node in module.graph.nodes:
        given = node.args[0] if node.args else None
        if not isinstance(given, fx.Node) or given not in free or len(given.users) > 1:
            continue
        if node.target is torch.relu:
            node.target = torch.relu_
        elif _is_addition(node) and (info(node).shape, info(node).dtype) == (info(given).shape, info(given).dtype):
            node.target = "add_"  # its result, too, is read by nothing else
    module.recompile()
    return module


def _is_addition(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "add"


def _attribute(module: fx.GraphModule, node: fx.Node, name: str, layer: nn.Module) -> fx.Node | None:
    """A node for a tensor of a layer; None if the layer has no such tensor."""
    tensor = getattr(layer, name)
    if tensor is None:
        return None
    own = f"{node.target}_{name}"
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(own, tensor)
    else:
        module.register_buffer(own, tensor)
    return node.graph.get_attr(own)


_Call = tuple[Callable[..., Any], tuple[str, ...], Mapping[str, Any]]
"""A function of one tensor, the names of the layer's tensors that it takes, and its other arguments."""


def _convolution(layer: Any) -> _Call:
    settings = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    return torch.conv2d, ("weight", "bias"), settings


def _batch_norm(layer: Any) -> _Call:
    factor = 0.0 if layer.momentum is None else layer.momentum  # unused in eval mode
    settings = {"training": layer.running_mean is None, "momentum": factor, "eps": layer.eps}
    return F.batch_norm, ("running_mean", "running_var", "weight", "bias"), settings


def _linear(layer: Any) -> _Call:
    return F.linear, ("weight", "bias"), {}


def _relu(layer: Any) -> _Call:
    return torch.relu_ if layer.inplace else torch.relu, (), {}


def _layer_norm(layer: Any) -> _Call:
    return F.layer_norm, ("weight", "bias"), {"normalized_shape": layer.normalized_shape, "eps": layer.eps}


def _gelu(layer: Any) -> _Call:
    return F.gelu, (), {"approximate": layer.approximate}


def _adaptive_pool(layer: Any) -> _Call:
    return F.adaptive_avg_pool2d, (), {"output_size": layer.output_size}


def _flatten(layer: Any) -> _Call:
    return torch.flatten, (), {"start_dim": layer.start_dim, "end_dim": layer.end_dim}


_CALLS: Mapping[Any, Callable[[Any], _Call]] = {
    nn.Conv2d: _convolution,
    nn.BatchNorm2d: _batch_norm,
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.ReLU: _relu,
    nn.GELU: _gelu,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.Flatten: _flatten,
}
_FRESH = torch.conv2d, F.linear, F.batch_norm
"""Functions that return new memory, which their gradients do not read."""
_IDENTITIES = nn.Identity, nn.Dropout
"""Layers that return their input, in eval mode."""
