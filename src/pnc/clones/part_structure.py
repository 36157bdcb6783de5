"""The structure of a clone's part as data: layers of `torch.nn` with their arguments, tensors, and a graph.

A full file holds it, so that the part can be rebuilt without the source. The part is first built without values, on
the meta device, and run there: what a file asks for is known before memory is taken for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

from pnc.clones.allowed_operations import LAYERS
from pnc.clones.cut_facts import cut_facts, read_cut
from pnc.clones.metadata_object import MAX_SIZE, Fail, MetadataObject
from pnc.clones.part_graph import MAX_NODES, is_path, parsed_graph, plain_graph
from pnc.clones.plain_arguments import MAX_NUMBER, parsed, plain
from pnc.foundation.class_names import is_name
from pnc.foundation.network_state import undisturbed
from pnc.graph.cut_points import CutPoint
from pnc.graph.graph_builder import eval_module
from pnc.graph.graph_modules import keep_hidden
from pnc.graph.nodes import BATCH_SIZES, info

FAILURES = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, MemoryError),
)
"""Errors of layers and operations that do not fit their arguments."""

PART_KEYS = ("features", "layers", "nodes", "spaces", "tensors")
"""Keys of the structure in a file's metadata."""

TENSOR_KINDS = ("parameter", "buffer", "hidden")
"""A tensor outside of layers is a parameter, a buffer, or one that state dicts leave out."""

_MAX_VALUES = 1 << 28
"""Largest number of values of any intermediate result for a batch of two or three."""


@dataclass(frozen=True, eq=False)
class PartStructure:
    """What a clone's part consists of, without values.

    Attributes:
        features: The cut of the source's features that the part computes.
        spaces: Size of each channel space of the masks, in order; empty if there are no masks.
        layers: (class in `torch.nn`, arguments of its constructor) by name, in order.
        tensors: Kind of each tensor outside of layers by name, in order; one of `TENSOR_KINDS`.
        graph: The operations.
    """

    features: CutPoint
    spaces: Mapping[str, int]
    layers: Mapping[str, tuple[str, Mapping[str, Any]]]
    tensors: Mapping[str, str]
    graph: fx.Graph

    def facts(self) -> dict[str, Any]:
        """The structure as JSON values.

        Raises:
            InputError: an operation or argument is one that files cannot hold.
        """
        layers = [
            [name, kind, {key: plain(value, {}) for key, value in arguments.items()}]
            for name, (kind, arguments) in self.layers.items()
        ]
        return {
            "features": cut_facts(self.features),
            "spaces": [[name, size] for name, size in self.spaces.items()],
            "layers": layers,
            "tensors": [[name, kind] for name, kind in self.tensors.items()],
            "nodes": plain_graph(self.graph),
        }


def read_structure(part: MetadataObject, fail: Fail) -> PartStructure:
    """Read the structure from an object of a file's metadata with the keys of `PartStructure.facts`."""
    spaces, layers, tensors = (_rows(part, key, n) for key, n in (("spaces", 2), ("layers", 3), ("tensors", 2)))
    for name, size in spaces:
        if not is_name(name) or type(size) is not int or not 1 <= size <= MAX_SIZE:
            fail("part.spaces: expected names with sizes")
    for name, kind in tensors:
        if not is_path(name) or kind not in TENSOR_KINDS:
            fail(f"part.tensors: expected names, each with one of {', '.join(TENSOR_KINDS)}")

    def no_operation(index: int) -> Any:
        fail(f"part.layers: refers to operation {index}")

    read: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for name, kind, arguments in layers:
        if not is_path(name) or not isinstance(kind, str) or kind not in LAYERS or not isinstance(arguments, dict):
            fail("part.layers: expected names, each with a layer of torch.nn and its arguments")
        read[name] = kind, {key: parsed(value, no_operation, fail) for key, value in arguments.items()}
    return PartStructure(
        read_cut(part, "features"), dict(spaces), read, dict(tensors), parsed_graph(part.values["nodes"], fail)
    )


def _rows(part: MetadataObject, key: str, length: int) -> list[list[Any]]:
    """A list of lists of a length that begin with a name; no name occurs twice."""
    rows: list[Any] = part.get(key, list, "a list")
    if len(rows) > MAX_NODES or not all(isinstance(row, list) and len(row) == length for row in rows):
        part.refuse(key, f"at most {MAX_NODES} lists of {length}", rows)
    names = [row[0] for row in rows if isinstance(row[0], str)]
    if len(set(names)) < len(rows):
        part.refuse(key, "names, and none of them twice", rows)
    return rows


# --------------------------------------------------------------------------------------------------------- rebuilding
def empty_part(structure: PartStructure) -> fx.GraphModule:
    """The part without values, its tensors on the meta device.

    Raises:
        Errors of `FAILURES`, if layers do not fit their arguments, or a name is used for two things.
    """
    root = nn.Module()
    with undisturbed(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        for name, (kind, arguments) in structure.layers.items():
            owner, key = _owner(root, name, structure.layers)
            owner.add_module(key, LAYERS[kind](**arguments))
    for name, kind in structure.tensors.items():
        owner, key = _owner(root, name, structure.layers)
        tensor = torch.empty(0, device="meta")
        if kind == "parameter":
            owner.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
        else:
            owner.register_buffer(key, tensor, persistent=kind == "buffer")
    part = eval_module(root, structure.graph)
    for name in structure.tensors:  # those that no operation reads
        tensor, (owner, key) = _tensor(root, name), _owner(part, name, structure.layers)
        if isinstance(tensor, nn.Parameter) and key not in owner._parameters:
            owner.register_parameter(key, tensor)
        elif not isinstance(tensor, nn.Parameter) and key not in owner._buffers:
            owner.register_buffer(key, tensor)
    keep_hidden(part, root)
    return part


def _owner(root: nn.Module, name: str, layers: Mapping[str, Any]) -> tuple[nn.Module, str]:
    """The module that holds an attribute, made if there is none; and the attribute's own name."""
    *scopes, key = name.split(".")
    owner, path = root, ""
    for scope in scopes:
        path = f"{path}.{scope}" if path else scope
        if path in layers:
            raise ValueError(f"{name} lies inside of the layer {path}")
        if scope not in owner._modules:
            owner.add_module(scope, nn.Module())
        owner = owner.get_submodule(scope)
    return owner, key


def _tensor(root: nn.Module, name: str) -> Tensor:
    owner, _, key = name.rpartition(".")
    tensor = getattr(root.get_submodule(owner), key)
    assert isinstance(tensor, Tensor)
    return tensor


def tensor_names(part: nn.Module) -> tuple[list[str], list[str]]:
    """Names of a part's tensors: those in its state dict, and the hidden ones."""
    state = list(part.state_dict())
    named = [*part.named_parameters(remove_duplicate=False), *part.named_buffers(remove_duplicate=False)]
    return state, [name for name, _ in named if name not in set(state)]


def misfit(structure: PartStructure, part: fx.GraphModule, tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the tensors that a file has for an empty part; None if they fit."""
    state, hidden = tensor_names(part)
    for name in sorted({*state, *hidden} ^ tensors.keys()):
        return f"its part has {'no' if name in tensors else 'a'} tensor {name[:80]!r}"
    for name in (*state, *hidden):
        wanted = _tensor(part, name)
        if name not in structure.tensors and wanted.shape != tensors[name].shape:
            return f"{name!r} has the shape {tuple(tensors[name].shape)}, its layer needs {tuple(wanted.shape)}"
    return None


def fill(part: fx.GraphModule, tensors: Mapping[str, Tensor]) -> None:
    """Give a part its tensors, by name: those given, not copies."""
    for name, tensor in tensors.items():
        owner_name, _, key = name.rpartition(".")
        owner = part.get_submodule(owner_name)
        if key in owner._parameters:
            owner._parameters[key] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[key] = tensor


def first_dtype(part: nn.Module) -> torch.dtype:
    """The dtype of the tensors that a part works on."""
    tensors = [*part.parameters(), *part.buffers()]
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


# ------------------------------------------------------------------------------------------------ trying without values
def dry_run(part: fx.GraphModule, start: tuple[int, ...], end: tuple[int, ...]) -> str | None:
    """Run a part whose tensors are on the meta device at both recorded batch sizes.

    Args:
        part: The part.
        start: Shape of its input, without batch.
        end: Shape of its output, without batch.
    Returns:
        What is wrong: an operation that cannot run, or a shape that differs from the recorded one; None if all is well.
    """
    dtype = first_dtype(part)
    for batch, shape_of in zip(BATCH_SIZES, ("shape", "shape3"), strict=True):
        values: dict[fx.Node, Any] = {}
        for node in part.graph.nodes:
            try:
                with undisturbed(), torch.no_grad(), torch.device("meta"):
                    values[node] = (
                        torch.empty(batch, *start, dtype=dtype)
                        if node.op == "placeholder"
                        else _result(part, node, values)
                    )
            except FAILURES as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                return f"its operation {node.name} cannot run: {reason[:200]}"
            wanted = getattr(info(node), shape_of)
            if wanted is not None and node.op != "output" and getattr(values[node], "shape", None) != wanted:
                return f"the result of its operation {node.name} has another shape than the recorded {wanted}"
        out = values[node]
        if not isinstance(out, Tensor) or out.shape != (batch, *end):
            return f"its part does not give features of shape {end}"
    return None


def _result(part: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = (map_aggregate(map_arg(given, values.__getitem__), _on_meta) for given in (node.args, node.kwargs))
    assert isinstance(args, tuple) and isinstance(kwargs, dict)
    if node.op == "output":
        return args[0]
    if node.op == "get_attr":
        return _tensor(part, str(node.target))
    if node.op == "call_module":
        return _bounded(part.get_submodule(str(node.target))(*args, **kwargs))
    is_tensor = bool(args) and isinstance(args[0], Tensor)
    if node.op == "call_method":
        if not is_tensor:
            raise TypeError("a method of something that is no tensor")
        return _bounded(getattr(args[0], str(node.target))(*args[1:], **kwargs))
    assert callable(node.target)
    module = getattr(node.target, "__module__", "")
    numbers = [isinstance(one, int | float | Tensor) for one in args]
    if node.target is getattr and not is_tensor:
        raise TypeError("an attribute of something that is no tensor")
    if module == "_operator" and node.target.__name__ != "getitem" and not all(numbers):
        raise TypeError("arithmetic with something that is no number")
    if module == "_operator" and node.target.__name__ == "pow" and not any(isinstance(one, Tensor) for one in args):
        raise TypeError("a power of numbers")
    return _bounded(node.target(*args, **kwargs))


def _on_meta(value: Any) -> Any:
    return torch.device("meta") if isinstance(value, torch.device) else value


def _bounded(value: Any) -> Any:
    """A result, unless it is too large or something else than tensors and numbers."""
    if isinstance(value, Tensor):
        if value.numel() > _MAX_VALUES:
            raise ValueError(f"its result has {value.numel()} values, more than {_MAX_VALUES}")
    elif isinstance(value, int | float):
        if abs(value) > MAX_NUMBER:
            raise ValueError("its result is too large a number")
    elif isinstance(value, tuple | list):
        for one in value:
            _bounded(one)
    elif not (value is None or isinstance(value, torch.dtype | torch.device)):
        raise TypeError(f"its result is of the type {type(value).__name__}")
    return value
