"""Forward prints, which identify a network's forward pass: a digest of its recorded graph, and logits of a pattern.

A fingerprint covers the weights but not the forward pass: another activation, epsilon or order of outputs does not
change it. The logits decide whether two forward passes are the same; the digest shows where they differ.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from pnc.foundation.fingerprints import plain_state
from pnc.foundation.tensor_bits import dtype_name
from pnc.graph.nodes import family, info
from pnc.graph.recording import Recording

N_ANSWERS, N_IMAGES = 16, 3
MAX_OPERATIONS = 4000
CLOSE, FAR = 1e-4, 1e-2
"""Largest relative differences of answers between equal functions: if the graphs differ, and if they are equal, when
only rounding can be the cause (GPUs may round products to eleven bits, TF32)."""

_EVAL_ONLY = frozenset({"training", "inplace", "momentum", "p"})
_PLAIN = bool, int, float, complex, str, type(None)


@dataclass(frozen=True)
class ForwardPrint:
    """Identifies what a network does.

    Attributes:
        operations: For each operation of the graph, its name and four hex digits of its description (settings,
            constants, inputs and weights), such as `relu:0a1b`. Empty for graphs of more than `MAX_OPERATIONS`.
        digest: Digest of all descriptions, 32 hex digits, independent of the names of nodes.
        answers: Logits of a fixed pattern, (3, K), row by row; for many classes, sixteen weighted sums of each row.
    """

    operations: tuple[str, ...]
    digest: str
    answers: tuple[float, ...]


@dataclass(frozen=True)
class ForwardDifference:
    """How a network's forward pass differs from the expected one.

    Attributes:
        text: The difference in words.
        is_other: Whether it is another function, not just other code for the same function.
    """

    text: str
    is_other: bool


def forward_print(model: nn.Module, recording: Recording) -> ForwardPrint:
    """Compute the forward print of a network and its recording."""
    lines = _lines(model, recording)
    operations = tuple(f"{name}:{_hex(line, 4)}" for name, line in lines)
    digest = _hex("\n".join(line for _, line in lines), 32)
    return ForwardPrint(operations if len(operations) <= MAX_OPERATIONS else (), digest, _answers(recording))


def forward_difference(
    found: ForwardPrint, expected: ForwardPrint, *, weights: bool = True
) -> ForwardDifference | None:
    """Compare two forward prints; None if function and graph are the same.

    Args:
        found: Print of the given network.
        expected: Print of the network that it should be.
        weights: Whether both have the same weights; otherwise answers cannot be compared, and graphs must be equal.
    """
    where = None if found.digest == expected.digest else _first_difference(found, expected)
    if not weights:
        return None if where is None else ForwardDifference(where, True)
    gap = answers_gap(found.answers, expected.answers)
    if gap > (FAR if where is None else CLOSE):
        answers = f"its answers to a test pattern differ by {gap:.2g} of the largest"
        return ForwardDifference(answers if where is None else f"{where}, and {answers}", True)
    return None if where is None else ForwardDifference(where, False)


def answers_gap(found: tuple[float, ...], expected: tuple[float, ...]) -> float:
    """Largest difference of two lists of answers, as a share of the largest answer."""
    if len(found) != len(expected):
        return math.inf
    scale = max(map(abs, expected), default=0.0)
    return max((abs(a - b) for a, b in zip(found, expected, strict=True)), default=0.0) / max(scale, 1e-6)


def _first_difference(found: ForwardPrint, expected: ForwardPrint) -> str:
    ours, theirs = found.operations, expected.operations
    for place, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            name, expected_name = one.partition(":")[0], other.partition(":")[0]
            what = (
                f"{name} where {expected_name} was"
                if name != expected_name
                else f"{name} with other settings or inputs"
            )
            return f"the graph differs: operation {place + 1} is {what}"
    if len(ours) != len(theirs):
        return f"the graph differs: it has {len(ours)} operations where {len(theirs)} were"
    return "the graph differs"


# ---------------------------------------------------------------------------------------------------------------- graph
def _lines(model: nn.Module, recording: Recording) -> list[tuple[str, str]]:
    """Name and full description of each operation, in the order of the graph."""
    places = _places(model)
    numbers: dict[fx.Node, int] = {}
    lines = []
    for node in recording.module.graph.nodes:
        numbers[node] = len(numbers)
        lines.append(described(node, recording.module, numbers, lambda _, tensor: _tensor(tensor, places)))
    return lines


def described(
    node: fx.Node, module: fx.GraphModule, numbers: Mapping[fx.Node, int | str], text_of: Callable[[str, Tensor], str]
) -> tuple[str, str]:
    """Name and full description of an operation.

    Args:
        node: The operation.
        module: Holds its layer or tensor.
        numbers: What stands for the nodes that came before, which it reads or must run after.
        text_of: What stands for a tensor of the network, given its name in its layer.
    """
    after = [numbers[other] for other in numbers if other.name in info(node).after]
    name, own = _own(node, module, text_of)
    args = [map_aggregate(value, lambda part: _constant(part, numbers)) for value in (node.args, dict(node.kwargs))]
    return name, f"{name} {own} {args} {after} {_sizes(node)}"


def _sizes(node: fx.Node) -> str:
    shape, dtype = info(node).shape, info(node).dtype
    return "" if shape is None or dtype is None else f"{list(shape)} {dtype_name(dtype)}"


def _own(node: fx.Node, module: fx.GraphModule, text_of: Callable[[str, Tensor], str]) -> tuple[str, str]:
    """Name of an operation, and the description of its module or tensor."""
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        parts = [f"{type(part).__name__} {_settings(part)}" for part in layer.modules()]
        tensors = [text_of(name, tensor) for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]]
        return _plain(type(layer).__name__), f"{parts} {tensors}"
    if node.op == "get_attr":
        owner, _, key = str(node.target).rpartition(".")
        return "tensor", text_of(key, getattr(module.get_submodule(owner), key))
    name = family(node) if node.op in ("call_function", "call_method") else node.op
    return _plain(name), ""


def _plain(name: str) -> str:
    return re.sub(r"\W", "_", name, flags=re.ASCII)[:100] or "_"


def _settings(layer: nn.Module) -> list[str]:
    names = [name for name in layer.__dict__ if not name.startswith("_") and name not in _EVAL_ONLY]
    values = {name: layer.__dict__[name] for name in sorted(names)}
    return [f"{name}={_text(value)}" for name, value in values.items() if _is_setting(value)]


def _is_setting(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_setting, value))
    return isinstance(value, (*_PLAIN, torch.dtype)) or callable(value)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_text, value))})"
    if isinstance(value, nn.Module):
        return type(value).__name__
    return (
        repr(value)
        if isinstance(value, (*_PLAIN, torch.dtype))
        else str(getattr(value, "__name__", type(value).__name__))
    )


def _constant(value: Any, numbers: Mapping[fx.Node, int | str]) -> Any:
    if isinstance(value, fx.Node):
        return f"%{numbers[value]}"
    return "device" if isinstance(value, torch.device) else repr(value)


def _places(model: nn.Module) -> dict[Any, int]:
    """Index in the fingerprint of each of its tensors, by memory."""
    found: dict[Any, int] = {}
    for place, tensor in enumerate(plain_state(model).values()):
        found.setdefault(_memory(tensor), place)
    return found


def _memory(tensor: Tensor) -> Any:
    return (tensor.data_ptr(), tuple(tensor.shape)) if tensor.numel() else ("empty", tuple(tensor.shape))


def _tensor(tensor: Tensor, places: dict[Any, int]) -> str:
    """A tensor in the fingerprint by its index there; any other tensor by its values, to three digits."""
    place = places.get(_memory(tensor))
    if place is not None:
        return f"#{place}"
    values = tensor.detach().flatten().cpu()
    text = (
        ",".join(f"{value:.3g}" for value in values.double().tolist())
        if not values.is_complex()
        else str(values.tolist())
    )
    return f"{list(tensor.shape)} {dtype_name(tensor.dtype)} {_hex(text, 16)}"


# -------------------------------------------------------------------------------------------------------------- answers
def pattern_images(shape: tuple[int, ...]) -> Tensor:
    """Images (3, C, H, W) in [0, 1], bit-identical on every machine: fine and coarse noise, and a noisy slope."""
    n_channels, height, width = shape
    numbers = torch.arange(n_channels * height * width).reshape(shape)
    fine = _noise(numbers)
    rows, columns = torch.arange(height) // max(1, height // 4), torch.arange(width) // max(1, width // 4)
    places = (rows[:, None] * 8 + columns).expand(shape) + 1000 * torch.arange(1, n_channels + 1)[:, None, None]
    coarse = _noise(places)
    slope = (torch.arange(width, dtype=torch.float32) / width).expand(shape)
    return torch.stack([fine, coarse, 0.75 * slope + 0.25 * fine])


def _noise(numbers: Tensor) -> Tensor:
    """Pseudorandom multiples of 2^-16 in [0, 1), one for each whole number."""
    mixed = (numbers + 1) * 2654435761 % 4294967296
    mixed = (mixed ^ (mixed >> 15)) * 1103515245 % 4294967296
    return ((mixed ^ (mixed >> 13)) % 65536).float() / 65536


def answers_of(logits: Tensor) -> tuple[float, ...]:
    """The answers of a forward print, from the logits of the pattern, (3, K)."""
    kept = logits.detach().double().cpu().nan_to_num()
    if kept.shape[1] > N_ANSWERS:
        numbers = torch.arange(kept.shape[1] * N_ANSWERS).reshape(-1, N_ANSWERS)
        kept = kept @ (2 * _noise(numbers).double() - 1)
    return tuple(float(f"{value:.7g}") for value in kept.flatten().tolist())


@torch.no_grad()
def _answers(recording: Recording) -> tuple[float, ...]:
    pattern = pattern_images(recording.input_shape).to(recording.probe.device, recording.probe.dtype)
    return answers_of(recording.module(pattern))


def _hex(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
