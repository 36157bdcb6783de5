"""Facts about the nodes of a recorded graph: operation, arguments, shape, costs."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch.fx.node import map_arg


def describe(node: fx.Node) -> str:
    """Name a node in a message."""
    return f"{family(node)} ({node.name})"


def family(node: fx.Node) -> str:
    """The name of a call without the affixes of in-place and operator variants: `__iadd__`, `add_` -> `add`."""
    if node.target is getattr:
        return f".{node.args[1]}"
    name = operation_name(node.target).strip("_")
    return _ALIASES.get(name, name)


_ALIASES = {
    **{f"{mark}{name}": name for mark in "ir" for name in ("add", "mul")},
    **dict.fromkeys(("isub", "rsub", "subtract"), "sub"),
    **dict.fromkeys(("truediv", "itruediv", "divide", "true_divide"), "div"),
    **dict.fromkeys(("imatmul", "rmatmul"), "matmul"),
    "ipow": "pow",
    "multiply": "mul",
    **dict.fromkeys(("concat", "concatenate"), "cat"),
    **dict.fromkeys(("swapaxes", "swapdims"), "transpose"),
    "moveaxis": "movedim",
    "tile": "repeat",
}


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, whether given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def shape_of(node: object) -> tuple[int, ...]:
    """Shape at batch size 2; () for anything but a node with a single tensor as its result."""
    return (info(node).shape or ()) if isinstance(node, fx.Node) else ()


def batch_dims(node: fx.Node) -> tuple[int, ...]:
    """Dims whose size depends on the batch size."""
    sizes = zip(info(node).shape or (), info(node).shape3 or (), strict=True)
    return tuple(d for d, (a, b) in enumerate(sizes) if a != b)


def scalar_value(node: fx.Node) -> Any:
    """Value at batch size 2 of a node whose result is the batch size or a multiple of it."""
    if node.op == "call_method":  # of `size`
        tensor, dim = node.args
        return shape_of(tensor)[dim] if shape_of(tensor) else BATCH_SIZES[0]  # type: ignore[index]
    function: Callable[..., Any] = node.target  # type: ignore[assignment]
    return function(*map_arg(node.args, scalar_value))


def constant_sources(node: fx.Node) -> list[fx.Node] | None:
    """The tensors of the network that a constant in the graph is computed from, if it could replace them.

    Returns:
        The `get_attr` nodes; None if the node depends on the input or the batch size, is computed by a module, or has
        more entries than these tensors.
    """
    if info(node).from_input:
        return None
    made_of = {node: None}
    todo = [node]
    while todo:
        current = todo.pop()
        new = [source for source in current.all_input_nodes if source not in made_of]
        if current.op in ("placeholder", "call_module") or (current.op != "get_attr" and not current.all_input_nodes):
            return None
        made_of.update(dict.fromkeys(new))
        todo += new
    sources = [n for n in made_of if n.op == "get_attr"]
    fits = math.prod(shape_of(node)) <= sum(math.prod(shape_of(source)) for source in sources)
    return sources if fits else None


BATCH_SIZES = (2, 3)
"""The two batch sizes at which a network is recorded."""


@dataclass(frozen=True)
class NodeInfo:
    """What is known about a node of a recorded graph; stored in `node.meta["pnc"]`, also in extracted graphs.

    Attributes:
        shape: Shape of its result at batch size 2, including the batch; None unless the result is a single tensor.
        shape3: The same at batch size 3.
        dtype: Dtype of that tensor.
        is_tensor: Whether its result contains a tensor; otherwise it is an integer that depends on the batch size.
        from_input: Whether its result depends on the network's input, not only on the batch size.
        scope: Qualified name of the module in whose forward it ran ("" for the network itself).
        n_macs: Multiply-accumulates per sample.
        n_params: Number of parameters that it is the first to use.
        after: Names of nodes, other than its arguments, that must run first: the last writers to the memory it reads.
        holds: Storages of its result, as numbers that are valid within one recording.
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


def operation_name(target: Any) -> str:
    """The readable name of an operation: that of a function or method, or the qualified name of a module or tensor."""
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))
