"""Builds one `torch.fx` graph over a network's own memory from two tapes of the network."""

import collections
import operator
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from pnc.foundation.errors import RecordingError
from pnc.foundation.tensor_bits import same_bits
from pnc.graph.graph_modules import RecordedModule
from pnc.graph.nodes import BATCH_SIZES, NodeInfo, info, operation_name
from pnc.graph.operation_tape import Op, Ref, Tape


def merge(network: nn.Module, first: Tape, second: Tape) -> fx.Graph:
    """Merge two tapes of a network, recorded at `BATCH_SIZES`, into one graph of the operations that the logits need.

    Raises:
        RecordingError: the tapes differ in more than integers that are multiples of the batch size, or the network
            writes to memory that outlives the run.
    """
    _check_alike(first, second)
    dependencies = _dependencies(first.ops)
    needed = _closure(dependencies)
    written = frozenset().union(*(first.ops[i].writes for i in needed))
    for i in sorted(needed):
        op = first.ops[i]
        if op.kind == "get_attr" and op.holds & written:
            raise RecordingError(f"the network's forward writes to {op.target} in {op.scope or 'the network'}")
    builder = _GraphBuilder(network, written)
    for i, (op, other) in enumerate(zip(first.ops, second.ops, strict=True)):
        if i in needed:
            builder.add(i, op, other, dependencies[i])
    builder.graph.lint()
    return builder.graph


def _check_alike(first: Tape, second: Tape) -> None:
    for op, other in zip(first.ops, second.ops, strict=False):
        if (op.kind, op.target, op.scope) != (other.kind, other.target, other.scope):
            raise RecordingError(
                f"the network's computation depends on the batch size: {operation_name(op.target)} in {op.scope!r} at "
                f"batch size {BATCH_SIZES[0]}, {operation_name(other.target)} in {other.scope!r} at {BATCH_SIZES[1]}"
            )
    if len(first.ops) != len(second.ops):
        raise RecordingError("the number of the network's operations depends on the batch size")
    for name, constant in first.constants.items():
        if not same_bits(constant, second.constants[name]):
            raise RecordingError(
                "the network uses a tensor that was created outside of PyTorch and changes between runs "
                f"(numpy, a C++ extension, TorchScript or another thread?), of shape {tuple(constant.shape)}"
            )


def _dependencies(ops: Sequence[Op]) -> list[list[int]]:
    """For each operation, the ones whose data it needs: its arguments, and later writes to their memory."""
    writers: dict[int, int] = {}
    dependencies = []
    for i, op in enumerate(ops):
        args = set(_refs((op.args, op.kwargs)))
        last = {
            writers.get(storage, -1) for arg in args for storage in ops[arg].holds if writers.get(storage, -1) > arg
        }
        dependencies.append(sorted(args | last))
        writers.update(dict.fromkeys(op.writes, i))
    return dependencies


def _closure(dependencies: Sequence[Sequence[int]]) -> set[int]:
    """Everything that the last operation needs, including the input and itself."""
    needed, todo = {0}, [len(dependencies) - 1]
    while todo:
        i = todo.pop()
        if i not in needed:
            needed.add(i)
            todo.extend(dependencies[i])
    return needed


def _refs(value: Any) -> Iterator[int]:
    if isinstance(value, Ref):
        yield value.index
    elif isinstance(value, slice):
        yield from _refs((value.start, value.stop, value.step))
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _refs(part)


class _GraphBuilder:
    """Turns pairs of operations into nodes; integers that scale with the batch become multiples of `x.size(0)`."""

    def __init__(self, network: nn.Module, written: frozenset[int]) -> None:
        self.graph = fx.Graph()
        self._network = network
        self._parameters = dict(network.named_parameters())
        self._written = written
        self._nodes: dict[int, fx.Node] = {}
        self._multiples: dict[int, fx.Node] = {}
        self._counted: set[int] = set()

    def add(self, index: int, op: Op, other: Op, dependencies: Sequence[int]) -> None:
        """Append the node of operation `index`, which is `op` in the first run and `other` in the second."""
        args = self._argument(op.args, other.args, op)
        kwargs = self._argument(op.kwargs, other.kwargs, op)
        before = [self._nodes[i] for i in dependencies]
        node = self.graph.create_node(op.kind, self._target(op), args, kwargs, name=_node_name(op))
        first, second = BATCH_SIZES
        node.meta["pnc"] = NodeInfo(
            shape=op.shape,
            shape3=other.shape,
            dtype=op.dtype,
            is_tensor=op.is_tensor,
            from_input=op.kind == "placeholder" or any(info(n).from_input for n in before),
            scope=op.scope,
            n_macs=max(0, other.flops - op.flops) // (2 * (second - first)),
            n_params=sum(self._first_used(op)),
            after=tuple(n.name for n in before if n not in node.all_input_nodes),
            holds=op.holds,
            writes=op.writes,
        )
        self._nodes[index] = node

    def _target(self, op: Op) -> Any:
        # `view` needs the memory layout of the recorded run, but a part of the network may get an input of another one.
        if op.target == "view" and op.kind == "call_method" and not op.kwargs and not op.holds & self._written:
            return "view" if isinstance(op.args[1], torch.dtype) else "reshape"
        return op.target

    def _first_used(self, op: Op) -> Iterator[int]:
        parameters: Iterable[Tensor] = ()
        if op.kind == "call_module":
            parameters = self._network.get_submodule(op.target).parameters()
        elif op.target in self._parameters:
            parameters = (self._parameters[op.target],)
        for parameter in parameters:
            if id(parameter) not in self._counted:
                self._counted.add(id(parameter))
                yield parameter.numel()

    def _argument(self, a: Any, b: Any, op: Op) -> Any:
        if type(a) is type(b):
            if isinstance(a, Ref) and a == b:
                return self._nodes[a.index]
            if isinstance(a, (tuple, list)) and len(a) == len(b):
                return type(a)(self._argument(p, q, op) for p, q in zip(a, b, strict=True))
            if isinstance(a, dict) and a.keys() == b.keys():
                return {key: self._argument(a[key], b[key], op) for key in a}
            if isinstance(a, slice):
                return slice(*(self._argument(getattr(a, k), getattr(b, k), op) for k in ("start", "stop", "step")))
            if type(a) is int and a != b and a * BATCH_SIZES[1] == b * BATCH_SIZES[0]:
                return self._multiple(a // BATCH_SIZES[0])
            if not isinstance(a, Ref) and (a == b or repr(a) == repr(b)):  # repr: nan
                return a
        raise RecordingError(
            f"{operation_name(op.target)} in {op.scope or 'the network'} depends on the batch size, but not as a "
            f"multiple of it: {_shown(a)} at batch size {BATCH_SIZES[0]}, {_shown(b)} at {BATCH_SIZES[1]}"
        )

    def _multiple(self, factor: int) -> fx.Node:
        """A node with `factor` times the batch size."""
        if not self._multiples:
            self._multiples[1] = self.graph.call_method("size", (self._nodes[0], 0))
        if factor not in self._multiples:
            self._multiples[factor] = self.graph.call_function(operator.mul, (self._multiples[1], factor))
        for node in self._multiples.values():
            node.meta.setdefault("pnc", NodeInfo(None, None, None, is_tensor=False, from_input=False, scope=""))
        return self._multiples[factor]


def _shown(value: Any) -> str:
    if isinstance(value, Ref):
        return f"the result of operation {value.index}"
    return f"{len(value)} values" if isinstance(value, (tuple, list, dict)) else repr(value)


def _node_name(op: Op) -> str:
    """A stable, readable name; `input` and `logits` are reserved for the network's input and output."""
    name = operation_name(op.target).strip("_")
    if op.kind in ("call_function", "call_method") and op.scope:
        name = f"{op.scope}_{name}"
    name = re.sub(r"\W", "_", name)
    return f"{name}_0" if name in ("input", "logits") else name


# ------------------------------------------------------------------------------------ a graph over the network's memory


def bind(network: nn.Module, graph: fx.Graph, constants: Mapping[str, Tensor]) -> fx.GraphModule:
    """The graph as a module with shallow copies of the network's leaf modules and aliases of its tensors.

    See `Recording.module`.
    """
    twins = _Twins()
    root: dict[str, Any] = {}
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "call_module":
            root[name] = twins.module(network.get_submodule(name))
        elif node.op == "get_attr":
            root[name] = twins.tensor(constants[name] if name in constants else _find(network, name))
    return eval_module(root, graph)


def eval_module(root: nn.Module | dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """The graph as a module over the attributes of `root`, in eval mode."""
    module = RecordedModule(root, graph)
    for part in module.modules():
        part.training = False
    return module


class _Twins:
    """Shallow copies: new module objects with aliases of the same tensors; each original is copied once."""

    def __init__(self) -> None:
        self._modules: dict[int, nn.Module] = {}
        self._tensors: dict[int, Tensor] = {}

    def tensor(self, tensor: Tensor) -> Tensor:
        """Another tensor object over the same memory, with its own gradient."""
        if id(tensor) not in self._tensors:
            alias = tensor.detach()
            if isinstance(tensor, nn.Parameter):
                # Not always False: even without gradients, `matmul` chooses its kernel, and so the bits, by this flag.
                alias = nn.Parameter(alias, requires_grad=tensor.requires_grad and not tensor.is_inference())
            self._tensors[id(tensor)] = alias
        return self._tensors[id(tensor)]

    def module(self, module: nn.Module) -> nn.Module:
        """An eval-mode module of the same class, including hooks."""
        if id(module) in self._modules:
            return self._modules[id(module)]
        twin = type(module).__new__(type(module))
        self._modules[id(module)] = twin
        twin.__dict__.update({name: self._part(value) for name, value in module.__dict__.items()})
        twin.__dict__.update(training=False, _compiled_call_impl=None)
        return twin

    def _part(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, types.MethodType) and id(value.__self__) in self._modules:
            return types.MethodType(value.__func__, self._modules[id(value.__self__)])
        if type(value) in (dict, collections.OrderedDict):
            return type(value)((key, self._part(part)) for key, part in value.items())
        return [self._part(part) for part in value] if type(value) is list else value


def _find(network: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of a qualified name."""
    owner, _, attribute = name.rpartition(".")
    tensor = getattr(network.get_submodule(owner), attribute)
    assert isinstance(tensor, Tensor)
    return tensor
