"""What a node of a recorded graph says: its operation, its arguments, its shape."""

import math
from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from pnc.graph.recorder import BATCH_SIZES, info, operation_name


def describe(node: fx.Node) -> str:
    """A node in words, for reasons."""
    return f"{family(node)} ({node.name})"


def family(node: fx.Node) -> str:
    """Name of a call without the marks of in-place and operator variants: `__iadd__`, `add_` -> `add`."""
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
    """Argument of a call, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def shape_of(node: object) -> tuple[int, ...]:
    """Shape at batch size 2; () for anything that is no node with a single tensor result."""
    return (info(node).shape or ()) if isinstance(node, fx.Node) else ()


def batch_dims(node: fx.Node) -> tuple[int, ...]:
    """Dims whose size follows the batch."""
    sizes = zip(info(node).shape or (), info(node).shape3 or (), strict=True)
    return tuple(d for d, (a, b) in enumerate(sizes) if a != b)


def scalar_value(node: fx.Node) -> Any:
    """Value at batch size 2 of a node that follows the batch: the batch size itself, or a multiple of it."""
    if node.op == "call_method":
        return BATCH_SIZES[0]
    function: Callable[..., Any] = node.target  # type: ignore[assignment]
    return function(*map_arg(node.args, scalar_value))


def constant_sources(node: fx.Node) -> list[fx.Node] | None:
    """The tensors of the network that a constant in the graph is made of, if it could stand in their place.

    Returns:
        The `get_attr` nodes; None for what depends on the input or the batch size, takes a module to compute, or has
        more entries than it is made of.
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
