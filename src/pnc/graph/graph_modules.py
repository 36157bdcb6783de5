"""Graph modules that can be pickled, because they are rebuilt node by node."""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx.node import _get_qualified_name, map_aggregate, map_arg


class RecordedModule(fx.GraphModule):
    """A graph over its own modules and tensors.

    Unpickling a plain `fx.GraphModule` traces it, which replaces `nn.Module.__call__` for all threads of the process.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        kept = {name: value for name, value in self.__dict__.items() if name in _KEPT}
        places: dict[fx.Node, Any] = {node: _NodeIndex(index) for index, node in enumerate(self.graph.nodes)}
        nodes = [
            _Node(
                node.op,
                node.name,
                _named(node.target),
                map_arg(node.args, places.__getitem__),
                map_arg(node.kwargs, places.__getitem__),
                {key: value for key, value in node.meta.items() if key == "pnc"},
            )
            for node in self.graph.nodes
        ]
        return _rebuilt, (kept, nodes)

    def __deepcopy__(self, memo: Any) -> fx.GraphModule:
        copied: fx.GraphModule = super().__deepcopy__(memo)
        keep_hidden(copied, self)
        return copied


def keep_hidden(module: nn.Module, original: nn.Module) -> None:
    """Leave out of a module's state dict the buffers that `original`, from which it was made, leaves out of its own."""
    for name, part in original.named_modules():
        if part._non_persistent_buffers_set:
            twin = module.get_submodule(name)
            twin._non_persistent_buffers_set |= part._non_persistent_buffers_set & twin._buffers.keys()


_KEPT = "training", "_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"


@dataclass(frozen=True)
class _NodeIndex:
    """Stands for the node of this index in the graph."""

    index: int


@dataclass(frozen=True)
class _Node:
    """A node, with `_NodeIndex` for the nodes in its arguments, and only the metadata of pnc."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    meta: dict[str, Any]


@dataclass(frozen=True)
class _Named:
    """A function of torch by its path: pickle does not always find it under its own name."""

    path: str


def _named(target: Any) -> Any:
    if not callable(target):
        return target
    path = _get_qualified_name(target) if str(getattr(target, "__module__", "")).startswith("torch") else ""
    try:
        return _Named(path) if path and pkgutil.resolve_name(path) is target else target
    except (AttributeError, ImportError, ValueError):
        return target


def _rebuilt(kept: dict[str, Any], nodes: list[_Node]) -> RecordedModule:
    graph = fx.Graph()
    made: list[fx.Node] = []

    def found(value: Any) -> Any:
        return made[value.index] if isinstance(value, _NodeIndex) else value

    for one in nodes:
        target: str | Callable[..., Any] = one.target
        if isinstance(one.target, _Named):
            target = pkgutil.resolve_name(one.target.path)
        args, kwargs = map_aggregate(one.args, found), map_aggregate(one.kwargs, found)
        node = graph.create_node(one.op, target, args, kwargs, name=one.name)
        node.meta.update(one.meta)
        made.append(node)
    root = nn.Module()
    root.__dict__.update(kept)
    module = RecordedModule(root, graph)
    flags = {name: part.training for name, part in root.named_modules()}
    for name, part in module.named_modules():  # modules that only contain others are new
        part.training = flags[name]
    keep_hidden(module, root)
    return module
