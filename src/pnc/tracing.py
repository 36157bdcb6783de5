"""What a network does, written down while it runs: a tape of operations, and two tapes merged into one graph.

The network's own Python code runs, so whatever it does on its way (keyword arguments, dataclasses, loops over blocks,
shape arithmetic) cannot confuse the recorder; only tensor operations and calls of leaf modules reach the tape. Shape
reads do not: they are plain integers by then, and the ones that follow the batch are found by comparing two runs.
"""

import dataclasses
import enum
import operator
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pnc.errors import RecordingError

BATCH_SIZES = (2, 3)
"""The two batch sizes at which a network is recorded; an integer that follows the batch is a multiple of both."""

Kind = Literal["placeholder", "get_attr", "call_module", "call_function", "call_method", "output"]

_ATOMS = (int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(...), type(None))
_CONTAINERS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.DataParallel,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
)
_DATA_READS = frozenset(
    {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__bool__", "__int__", "__float__", "__complex__"}
    | {"__index__", "__contains__", "__array__", "__dlpack__", "_local_scalar_dense"}
)
_METHODS: dict[Any, str] = {
    getattr(Tensor, name): name
    for name in dir(Tensor)
    if callable(getattr(Tensor, name)) and not name.startswith(("__class", "__init", "__sub"))
}


@dataclass(frozen=True)
class Ref:
    """Stands for the result of operation number `index` in an operation's arguments."""

    index: int


@dataclass(slots=True)
class Op:
    """One operation of a run.

    `reads`, `writes` and `holds` are the storages (numbered per run) of its tensor arguments, of those whose content
    it changed, and of its results; a view holds the storage of its base. `flops` counts the whole batch.
    """

    kind: Kind
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    scope: str
    reads: frozenset[int] = frozenset()
    writes: frozenset[int] = frozenset()
    holds: frozenset[int] = frozenset()
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    is_tensor: bool = False
    flops: int = 0


@dataclass
class Tape:
    """The operations of one run, and the tensors that it used but neither made nor found among its parameters."""

    ops: list[Op] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeInfo:
    """What is known about a node of a recorded graph; kept as `node.meta["pnc"]`, also in extracted graphs.

    Attributes:
        shape: Shape of its result at batch size 2, batch included; None unless the result is a single tensor.
        shape3: The same at batch size 3.
        dtype: Type of that tensor.
        is_tensor: Its result holds at least one tensor. The others are integers that follow the batch size.
        from_input: Its content depends on the network's input (not only on the batch size).
        scope: Qualified name of the module in whose forward it ran ("" for the network itself).
        n_macs: Multiply-accumulate operations per sample.
        n_params: Parameters that it is the first to use.
        after: Names of nodes that must have run before, beyond its arguments: the last writers of what it reads.
        holds: Storages of its result, as numbers that mean the same within one recording.
        writes: Storages whose content it changes.
    """

    shape: tuple[int, ...] | None
    shape3: tuple[int, ...] | None
    dtype: torch.dtype | None
    is_tensor: bool
    from_input: bool
    scope: str
    n_macs: int = 0
    n_params: int = 0
    after: tuple[str, ...] = ()
    holds: frozenset[int] = frozenset()
    writes: frozenset[int] = frozenset()


def info(node: fx.Node) -> NodeInfo:
    """The facts about a node of a recorded or extracted graph."""
    return cast(NodeInfo, node.meta["pnc"])


# ------------------------------------------------------------------------------------------------ one run -> a tape


def tensors_in(value: object) -> list[Tensor]:
    """All tensors in nested tuples, lists, mappings, slices and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, _ATOMS):
        return []
    return [tensor for _, part in _parts(value) for tensor in tensors_in(part)]


def _parts(value: object) -> list[tuple[Any, Any]]:
    """The (key, part) pairs of a container, [] for anything else."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if isinstance(value, slice):
        return [("start", value.start), ("stop", value.stop), ("step", value.step)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    return []


def _is_plain(value: object) -> bool:
    """Whether a graph can hold the value as an argument."""
    if isinstance(value, (Tensor, np.generic, *_ATOMS)):
        return True
    if isinstance(value, (slice, tuple, list, dict)):
        return all(_is_plain(part) for _, part in _parts(value))
    return False


def _strange_types(value: object) -> str:
    parts = [part for _, part in _parts(value)]
    names = [_strange_types(p) if _parts(p) else type(p).__name__ for p in parts if not _is_plain(p)]
    return ", ".join(names) or type(value).__name__


def is_leaf(module: nn.Module) -> bool:
    """Whether calls of a module are recorded as one operation.

    True for the layers of `torch.nn`, for BatchNorm-like layers of any library (so that their switch between batch
    and running statistics stays alive) and for modules without children. Containers are opened, as are
    `nn.TransformerEncoder` and its like; `nn.TransformerEncoderLayer` is not, because its fused kernel gives other
    bits than its parts.
    """
    if isinstance(module, _CONTAINERS):
        return False
    layer_type = parametrize.type_before_parametrizations(module)
    if layer_type.__module__.startswith(("torch.nn.", "torch.ao.nn.")) or isinstance(module, _NormBase):
        return True
    return all(name == "parametrizations" for name, _ in module.named_children())


class _Kernels(TorchDispatchMode):
    """Sees every kernel that runs inside: adds up floating point operations, and reports scalars that are read.

    Not `torch.utils.flop_counter.FlopCounterMode`: that one hooks every module call of the process, also in other
    threads, and does not know the CPU's fused attention.
    """

    def __init__(self, on_read: Callable[[Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self._on_read = on_read

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or else PyTorch imports its compiler for our sake, which takes seconds

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        kernel = func._overloadpacket
        formula = flop_registry.get(kernel)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        elif kernel is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            queries, keys, values = args[:3]
            n_scores = queries.numel() // queries.shape[-1] * keys.shape[-2]
            self.flops += 2 * n_scores * (queries.shape[-1] + values.shape[-1])
        elif kernel is torch.ops.aten._local_scalar_dense:
            self._on_read(args[0])
        return out


class _Memory:
    """Numbers the storages of tensors, and knows which operation made a tensor; keeps neither alive."""

    def __init__(self) -> None:
        # A weak reference keeps the (empty) storage object and so its address, which is never used for another one.
        self._storages: dict[int, tuple[int, StorageWeakRef]] = {}
        self._tensors: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._makers: dict[int, Ref] = {}
        self._aliases: dict[tuple[object, ...], Ref] = {}

    def storage(self, tensor: Tensor, scope: str) -> int:
        """The number of a tensor's storage; `scope` says in errors where it appeared."""
        known = self._tensors.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        try:
            reference = StorageWeakRef(tensor.untyped_storage())
        except (NotImplementedError, RuntimeError) as error:
            raise RecordingError(
                f"{scope or 'the network'} works on a {type(tensor).__name__} without memory of its own (vmap, a "
                f"sparse or an mkldnn layout); such networks cannot be recorded: {str(error).splitlines()[0]}"
            ) from error
        number = self._storages.setdefault(reference.cdata, (len(self._storages), reference))[0]
        self._tensors[id(tensor)] = (weakref.ref(tensor), number)
        self._makers.pop(id(tensor), None)  # of a tensor that is gone
        return number

    def add(self, tensor: Tensor, storage: int, ref: Ref) -> None:
        """An operation has made a tensor, or handed it out again."""
        self._makers[id(tensor)] = self._aliases[self._alias(tensor, storage)] = ref

    def maker(self, tensor: Tensor, storage: int) -> Ref | None:
        """The operation that made a tensor, or, as autograd functions do, another object for the same memory."""
        return self._makers.get(id(tensor)) or self._aliases.get(self._alias(tensor, storage))

    @staticmethod
    def _alias(tensor: Tensor, storage: int) -> tuple[object, ...]:
        return (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj())


class Recorder(TorchFunctionMode):
    """Writes the `Tape` of one forward run of a network; each instance records one run."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.tape = Tape()
        self.data_reads: list[str] = []
        self._network = network
        self._modules = {id(module): name for name, module in network.named_modules()}
        self._owned: dict[int, str] = {}
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            self._owned.setdefault(id(tensor), name)
        self._memory = _Memory()
        self._from_input: set[int] = set()
        self._scopes = [""]
        self._paused = False
        self._kernels = _Kernels(self._note_read)
        self._autocast = False

    def run(self, x: Tensor, pick_logits: Callable[[object], Tensor]) -> Tensor:
        """Run the network on `x`, note what it does, and return its logits.

        `nn.Module.__call__` is replaced meanwhile, for the whole process, but acts in this thread only.
        """
        self._autocast = torch.is_autocast_enabled(x.device.type)
        self._append(Op("placeholder", "x", (), {}, ""), x)
        self._from_input.update(self.tape.ops[0].holds)
        thread, original = threading.get_ident(), nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._paused or threading.get_ident() != thread:
                return original(module, *args, **kwargs)
            return self._call(module, args, kwargs)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            with self._kernels, self:
                out = self._network(x)
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]
        logits = pick_logits(out)
        self.tape.ops.append(Op("output", "output", (self._ref(logits),), {}, ""))
        return logits

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self._modules.get(id(module))
        # Not through __call__: that would run the code that `module.compile()` put there, out of our sight.
        forward: Callable[..., Any] = module._call_impl
        if name is None:  # made on the fly: its operations count as its caller's
            return forward(*args, **kwargs)
        self._scopes.append(name)
        try:
            if module is self._network or not is_leaf(module) or not _is_plain((args, kwargs)):
                return forward(*args, **kwargs)
            return self._execute("call_module", name, forward, args, kwargs)
        finally:
            self._scopes.pop()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":  # x.T
            return self._execute("call_function", getattr, func, args, kwargs, (args[0], func.__self__.__name__))
        if name == "set_" or (name == "__set__" and func.__self__.__name__ == "data"):
            raise RecordingError(
                f"{self._scopes[-1] or 'the network'} gives a tensor another memory (x.data = y, x.set_(y)), which a "
                "graph cannot hold; compute a new tensor instead"
            )
        if func in _METHODS:
            return self._execute("call_method", _METHODS[func], func, args, kwargs)
        return self._execute("call_function", func, func, args, kwargs)

    def _execute(
        self,
        kind: Kind,
        target: Any,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        noted_args: tuple[Any, ...] | None = None,
    ) -> Any:
        """Run an operation, and append it to the tape unless all it did was to look at a tensor.

        `noted_args` are the positional arguments for the tape, where they differ from those of the call.
        """
        self._paused = True  # neither what runs inside nor what is asked about its tensors are the network's operations
        try:
            inputs = tensors_in((args, kwargs))
            versions = [_version(tensor) for tensor in inputs]
            flops = self._kernels.flops
            out = run(*args, **kwargs)
            written = [t for t, version in zip(inputs, versions, strict=True) if _version(t) != version]
            reads = self._storages(inputs)
            if not written and not tensors_in(out):
                if operation_name(target) in _DATA_READS and reads & self._from_input:
                    self.data_reads.append(self._where(target))
                return out
            noted = (args if noted_args is None else noted_args, kwargs)
            if not _is_plain(noted):
                if written or reads & self._from_input:
                    raise RecordingError(
                        f"{self._where(target)} takes an argument that a graph cannot hold: {_strange_types(noted)}"
                    )
                return out  # such as torch.tensor(numpy array): a constant, if anything uses it
            self._check_context(inputs, target)
            if kind == "call_module" and isinstance(out, Tensor) and not written and any(out is t for t in inputs):
                out = out.view_as(out)  # dropout hands its argument on: another object tells before from after
            refs: tuple[Any, Any] = self._ref(noted)
            op = Op(kind, target, refs[0], refs[1], self._scopes[-1], reads, self._storages(written))
            op.flops = self._kernels.flops - flops
            self._append(op, out)
            return out
        finally:
            self._paused = False

    def _where(self, target: Any) -> str:
        return f"{operation_name(target)} in {self._scopes[-1] or 'the network'}"

    def _check_context(self, inputs: Sequence[Tensor], target: Any) -> None:
        if not self._autocast and any(torch.is_autocast_enabled(tensor.device.type) for tensor in inputs):
            raise RecordingError(
                f"{self._where(target)} runs under autocast that the network's forward turned on; cast the network and "
                "its input to the wanted type instead, and leave autocast to the caller"
            )
        if torch.is_inference_mode_enabled():
            raise RecordingError(
                f"{self._where(target)} runs under inference_mode that the network's forward turned on, where writes "
                "to memory cannot be followed; use torch.no_grad there"
            )

    def _note_read(self, tensor: Tensor) -> None:
        """Compiled code between the operations, such as a TorchScript function, looks at a value."""
        if not self._paused and self._storages([tensor]) & self._from_input:
            self.data_reads.append(f"compiled code in {self._scopes[-1] or 'the network'}")

    def _storages(self, tensors: Sequence[Tensor]) -> frozenset[int]:
        return frozenset([self._memory.storage(tensor, self._scopes[-1]) for tensor in tensors])

    def _append(self, op: Op, out: object) -> Ref:
        """Append an operation with the facts about its result, and remember which tensors it made."""
        tensors = tensors_in(out)
        op.holds, op.is_tensor = self._storages(tensors), bool(tensors)
        self.tape.ops.append(op)
        if op.reads & self._from_input:
            self._from_input.update(op.holds | op.writes)
        ref = Ref(len(self.tape.ops) - 1)
        if isinstance(out, Tensor):
            op.shape, op.dtype = tuple(out.shape), out.dtype
            self._memory.add(out, self._memory.storage(out, op.scope), ref)
        elif tensors:
            self._append_parts(out, ref, op.scope)
        return ref

    def _append_parts(self, out: object, whole: Ref, scope: str) -> None:
        """One further operation for each part that holds tensors, so that later operations can refer to it."""
        target: Any = operator.getitem if isinstance(out, (tuple, list, Mapping)) else getattr
        reads = self.tape.ops[whole.index].holds
        for key, part in _parts(out):
            if tensors_in(part):
                self._append(Op("call_function", target, (whole, key), {}, scope, reads), part)

    def _ref(self, value: Any) -> Any:
        """An argument with its tensors replaced by `Ref`, and with nothing in it but what a graph can hold."""
        if isinstance(value, Tensor):
            return self._tensor_ref(value)
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, enum.Enum):  # one that is a string or a number as well
            return value.value
        if isinstance(value, slice):
            return slice(self._ref(value.start), self._ref(value.stop), self._ref(value.step))
        if isinstance(value, dict):
            return {key: self._ref(part) for key, part in value.items()}
        if isinstance(value, list):
            return [self._ref(part) for part in value]
        if isinstance(value, tuple):  # torch.Size and named tuples become plain ones
            return tuple([self._ref(part) for part in value])
        return value

    def _tensor_ref(self, tensor: Tensor) -> Ref:
        maker = self._memory.maker(tensor, self._memory.storage(tensor, self._scopes[-1]))
        if maker is not None:
            return maker
        name = self._owned.get(id(tensor))
        if name is None:
            name = f"recorded_constant_{len(self.tape.constants)}"
            self.tape.constants[name] = tensor.detach()
        return self._append(Op("get_attr", name, (), {}, self._scopes[-1]), tensor)


def _version(tensor: Tensor) -> int:
    """How often a tensor's memory was written to (parameters made under `inference_mode` do not count it)."""
    return 0 if tensor.is_inference() else tensor._version


def operation_name(target: Any) -> str:
    """What people call an operation: a function's or method's name, or the qualified name of a module or tensor."""
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))
