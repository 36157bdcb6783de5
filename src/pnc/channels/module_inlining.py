"""Leaf modules of other libraries, or with hooks, replaced by the operations that they consist of.

A recording keeps modules without children whole. That suffices to run them; to remove channels, the operations inside a
norm over permuted dims, a blur or a weight-standardising convolution must be known. The operations are compared with
the module; one that differs, or cannot be recorded, stays whole.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from pnc.channels import module_probes
from pnc.channels.rule_table import has_hooks, is_understood
from pnc.foundation.errors import RecordingError
from pnc.graph.graph_builder import eval_module, merge
from pnc.graph.nodes import BATCH_SIZES, NodeInfo, info, shape_of
from pnc.graph.recorder import Recorder

_PROBE_SIZE = 5  # a batch size other than the recorded ones


@dataclasses.dataclass(frozen=True)
class _Inside:
    """What a leaf consists of: a graph, and the modules and tensors that its nodes refer to, by name."""

    graph: fx.Graph
    attributes: dict[str, Any]


def opened(segment: fx.GraphModule) -> fx.GraphModule:
    """The segment with foreign leaf modules replaced by their operations; the segment itself if it has none.

    Shares the modules and tensors of the segment. The same segment always gives the same node names.
    """
    inside: dict[fx.Node, _Inside] = {}
    for node in segment.graph.nodes:
        if node.op == "call_module":
            found = _look_inside(node, segment.get_submodule(str(node.target)))
            if found is not None:
                inside[node] = found
    return _replaced(segment, inside) if inside else segment


def opened_but(segment: fx.GraphModule, is_kept: Callable[[nn.Module], bool]) -> fx.GraphModule:
    """The segment with all leaf modules but some replaced by their operations, layer by layer; as `opened`.

    A leaf that reads no tensor is replaced by its value. Leaves that cannot be recorded stay.

    Args:
        segment: The segment.
        is_kept: Whether a leaf module stays whole.
    """
    for _ in range(_MAX_LEVELS):
        inside: dict[fx.Node, _Inside] = {}
        for node in segment.graph.nodes:
            module = segment.get_submodule(str(node.target)) if node.op == "call_module" else None
            if module is not None and not (is_kept(module) and not has_hooks(module)):
                n_read = len(node.all_input_nodes)
                plain = n_read == 1 and node.args == tuple(node.all_input_nodes) and not node.kwargs
                found = _value_of(module, node) if not n_read else _record(module, node) if plain else None
                inside |= {} if found is None else {node: found}
        if not inside:
            break
        segment = _replaced(segment, inside)
    return segment


_MAX_LEVELS = 5


def _value_of(module: nn.Module, node: fx.Node) -> _Inside | None:
    """The result of a leaf that reads no tensor, as a constant."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        value = module(*node.args, **node.kwargs)
    if not isinstance(value, Tensor):
        return None
    graph = fx.Graph()
    result = graph.get_attr("value")
    output = graph.output(result)
    for part in (result, output):
        part.meta["pnc"] = dataclasses.replace(info(node), n_params=0)
    return _Inside(graph, {"value": value.detach().clone()})


def _look_inside(node: fx.Node, module: nn.Module) -> _Inside | None:
    """The operations of a leaf that no rule or experiment covers as a whole."""
    if isinstance(module, nn.MultiheadAttention):
        attends_to_itself = _is_plain_self_attention(node, module)
        return _record(_SelfAttention(module), node, prefix="inner.") if attends_to_itself else None
    sources = node.all_input_nodes
    shape = shape_of(sources[0]) if len(sources) == 1 else ()
    if node.args != tuple(sources) or node.kwargs or len(shape) < 2:
        return None
    if has_hooks(module):  # they may change the output, or compute the weight
        return _record(module, node)
    of_torch = isinstance(module, _NormBase) or type(module).__module__.startswith("torch.nn.")
    return None if of_torch or is_understood(module, shape) else _record(module, node)


def _record(module: nn.Module, node: fx.Node, prefix: str = "") -> _Inside | None:
    """Record a leaf on random input at the recorded batch sizes, then compare at another one.

    Args:
        prefix: Prefix of the names of the leaf's attributes in `module`.
    """
    facts = info(node.all_input_nodes[0])
    assert facts.shape is not None and facts.shape3 is not None
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    larger = tuple(a + (b - a) * (_PROBE_SIZE - BATCH_SIZES[0]) for a, b in zip(facts.shape, facts.shape3, strict=True))

    def given(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, facts.dtype)

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            recorders = [Recorder(module) for _ in BATCH_SIZES]
            for recorder, shape in zip(recorders, (facts.shape, facts.shape3), strict=True):
                recorder.run(given(shape), _single_tensor)
            graph = merge(module, recorders[0].tape, recorders[1].tape)
            _read_batch_size_from(facts, graph)
            constants = recorders[0].tape.constants
            attributes = {
                name: constants[name] if name in constants else operator.attrgetter(name)(module)
                for name in (str(n.target) for n in graph.nodes if n.op in ("get_attr", "call_module"))
            }
            out, expected = eval_module(attributes, graph)(given(larger)), module(given(larger))
        except (RecordingError, *module_probes.FAILURES):
            return None
    if any(recorder.data_reads for recorder in recorders) or not module_probes.close(out, expected, 1e-4):
        return None
    for part in graph.nodes:
        if part.op in ("get_attr", "call_module"):
            part.target = str(part.target).removeprefix(prefix)
    return _Inside(graph, {name.removeprefix(prefix): value for name, value in attributes.items()})


def _read_batch_size_from(facts: NodeInfo, graph: fx.Graph) -> None:
    """Correct the batch dim: the recorder assumes the first; within a network it may be another, or a multiple."""
    assert facts.shape is not None and facts.shape3 is not None
    dim = next((d for d, (a, b) in enumerate(zip(facts.shape, facts.shape3, strict=True)) if a != b), 0)
    factor = facts.shape[dim] // BATCH_SIZES[0]
    for node in list(graph.nodes):
        if node.op == "call_method" and node.target == "size" and not info(node).is_tensor:
            node.args = (node.args[0], dim)
            if factor > 1:
                with graph.inserting_after(node):
                    batch = graph.call_function(operator.floordiv, (node, factor))
                batch.meta["pnc"] = info(node)
                node.replace_all_uses_with(batch, delete_user_cb=lambda user, batch=batch: user is not batch)


def _single_tensor(out: object) -> Tensor:
    if not isinstance(out, Tensor):
        raise RecordingError(f"a leaf module returns {type(out).__name__}, not a tensor")
    return out


# ------------------------------------------------------------------------------------------------------- replacing


def _replaced(segment: fx.GraphModule, inside: dict[fx.Node, _Inside]) -> fx.GraphModule:
    """The segment with the given nodes replaced by the operations inside them."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    root: dict[str, Any] = {}
    for number, node in enumerate(segment.graph.nodes):
        if node in inside:
            root |= {f"{node.target}.{name}": value for name, value in inside[node].attributes.items()}
            given = copies[node.all_input_nodes[0]] if node.all_input_nodes else None
            copies[node] = _inline(graph, node, given, inside[node], number)
        elif node.target is operator.getitem and node.args[0] in inside:
            copies[node] = copies[node.args[0]]  # attention returns (result, None)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op in ("call_module", "get_attr"):
                root[str(node.target)] = operator.attrgetter(str(node.target))(segment)
    graph.lint()
    return eval_module(root, graph)


def _inline(graph: fx.Graph, node: fx.Node, source: fx.Node | None, inside: _Inside, number: int) -> fx.Node:
    """Append the operations of a leaf to a graph; returns the node of its result. One without input is a constant."""
    *parts, output = inside.graph.nodes
    given = None if source is None else parts.pop(0)
    copies = {} if given is None or source is None else {given: source}
    for part in parts:
        own = part.op in ("get_attr", "call_module")
        target = f"{node.target}.{part.target}" if own else part.target
        args, kwargs = map_arg(part.args, copies.__getitem__), map_arg(part.kwargs, copies.__getitem__)
        copies[part] = graph.create_node(part.op, target, args, kwargs, name=f"{node.name}_{part.name}")
        facts = info(part)
        copies[part].meta["pnc"] = facts if given is None else _placed(facts, given, copies[given], node, number)
    result = output.args[0]
    assert isinstance(result, fx.Node)
    return copies[result]


def _placed(facts: NodeInfo, given: fx.Node, source: fx.Node, node: fx.Node, number: int) -> NodeInfo:
    """Facts about a node inside a leaf in the segment's terms: storages renumbered, the input's taken from `source`."""

    def storages(inner: frozenset[int]) -> frozenset[int]:
        own = {-(number * 1_000_000 + s) - 1 for s in inner - info(given).holds}
        return frozenset(own | (info(source).holds if inner & info(given).holds else frozenset()))

    return dataclasses.replace(
        facts,
        scope=info(node).scope,
        n_params=facts.n_params if info(node).n_params else 0,
        from_input=facts.from_input and info(source).from_input,
        after=(),
        holds=storages(facts.holds),
        writes=storages(facts.writes),
    )


# -------------------------------------------------------------------------------------------------- torch's attention


class _SelfAttention(nn.Module):
    """Self-attention as `nn.MultiheadAttention` computes it, in plain operations."""

    def __init__(self, inner: nn.MultiheadAttention) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D), or (N, B, D) likewise."""
        inner = self.inner
        x = x if inner.batch_first else x.transpose(0, 1)
        n_samples, n_tokens, n_channels = x.shape
        qkv = F.linear(x, inner.in_proj_weight, inner.in_proj_bias)
        qkv = qkv.reshape(n_samples, n_tokens, 3, inner.num_heads, n_channels // inner.num_heads)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D / H)
        out = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)
        out = inner.out_proj(out.reshape(n_samples, n_tokens, n_channels))
        result: Tensor = out if inner.batch_first else out.transpose(0, 1)
        return result


def _is_plain_self_attention(node: fx.Node, module: nn.MultiheadAttention) -> bool:
    """Whether a call is self-attention without masks of which only the first result is read."""
    if len(node.all_input_nodes) != 1 or len(shape_of(node.all_input_nodes[0])) != 3 or len(node.args) != 3:
        return False
    plain = all(value is None or isinstance(value, bool) for value in node.kwargs.values())
    plain = plain and not node.kwargs.get("is_causal") and module.in_proj_weight is not None
    plain = plain and module.bias_k is None and not module.add_zero_attn
    return plain and all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)
