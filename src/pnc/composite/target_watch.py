"""Check before every call that nothing in the target was replaced since it was recorded."""

from itertools import chain, repeat
from operator import is_
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor, fx, nn

from pnc.foundation.errors import MismatchError

_TABLES = {"_modules": "layers", "_forward_hooks": "hooks", "_forward_pre_hooks": "hooks"}
_UNUSED = frozenset(
    {"training", "inplace", "momentum", "p", "groups", "output_padding", "in_channels", "out_channels", "in_features"}
    | {"out_features", "kernel_size", "num_features", "affine", "track_running_stats", "transposed"}
)
"""Attributes of layers that have no effect in eval mode, or none without a weight of another shape."""


class TargetWatch:
    """The identities of a target's modules and hooks and of the tensors that its recording uses, and its settings.

    Detects replaced layers, parameters, parameter memory (`x.data = y`, a cast), hooks, `forward`, and plain settings
    of the layers that the graph calls (`norm.eps = 1`). Writes in place need no detection, as a recording works on the
    target's own memory.

    Args:
        target: The network, without wrappers.
        graph: The graph of its recording.
    """

    def __init__(self, target: nn.Module, graph: fx.Graph) -> None:
        named = dict(target.named_modules())
        self._dicts = [module.__dict__ for module in named.values()]
        self._modules = list(named.values())
        self._types = list(map(type, self._modules))
        self._own_forward = [values.get("forward") for values in self._dicts]
        tables = [(name, kind, part.__dict__[kind]) for name, part in named.items() for kind in _TABLES]
        self._full_tables = [one for one in tables if one[2]]
        self._full = [table for *_, table in self._full_tables]
        self._empty = [table for *_, table in tables if not table]
        self._sizes = list(map(len, self._full))
        self._inside = list(chain.from_iterable(map(dict.values, self._full)))
        called = _called(target, graph)
        self._places = _tensor_places(target, called, graph)
        self._owners, self._keys = [owner for _, owner, _ in self._places], [key for *_, key in self._places]
        self._tensors = list(map(dict.get, self._owners, self._keys))  # keeping them alive keeps their ids unique
        self._with_memory = [tensor for tensor in self._tensors if _has_memory(tensor)]
        self._memory = list(map(Tensor.data_ptr, self._with_memory))
        self._strides = list(map(Tensor.stride, self._with_memory))
        self._settings = _settings(called)
        self._set, self._set_keys = [values for _, values, _ in self._settings], [key for *_, key in self._settings]
        self._values = list(map(dict.get, self._set, self._set_keys))

    def check(self) -> None:
        """Refuse a target that has changed since it was recorded.

        Raises:
            MismatchError: something was replaced; the message says what.
        """
        if not torch.compiler.is_compiling() and self.is_changed():
            raise MismatchError(
                f"the target has changed since its forward pass was recorded: {self.difference()}; "
                "call net.refresh() to record it again, or attach the clones again"
            )

    def is_changed(self) -> bool:
        """Whether something was replaced; takes 1-2% of the time that a small network needs for one image."""
        return (
            not all(map(is_, map(dict.get, self._owners, self._keys), self._tensors))
            or list(map(Tensor.data_ptr, self._with_memory)) != self._memory
            or list(map(Tensor.stride, self._with_memory)) != self._strides
            or not all(map(is_, map(type, self._modules), self._types))
            or any(self._empty)
            or list(map(len, self._full)) != self._sizes
            or not all(map(is_, chain.from_iterable(map(dict.values, self._full)), self._inside))
            or list(map(dict.get, self._set, self._set_keys)) != self._values
            or not all(map(is_, map(dict.get, self._dicts, repeat("forward")), self._own_forward))
        )

    def difference(self) -> str | None:
        """Description of what was replaced; None if nothing was."""
        if not self.is_changed():
            return None
        for (name, owner, key), before in zip(self._places, self._tensors, strict=True):
            if owner.get(key) is not before:
                return f"{name}.{key} was replaced".lstrip(".")
        memory, strides = iter(self._memory), iter(self._strides)
        for (name, _, key), tensor in zip(self._places, self._tensors, strict=True):
            if _has_memory(tensor) and (tensor.data_ptr(), tensor.stride()) != (next(memory), next(strides)):
                return f"{name}.{key} has new memory (x.data = y, a cast or a move)".lstrip(".")
        for module, before_type in zip(self._modules, self._types, strict=True):
            if type(module) is not before_type:
                return f"a {before_type.__name__} has become a {type(module).__name__}"
        inside = iter(self._inside)
        for (name, kind, table), size in zip(self._full_tables, self._sizes, strict=True):
            before = [next(inside) for _ in range(size)]
            if len(table) != size or not all(map(is_, table.values(), before)):
                return f"{name or 'the network'} has other {_TABLES[kind]}"
        for (name, _, key), value in zip(self._settings, self._values, strict=True):
            if value != self._now(name, key):
                return f"{name}.{key} is {self._now(name, key)!r}, was {value!r}".lstrip(".")
        return "a hook or a layer was added, or a forward replaced"

    def _now(self, name: str, key: str) -> Any:
        return next(values.get(key) for other, values, one in self._settings if (other, one) == (name, key))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of a composite has its own target and records that, so a copy of its watch watches nothing."""
        return type(self)(nn.Module(), fx.Graph())

    def __reduce__(self) -> tuple[Any, ...]:
        return _watch_nothing, ()


def _watch_nothing() -> TargetWatch:
    return TargetWatch(nn.Module(), fx.Graph())


def _called(target: nn.Module, graph: fx.Graph) -> list[tuple[str, nn.Module]]:
    """The layers that the graph calls and their submodules, each once, with names."""
    names = dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "call_module")
    found: dict[int, tuple[str, nn.Module]] = {}
    for name in names:
        for inside, part in target.get_submodule(name).named_modules():
            found.setdefault(id(part), (f"{name}.{inside}".rstrip("."), part))
    return list(found.values())


_Place = tuple[str, dict[str, Any], str]
"""Name of a layer, one of its dictionaries, and a key in that."""


def _tensor_places(target: nn.Module, called: list[tuple[str, nn.Module]], graph: fx.Graph) -> list[_Place]:
    """Where the target keeps the parameters and buffers that the graph uses."""
    places = [(name, table, key) for name, part in called for table in _tensors_of(part) for key in table]
    modules = dict(target.named_modules(remove_duplicate=False))
    for node in graph.nodes:
        if node.op == "get_attr":
            owner, _, key = str(node.target).rpartition(".")
            tables = _tensors_of(modules[owner]) if owner in modules else ()
            places += [(owner, table, key) for table in tables if key in table]
    return places


def _tensors_of(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module.__dict__["_parameters"], module.__dict__["_buffers"]


def _has_memory(tensor: object) -> TypeGuard[Tensor]:
    """Whether a tensor has a data pointer; sparse tensors, for example, have none."""
    if not isinstance(tensor, Tensor):
        return False
    try:
        return tensor.data_ptr() is not None
    except (NotImplementedError, RuntimeError):
        return False


def _settings(called: list[tuple[str, nn.Module]]) -> list[_Place]:
    """Plain attributes of torch's layers; those of other layers may be counters or caches."""
    plain = bool, int, float, str, tuple
    return [
        (name, part.__dict__, key)
        for name, part in called
        if type(part).__module__.startswith("torch.nn.")
        for key, value in part.__dict__.items()
        if not key.startswith("_") and key not in _UNUSED and isinstance(value, plain)
    ]
