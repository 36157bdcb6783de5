"""Read any classifier: `record` turns a network into a graph over its own weights, verified bit for bit.

A recording runs the network's real forward at two batch sizes (`tracing.py`), merges the two tapes into one
`torch.fx` graph, and compares graph and network on fresh input at further batch sizes. What cannot be reproduced
exactly is refused with the reason.
"""

import collections
import contextlib
import copy
import dataclasses
import operator
import random
import re
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pnc.errors import InputError, RecordingError
from pnc.tracing import BATCH_SIZES, NodeInfo, Op, Recorder, Ref, Tape, info, operation_name, tensors_in

__all__ = ["BATCH_SIZES", "NodeInfo", "Recording", "dominators", "info", "needed_for", "record", "subgraph"]

_VERIFIED_CUTS = 3
_PROBE_SIZE = 4
_LOCK = threading.RLock()  # recording patches `nn.Module.__call__`: one at a time


@dataclass(frozen=True, eq=False)
class Recording:
    """A network written as a graph.

    Attributes:
        module: The network's eval-mode forward, from one image batch to logits (B, K). It has its own module objects,
            in eval mode, and its own parameter objects over the network's own memory: it costs no memory and follows
            changes of the network's weights, while flags, gradients, hooks and moves to another device stay apart.
            (Only operations that write in place reach the network, such as BatchNorm's in train mode; an optimizer
            must work on a deep copy.) Each node carries a `NodeInfo`.
        input_shape: Shape of one image, without batch.
        n_classes: K.
        probe: Fresh input (4 images) on which graph and network were compared.
        probe_logits: The network's own answer to it, (4, K).
    """

    module: fx.GraphModule
    input_shape: tuple[int, ...]
    n_classes: int
    probe: Tensor
    probe_logits: Tensor

    @property
    def output(self) -> fx.Node:
        """The node that makes the logits."""
        return self.module.graph.output_node().all_input_nodes[0]


def record(model: nn.Module, example: Tensor) -> Recording:
    """Record a classifier as a graph that gives the same bits.

    The network runs several times in eval mode, without gradients. Afterwards it is as it was: weights, buffers,
    flags, hooks, cached values, and the global random state. `DataParallel` and `torch.compile` wrappers are taken
    off; what is recorded of compiled code is its eager definition.

    Args:
        model: A network that maps images to logits (B, K), or to an object, mapping or tuple with them.
        example: Images as the network takes them, (B, C, H, W), floating point, any B >= 1; shape, type, device and
            memory format count, as do mean and spread.
    Raises:
        InputError: `example` is no batch of images.
        RecordingError: the network fails on the example, or cannot be reproduced exactly; the message says why.
    """
    network = _unwrap(model)
    _check(network, example)
    probe = _fresh_images(example)
    with _LOCK, torch.inference_mode(False), torch.no_grad(), _random_state(example.device), _eager():
        with _preserved(network) as state:
            _run(network, _rows(example, BATCH_SIZES[0]))  # fills lazy caches, so that both tapes see the same state
            tapes = [_tape(network, _rows(example, size)) for size in BATCH_SIZES]
            module = _bind(network, merge(network, *tapes), tapes[0].constants)
            logits = _run(network, probe)
            if not _same(_run(network, probe), logits):
                raise RecordingError(
                    "the network gives two answers to the same images, in eval mode and without dropout"
                )
            try:
                single = _run(network, probe[:1])
            except RecordingError:  # some networks squeeze the batch away
                single = None
        recording = Recording(module, tuple(example.shape[1:]), logits.shape[1], probe, logits)
        _verify(recording, single)
        changed = state.restore()
        if changed:
            raise RecordingError(f"the network's forward writes to its own weights or buffers: {', '.join(changed)}")
    return recording


# --------------------------------------------------------------------------------------- the given network, untouched


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(model._modules.get("_orig_mod"), nn.Module):  # what torch.compile returns
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _check(network: nn.Module, example: Tensor) -> None:
    if not isinstance(example, Tensor) or example.dim() != 4 or not example.is_floating_point() or not len(example):
        what = f"{tuple(example.shape)} {example.dtype}" if isinstance(example, Tensor) else type(example).__name__
        raise InputError(f"example: expected a floating-point batch of images (B, C, H, W) with B >= 1, got {what}")
    scripted = [name or "the network" for name, m in network.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise RecordingError(
            f"TorchScript modules cannot be recorded ({scripted[0]}); give the network before torch.jit.script or trace"
        )


class _State:
    """Everything of a network that a forward run could change, with the values, to be put back."""

    def __init__(self, network: nn.Module) -> None:
        self._attributes = {module: dict(module.__dict__) for module in network.modules()}
        self._containers = [
            (value, copy.copy(value))
            for attributes in self._attributes.values()
            for value in attributes.values()
            if isinstance(value, (dict, list, set))
        ]
        tensors = [*network.named_parameters(), *network.named_buffers()]
        self._tensors = [(name, tensor, tensor.detach().clone()) for name, tensor in tensors]

    def restore(self) -> list[str]:
        """Put everything back; return the names of the tensors whose values had changed."""
        for module, attributes in self._attributes.items():
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for container, content in self._containers:
            container.clear()
            if isinstance(container, list):
                container.extend(content)
            else:
                container.update(content)
        changed = [(name, tensor, saved) for name, tensor, saved in self._tensors if not _same(tensor, saved)]
        with torch.no_grad():
            for _, tensor, saved in changed:
                tensor.copy_(saved)
        return [name for name, _, _ in changed]


@contextlib.contextmanager
def _preserved(network: nn.Module) -> Iterator[_State]:
    """Eval mode for every submodule, by its flag alone: a network's own `train` may do more than that."""
    state = _State(network)
    try:
        for module in network.modules():
            module.training = False
        yield state
    finally:
        state.restore()


@contextlib.contextmanager
def _random_state(device: torch.device) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Run compiled functions as plain Python; without the compiler loaded there are none, and loading takes seconds."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


# ------------------------------------------------------------------------------------------------- runs and their tapes


def _rows(example: Tensor, size: int) -> Tensor:
    """A fresh batch of the wanted size out of the example's images, repeated where they are too few."""
    return example.detach()[torch.arange(size, device=example.device) % len(example)].clone()


def _fresh_images(example: Tensor) -> Tensor:
    """Noise with the example's mean and spread per channel, in its type and memory format."""
    images = example.detach().double()
    mean = images.mean((0, 2, 3), keepdim=True)
    spread = images.std((0, 2, 3), keepdim=True, correction=0).clamp_min(1e-3)
    shape = (_PROBE_SIZE, *example.shape[1:])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(example.device)
    channels_last = example.is_contiguous(memory_format=torch.channels_last) and not example.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return (noise * spread + mean).to(example.dtype).contiguous(memory_format=layout)


def _run(forward: Callable[[Tensor], object], x: Tensor) -> Tensor:
    """The logits of a forward on a copy of `x`; any error of the user's code becomes a RecordingError."""
    try:
        return _pick_logits(forward(x.clone()))
    except RecordingError:
        raise
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything
        raise RecordingError(
            f"the network cannot process images of shape {tuple(x.shape)}, {x.dtype}: {_one_line(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def _pick_logits(out: object) -> Tensor:
    """The logits in what a forward returned: a tensor, `.logits`, ["logits"], or the first tensor."""
    logits = getattr(out, "logits", None)
    if logits is None and isinstance(out, Mapping):
        logits = out.get("logits")
    if logits is None:
        logits = next(tensors_in(out), None)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.is_floating_point():
        what = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(out).__name__
        raise RecordingError(f"the network must give logits (B, K), but gives {what}")
    return logits


def _tape(network: nn.Module, x: Tensor) -> Tape:
    recorder = Recorder(network)
    logits = _run(lambda images: recorder.run(images, _pick_logits), x)
    if recorder.data_reads:
        raise RecordingError(
            f"the network's Python code reads values that depend on the images ({recorder.data_reads[0]}), "
            "so its path may differ from image to image"
        )
    if logits.shape[0] != x.shape[0]:
        raise RecordingError(f"the network gives {logits.shape[0]} rows of logits for {x.shape[0]} images")
    return recorder.tape


# ------------------------------------------------------------------------------------------------ two tapes -> a graph


def merge(network: nn.Module, first: Tape, second: Tape) -> fx.Graph:
    """Make one graph of two tapes of a network, taken at `BATCH_SIZES`; operations that no logit needs are left out.

    Raises:
        RecordingError: the tapes differ in more than integers that are a multiple of the batch size, or the network
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
                f"what the network computes depends on the batch size: {operation_name(op.target)} in {op.scope!r} at "
                f"batch size {BATCH_SIZES[0]}, {operation_name(other.target)} in {other.scope!r} at {BATCH_SIZES[1]}"
            )
    if len(first.ops) != len(second.ops):
        raise RecordingError("the number of the network's operations depends on the batch size")
    for name, constant in first.constants.items():
        if not _same(constant, second.constants[name]):
            raise RecordingError(
                "the network uses a tensor that PyTorch did not see being made and that changes between runs "
                f"(numpy, a C++ extension or TorchScript?), of shape {tuple(constant.shape)}"
            )


def _dependencies(ops: Sequence[Op]) -> list[list[int]]:
    """For each operation those whose data it needs: its arguments, and what wrote to their memory since they were made."""
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
    """Everything that the last operation needs, the input and itself included."""
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
    """Turns pairs of operations into nodes; an integer that follows the batch becomes a multiple of `x.size(0)`."""

    def __init__(self, network: nn.Module, written: frozenset[int]) -> None:
        self.graph = fx.Graph()
        self._network = network
        self._parameters = dict(network.named_parameters())
        self._written = written
        self._nodes: dict[int, fx.Node] = {}
        self._multiples: dict[int, fx.Node] = {}
        self._counted: set[int] = set()

    def add(self, index: int, op: Op, other: Op, dependencies: Sequence[int]) -> None:
        """Append the node of operation `index`, seen as `op` and `other` in the two runs."""
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
        # `view` needs its input laid out as it was in the recorded run, but a suffix may be fed by something else.
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
            f"{operation_name(op.target)} in {op.scope or 'the network'} depends on the batch size in a way that is no "
            f"multiple of it: {a!r} at {BATCH_SIZES[0]}, {b!r} at {BATCH_SIZES[1]}"
        )

    def _multiple(self, factor: int) -> fx.Node:
        """The node of `factor` times the batch size."""
        if not self._multiples:
            self._multiples[1] = self.graph.call_method("size", (self._nodes[0], 0))
        if factor not in self._multiples:
            self._multiples[factor] = self.graph.call_function(operator.mul, (self._multiples[1], factor))
        for node in self._multiples.values():
            node.meta.setdefault("pnc", NodeInfo(None, None, None, is_tensor=False, from_input=False, scope=""))
        return self._multiples[factor]


def _node_name(op: Op) -> str:
    """A stable name for people; `input` and `logits` are reserved for the network's ends."""
    name = operation_name(op.target).strip("_")
    if op.kind in ("call_function", "call_method") and op.scope:
        name = f"{op.scope}_{name}"
    name = re.sub(r"\W", "_", name)
    return f"{name}_0" if name in ("input", "logits") else name


# ------------------------------------------------------------------------------------ a graph over the network's memory


def _bind(network: nn.Module, graph: fx.Graph, constants: Mapping[str, Tensor]) -> fx.GraphModule:
    """A module of the graph with twins of the network's leaves and aliases of its tensors (see `Recording.module`)."""
    twins = _Twins()
    root: dict[str, Any] = {}
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "call_module":
            root[name] = twins.module(network.get_submodule(name))
        elif node.op == "get_attr":
            root[name] = twins.tensor(constants[name] if name in constants else _find(network, name))
    return eval_module(root, graph)


class _Twins:
    """Shallow copies: module objects of their own with aliases of the same tensors, each original copied once."""

    def __init__(self) -> None:
        self._modules: dict[int, nn.Module] = {}
        self._tensors: dict[int, Tensor] = {}

    def tensor(self, tensor: Tensor) -> Tensor:
        """The same memory as another object, with a gradient of its own."""
        if id(tensor) not in self._tensors:
            alias = tensor.detach()
            if isinstance(tensor, nn.Parameter):
                # Not simply False: `matmul` picks its kernel by this flag, even without gradients, and so the bits.
                alias = nn.Parameter(alias, requires_grad=tensor.requires_grad)
            self._tensors[id(tensor)] = alias
        return self._tensors[id(tensor)]

    def module(self, module: nn.Module) -> nn.Module:
        """An eval-mode module of the same class, hooks included."""
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


# ------------------------------------------------------------------------------------------------- working with a graph


def _needs(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node those whose data it needs: its arguments, and the last writers of what it reads."""
    names = {node.name: node for node in graph.nodes}
    return {n: [*n.all_input_nodes, *(names[name] for name in info(n).after)] for n in graph.nodes}


def needed_for(outputs: Sequence[fx.Node], start: fx.Node | None = None) -> set[fx.Node]:
    """Every node that the outputs need, themselves included, as far as `start` (excluded) does not stand for it."""
    needs = _needs(outputs[0].graph)
    found: set[fx.Node] = set()
    todo = list(outputs)
    while todo:
        node = todo.pop()
        if node not in found and node is not start:
            found.add(node)
            todo.extend([] if _is_batch_size(node) else needs[node])
    return found


def dominators(graph: fx.Graph) -> list[fx.Node]:
    """Nodes through which everything that the output takes from the input has to pass, the input first.

    Each holds one floating-point tensor with the batch in front. The output's own tensor is not among them.
    """
    needs = {n: [d for d in before if info(d).from_input] for n, before in _needs(graph).items() if info(n).from_input}
    order = list(needs)
    position = {node: i for i, node in enumerate(order)}
    last_use = list(range(len(order)))
    for node, before in needs.items():
        for other in before:
            last_use[position[other]] = max(last_use[position[other]], position[node])
    found, reach = [], 0
    for i, node in enumerate(order[:-2]):  # the last two: the logits and the output
        if reach <= i and _is_batch(info(node)):
            found.append(node)
        reach = max(reach, last_use[i])
    return found


def _is_batch(facts: NodeInfo) -> bool:
    if facts.shape is None or facts.shape3 is None or facts.dtype is None or not facts.dtype.is_floating_point:
        return False
    return (facts.shape[:1], facts.shape3[:1]) == (BATCH_SIZES[:1], BATCH_SIZES[1:]) and facts.shape[
        1:
    ] == facts.shape3[1:]


def subgraph(module: fx.GraphModule, start: fx.Node, outputs: Sequence[fx.Node]) -> fx.GraphModule:
    """The part of a recorded graph that computes `outputs` from `start`, over the same modules and tensors.

    One output comes as a tensor, several as a tuple. The tensor given for `start` is never written to, and an output
    that a later operation writes to is copied first. Integers that follow the batch come from the given tensor.

    Raises:
        InputError: an output needs more of the network's input than `start` carries.
    """
    wanted = needed_for(outputs, start)
    if any(node.op == "placeholder" for node in wanted):
        raise InputError(f"start: {outputs[-1].name} cannot be computed from {start.name} alone")
    new = fx.Graph()
    given = new.placeholder("x")
    given.meta["pnc"] = dataclasses.replace(info(start), n_macs=0, n_params=0, after=(), writes=frozenset())
    nodes = [node for node in module.graph.nodes if node in wanted]
    overwritten = any(info(start).holds & info(node).writes for node in nodes)
    copies = {start: _clone(new, given) if overwritten else given}
    taps = {start: given}
    for i, node in enumerate(nodes):
        if _is_batch_size(node):
            copies[node] = new.call_method("size", (given, 0))
            copies[node].meta["pnc"] = info(node)
            continue
        copies[node] = taps[node] = new.node_copy(node, copies.__getitem__)
        if node in outputs and any(info(node).holds & info(later).writes for later in nodes[i + 1 :]):
            taps[node] = _clone(new, copies[node])
    result = new.output(taps[outputs[0]] if len(outputs) == 1 else tuple(taps[node] for node in outputs))
    result.meta["pnc"] = dataclasses.replace(info(outputs[-1]), n_macs=0, n_params=0, after=(), writes=frozenset())
    new.lint()
    return eval_module(module, new)


def eval_module(root: nn.Module | dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """A module of the graph over the attributes of `root`, in eval mode."""
    module = fx.GraphModule(root, graph)
    for part in module.modules():
        part.training = False
    return module


def _is_batch_size(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "size" and not info(node).is_tensor


def _clone(graph: fx.Graph, node: fx.Node) -> fx.Node:
    clone = graph.call_method("clone", (node,))
    kept = dataclasses.replace(info(node), n_macs=0, n_params=0, after=(), holds=frozenset(), writes=frozenset())
    clone.meta["pnc"] = kept
    return clone


# -------------------------------------------------------------------------------------------------------- verification


def _verify(recording: Recording, single: Tensor | None) -> None:
    """Compare graph and network on fresh images at two further batch sizes, and prefix then suffix at sampled cuts."""
    module, probe, logits = recording.module, recording.probe, recording.probe_logits
    _compare(_run(module, probe), logits, "the whole graph")
    if single is not None:
        _compare(_run(module, probe[:1]), single, "the whole graph at batch size 1")
    cuts = dominators(module.graph)[1:]
    for cut in {cuts[len(cuts) * i // _VERIFIED_CUTS]: None for i in range(_VERIFIED_CUTS) if cuts}:
        features = subgraph(module, next(iter(module.graph.nodes)), [cut])(probe.clone())
        kept = features.clone()
        _compare(subgraph(module, cut, [recording.output])(features), logits, f"the graph cut at {cut.name}")
        assert _same(features, kept), f"the suffix from {cut.name} wrote to its input"


def _compare(found: Tensor, expected: Tensor, what: str) -> None:
    if found.shape == expected.shape and _same(found, expected):
        return
    difference = "another shape"
    if found.shape == expected.shape:
        difference = f"largest difference {(found - expected).abs().max().item():.3g}"
    raise RecordingError(
        f"{what} does not reproduce the network on fresh images ({difference}): its output depends on something that "
        "a recording does not see, such as the size of the batch, the values of the images or a state that it keeps"
    )


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal in every element, where NaN equals NaN."""
    if torch.equal(a, b):
        return True
    if a.shape != b.shape or a.dtype != b.dtype or not (a.is_floating_point() or a.is_complex()):
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
