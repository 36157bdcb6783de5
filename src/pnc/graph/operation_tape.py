"""One run of a network as data: a tape of tensor operations, and the writer that makes it.

Tensors in the arguments of an operation become references to the operations that made them; tensors that no operation
made are the network's own, or constants.
"""

import dataclasses
import enum
import operator
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from pnc.foundation.errors import RecordingError

OperationKind = Literal["placeholder", "get_attr", "call_module", "call_function", "call_method", "output"]

_ATOMS = (int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(...), type(None))


@dataclass(frozen=True)
class Ref:
    """Stands for the result of operation number `index` in an operation's arguments."""

    index: int


@dataclass(slots=True)
class Op:
    """One operation of a run.

    Attributes:
        kind: Kind of its node in the graph.
        target: What it calls or reads, as in `torch.fx`.
        args: Positional arguments, with a `Ref` for each tensor.
        kwargs: Keyword arguments, likewise.
        scope: Qualified name of the module in whose forward it ran.
        reads: Storages of its tensor arguments, numbered per run.
        writes: Storages whose content it changed.
        holds: Storages of its results; a view has the storage of its base.
        shape: Shape of its result, if that is a single tensor.
        dtype: Dtype of that tensor.
        is_tensor: Whether its result contains a tensor.
        flops: Floating-point operations for the whole batch.
        open_dims: Dims of its result whose sizes depend on the images' values.
    """

    kind: OperationKind
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
    open_dims: frozenset[int] = frozenset()


@dataclass
class Tape:
    """The operations of one run, and the tensors it used that are neither results of operations nor the network's."""

    ops: list[Op] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------- arguments


def tensors_in(value: object) -> list[Tensor]:
    """All tensors in nested tuples, lists, mappings, slices and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, _ATOMS):
        return []
    return [tensor for _, part in parts(value) for tensor in tensors_in(part)]


def parts(value: object) -> list[tuple[Any, Any]]:
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


def is_plain(value: object) -> bool:
    """Whether a graph can have the value as an argument."""
    if isinstance(value, (Tensor, np.generic, *_ATOMS)):
        return True
    if isinstance(value, (slice, tuple, list, dict)):
        return all(is_plain(part) for _, part in parts(value))
    return False


def refused_types(value: object) -> str:
    """The types within a value that cannot be arguments in a graph."""
    refused = [part for _, part in parts(value) if not is_plain(part)]
    names = [refused_types(part) if parts(part) else type(part).__name__ for part in refused]
    return ", ".join(names) or type(value).__name__


# ------------------------------------------------------------------------------------------------------------- writer
class _Memory:
    """Numbers the storages of tensors, and finds the operation that made a tensor; keeps neither alive."""

    def __init__(self) -> None:
        # The weak reference keeps the (empty) storage object, so that its address is not reused.
        self._storages: dict[int, tuple[int, StorageWeakRef]] = {}
        self._tensors: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._makers: dict[int, Ref] = {}
        self._aliases: dict[tuple[object, ...], Ref] = {}

    def storage(self, tensor: Tensor, scope: str) -> int:
        """The number of a tensor's storage; `scope` is where it appeared, for messages."""
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
        self._makers.pop(id(tensor), None)  # of an earlier tensor with this id
        return number

    def known(self, tensor: Tensor) -> int | None:
        """The number of a tensor's storage, if it was seen before."""
        known = self._tensors.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        try:
            seen = self._storages.get(StorageWeakRef(tensor.untyped_storage()).cdata)
        except (NotImplementedError, RuntimeError):  # without memory of its own
            return None
        return None if seen is None else seen[0]

    def add(self, tensor: Tensor, storage: int, ref: Ref) -> None:
        """Note that an operation has returned a tensor."""
        self._makers[id(tensor)] = self._aliases[self._alias(tensor, storage)] = ref

    def maker(self, tensor: Tensor, storage: int) -> Ref | None:
        """The operation that made a tensor, or an equal view of its memory (autograd functions return new objects)."""
        return self._makers.get(id(tensor)) or self._aliases.get(self._alias(tensor, storage))

    @staticmethod
    def _alias(tensor: Tensor, storage: int) -> tuple[object, ...]:
        return (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj())


class TapeWriter:
    """Appends operations to a `Tape`, with the facts about their tensors.

    Args:
        network: The network whose parameters and buffers the tape names.
    """

    def __init__(self, network: nn.Module) -> None:
        self.tape = Tape()
        self._owned: dict[int, str] = {}
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            self._owned.setdefault(id(tensor), name)
        self._memory = _Memory()
        self._from_input: set[int] = set()

    def add_input(self, x: Tensor) -> None:
        """Start with the network's input."""
        self.append(Op("placeholder", "x", (), {}, ""), x)
        self._from_input.update(self.tape.ops[0].holds)

    def add_output(self, logits: Tensor) -> None:
        """End with the network's output."""
        self.tape.ops.append(Op("output", "output", (self.ref(logits, ""),), {}, ""))

    def storages(self, tensors: Sequence[Tensor], scope: str) -> frozenset[int]:
        """Numbers of the storages of some tensors that appear in `scope`."""
        return frozenset([self._memory.storage(tensor, scope) for tensor in tensors])

    def depends_on_input(self, storages: frozenset[int]) -> bool:
        """Whether the content of any of these storages depends on the network's input."""
        return not storages.isdisjoint(self._from_input)

    def add_results(self, inputs: Sequence[Tensor], tensors: Sequence[Tensor], scope: str) -> None:
        """Note that the content of some tensors depends on `inputs`, though no operation returned them."""
        if self.depends_on_input(self.storages(inputs, scope)):
            self._from_input.update(self.storages(tensors, scope))

    def is_fixed(self, tensor: Tensor) -> bool:
        """Whether a tensor is known and its content does not depend on the images."""
        if id(tensor) in self._owned:
            return True
        number = self._memory.known(tensor)
        return number is not None and number not in self._from_input

    def open_dims(self, tensor: Tensor) -> frozenset[int]:
        """The dims of a tensor whose sizes depend on the images' values."""
        number = self._memory.known(tensor)
        maker = None if number is None else self._memory.maker(tensor, number)
        return frozenset() if maker is None else self.tape.ops[maker.index].open_dims

    def set_open_dims(self, tensor: Tensor, dims: frozenset[int]) -> None:
        """Set the open dims of a tensor that the last operation made."""
        number = self._memory.known(tensor)
        maker = None if number is None else self._memory.maker(tensor, number)
        if maker is not None:
            self.tape.ops[maker.index].open_dims = dims

    def append(self, op: Op, out: object) -> Ref:
        """Append an operation with the facts about its result, and note which tensors it made."""
        tensors = tensors_in(out)
        op.holds, op.is_tensor = self.storages(tensors, op.scope), bool(tensors)
        self.tape.ops.append(op)
        if self.depends_on_input(op.reads):
            self._from_input.update(op.holds | op.writes)
        ref = Ref(len(self.tape.ops) - 1)
        if isinstance(out, Tensor):
            op.shape, op.dtype = tuple(out.shape), out.dtype
            self._memory.add(out, self._memory.storage(out, op.scope), ref)
        elif tensors:
            self._append_parts(out, ref, op.scope)
        return ref

    def _append_parts(self, out: object, whole: Ref, scope: str) -> None:
        """Append one operation for each part that contains tensors, so that later operations can refer to it."""
        target: Any = operator.getitem if isinstance(out, (tuple, list, Mapping)) else getattr
        reads = self.tape.ops[whole.index].holds
        for key, part in parts(out):
            if tensors_in(part):
                self.append(Op("call_function", target, (whole, key), {}, scope, reads), part)

    def ref(self, value: Any, scope: str) -> Any:
        """An argument with its tensors replaced by `Ref`, and other values by what a graph can have as arguments."""
        if isinstance(value, Tensor):
            return self._tensor_ref(value, scope)
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, enum.Enum):  # one that is also a string or a number
            return value.value
        if isinstance(value, slice):
            return slice(self.ref(value.start, scope), self.ref(value.stop, scope), self.ref(value.step, scope))
        if isinstance(value, dict):
            return {key: self.ref(part, scope) for key, part in value.items()}
        if isinstance(value, list):
            return [self.ref(part, scope) for part in value]
        if isinstance(value, tuple):  # torch.Size and named tuples become plain ones
            return tuple([self.ref(part, scope) for part in value])
        return value

    def _tensor_ref(self, tensor: Tensor, scope: str) -> Ref:
        maker = self._memory.maker(tensor, self._memory.storage(tensor, scope))
        if maker is not None:
            return maker
        name = self._owned.get(id(tensor))
        if name is None:
            name = f"recorded_constant_{len(self.tape.constants)}"
            self.tape.constants[name] = tensor.detach()
        return self.append(Op("get_attr", name, (), {}, scope), tensor)
