"""The recorded graph of a clone's part as JSON, and back: nothing in it is code.

Operations are named; only those of `allowed_operations` are looked up. Names of nodes, layers and tensors become part
of the Python source that `torch.fx` makes of a graph, so only plain identifiers are accepted.
"""

import keyword
import re
from collections.abc import Mapping
from typing import Any

from torch import fx

from pnc.clones.allowed_operations import ATTRIBUTES, DTYPES, FUNCTIONS, METHODS, function_name
from pnc.clones.metadata_object import MAX_COUNT, Fail, MetadataObject
from pnc.clones.plain_arguments import parsed, plain
from pnc.foundation.errors import InputError
from pnc.foundation.tensor_bits import dtype_name
from pnc.graph.nodes import NodeInfo, info

MAX_NODES = 20_000
_IDENTIFIER, _PATH = re.compile(r"[A-Za-z_]\w{0,299}", re.ASCII), re.compile(r"\w{1,200}(\.\w{1,200}){0,30}", re.ASCII)
_NUMBERS, _FLAGS, _STORAGES = ("n_macs", "n_params"), ("is_tensor", "from_input"), ("holds", "writes")


def is_path(text: object) -> bool:
    """Whether a text is the dotted name of a layer or tensor."""
    return isinstance(text, str) and bool(_PATH.fullmatch(text)) and not any(map(keyword.iskeyword, text.split(".")))


# ----------------------------------------------------------------------------------------------------------- to JSON
def plain_graph(graph: fx.Graph) -> list[Any]:
    """A graph as JSON: for each node, operation, name, target, arguments, keyword arguments and facts.

    Raises:
        InputError: it has an operation or argument that files cannot hold.
    """
    places: dict[fx.Node, int] = {}
    storages: dict[int, int] = {}
    nodes = []
    for node in graph.nodes:
        args = [plain(value, places) for value in node.args]
        kwargs = {key: plain(value, places) for key, value in node.kwargs.items()}
        nodes.append([node.op, node.name, _target_name(node), args, kwargs, _plain_info(info(node), storages)])
        places[node] = len(places)
    return nodes


def _target_name(node: fx.Node) -> str:
    if node.op == "call_function":
        name = function_name(node.target)
        if name is None or (name == "getattr" and node.args[1] not in ATTRIBUTES):
            called = f".{node.args[1]}" if name else getattr(node.target, "__name__", node.target)
            raise InputError(f"clone: its part calls {called} ({node.name}), which files cannot name")
        return name
    if node.op == "call_method" and node.target not in METHODS:
        raise InputError(f"clone: its part calls the method {node.target} ({node.name}), which files cannot name")
    return str(node.target)


def _plain_info(facts: NodeInfo, storages: dict[int, int]) -> dict[str, Any]:
    """Facts about a node, without those that are empty; storages are numbered by first appearance."""
    found: dict[str, Any] = {}
    if facts.shape is not None and facts.shape3 is not None and facts.dtype is not None:
        found |= {"shape": list(facts.shape), "shape3": list(facts.shape3), "dtype": dtype_name(facts.dtype)}
    found |= {key: True for key in _FLAGS if getattr(facts, key)}
    found |= {key: getattr(facts, key) for key in _NUMBERS if getattr(facts, key)}
    for key in _STORAGES:
        numbers = [storages.setdefault(one, len(storages)) for one in sorted(getattr(facts, key))]
        found |= {key: sorted(numbers)} if numbers else {}
    found |= {"scope": facts.scope} if facts.scope else {}
    return found | ({"after": list(facts.after)} if facts.after else {})


# --------------------------------------------------------------------------------------------------------- from JSON
def parsed_graph(values: Any, fail: Fail) -> fx.Graph:
    """The graph from its JSON; `fail` raises the error for anything that `plain_graph` does not write."""
    if not isinstance(values, list) or not 2 <= len(values) <= MAX_NODES:
        fail(f"part.nodes: expected a list of 2 to {MAX_NODES} operations")
    graph = fx.Graph()
    made: list[fx.Node] = []

    def found(index: int) -> fx.Node:
        if not 0 <= index < len(made):
            fail(f"part.nodes: operation {len(made)} refers to operation {index}, which is not before it")
        return made[index]

    for place, value in enumerate(values):
        if not isinstance(value, list) or len(value) != 6 or not all(isinstance(one, str) for one in value[:3]):
            fail(f"part.nodes: operation {place} is not a list of operation, name, target, two arguments and facts")
        operation, name, target, args, kwargs, facts = value
        if not _IDENTIFIER.fullmatch(name) or keyword.iskeyword(name):
            fail(f"part.nodes: {name[:80]!r} is no name of an operation")
        _check_kind(place, len(values), operation, target, fail)
        if not isinstance(args, list) or not isinstance(kwargs, dict) or not all(map(_IDENTIFIER.fullmatch, kwargs)):
            fail(f"part.nodes: the arguments of {name} are not a list and an object")
        arguments = tuple(parsed(one, found, fail) for one in args)
        named = {key: parsed(one, found, fail) for key, one in kwargs.items()}
        if target == "getattr" and not (len(arguments) == 2 and arguments[1] in ATTRIBUTES):
            fail(f"part.nodes: {name} reads an attribute that is none of {', '.join(sorted(ATTRIBUTES))}")
        called = FUNCTIONS[target] if operation == "call_function" else target
        node = graph.create_node(operation, called, arguments, named, name=name)
        if node.name != name:
            fail(f"part.nodes: the name {name!r} occurs twice, or is a name of Python")
        node.meta["pnc"] = _parsed_info(
            MetadataObject(facts, f"part.nodes[{place}]", None, fail), {n.name for n in made}
        )
        made.append(node)
    return graph


def _check_kind(place: int, n_nodes: int, operation: str, target: str, fail: Fail) -> None:
    """Refuse an operation or target that is not allowed; the first node is the input and the last one the output."""
    wanted = {0: "placeholder", n_nodes - 1: "output"}.get(place)
    allowed: Mapping[str, bool] = {
        "placeholder": target == "x" and wanted == "placeholder",
        "output": target == "output" and wanted == "output",
        "get_attr": is_path(target),
        "call_module": is_path(target),
        "call_function": target in FUNCTIONS,
        "call_method": target in METHODS,
    }
    if not allowed.get(operation) or wanted not in (None, operation):
        fail(f"part.nodes: operation {place} is {operation[:80]!r} of {target[:80]!r}, which no file may name there")


def _parsed_info(facts: MetadataObject, names: set[str]) -> NodeInfo:
    unknown = facts.values.keys() - {*_NUMBERS, *_FLAGS, *_STORAGES, "shape", "shape3", "dtype", "scope", "after"}
    if unknown:
        facts.fail(f"{min(unknown)[:80]!r} is unknown")
    has_shape = "shape" in facts.values
    if any((key in facts.values) != has_shape for key in ("shape3", "dtype")):
        facts.fail("expected shape, shape3 and dtype together")
    after = facts.get("after", list, "a list of names") if "after" in facts.values else []
    if not all(isinstance(name, str) and name in names for name in after):
        facts.fail("after: expected names of earlier operations")
    return NodeInfo(
        shape=_sizes(facts, "shape") if has_shape else None,
        shape3=_sizes(facts, "shape3") if has_shape else None,
        dtype=DTYPES[facts.choice("dtype", tuple(DTYPES))] if has_shape else None,
        scope=facts.text("scope") if "scope" in facts.values else "",
        after=tuple(after),
        is_tensor=_flag(facts, "is_tensor"),
        from_input=_flag(facts, "from_input"),
        n_macs=_number(facts, "n_macs"),
        n_params=_number(facts, "n_params"),
        holds=_storages(facts, "holds"),
        writes=_storages(facts, "writes"),
    )


def _sizes(facts: MetadataObject, key: str) -> tuple[int, ...]:
    values = facts.get(key, list, "a list")
    if len(values) > 12 or not all(type(size) is int and 0 <= size <= MAX_COUNT for size in values):
        facts.refuse(key, "at most 12 sizes", values)
    return tuple(values)


def _flag(facts: MetadataObject, key: str) -> bool:
    return key in facts.values and facts.flag(key)


def _number(facts: MetadataObject, key: str) -> int:
    return int(facts.number(key, 0, MAX_COUNT, whole=True)) if key in facts.values else 0


def _storages(facts: MetadataObject, key: str) -> frozenset[int]:
    values = facts.get(key, list, "a list") if key in facts.values else []
    if not all(type(one) is int and 0 <= one <= MAX_COUNT for one in values):
        facts.refuse(key, "whole numbers", values)
    return frozenset(values)
