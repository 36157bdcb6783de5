"""Where a network can be cut in two: its cut points, and the parts between them as modules."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from pnc.foundation.errors import InputError
from pnc.graph.nodes import info
from pnc.graph.recording import Recording
from pnc.graph.subgraphs import costs_before, dominators, subgraph
from pnc.graph.tensor_axes import channel_dims, prefix_tokens

INPUT = "input"
"""Name of the cut point before the first operation."""

LOGITS = "logits"
"""Name of the network's output in `extract`."""

_KINDS: dict[int, Literal["map", "tokens", "vector"]] = {2: "vector", 3: "tokens", 4: "map"}
CHANNEL_DIMS: Mapping[str, tuple[int, ...]] = {"vector": (1,), "tokens": (1, 2), "map": (1, 3)}
"""Where the channels of each kind of cut may be, counting the batch dim."""


@dataclass(frozen=True)
class CutPoint:
    """A tensor through which every path from the input to the logits passes.

    Attributes:
        name: Name of the node that computes it (the last one of a chain of in-place operations); `INPUT` for the
            network's input.
        index: Order from the input, which is 0.
        scope: Qualified name of the module in whose forward it is computed.
        kind: "map": (B, C, H, W), or (B, H, W, C) if `channel_dim` is 3; "tokens": (B, N, D), or (B, D, N) if
            `channel_dim` is 1; "vector": (B, D).
        shape: Shape without the batch.
        channel_dim: Dimension of the channels, counting the batch.
        n_prefix_tokens: Number of class, distillation or register tokens before the image's tokens; 0 if there are no
            image tokens.
        n_macs: Multiply-accumulates of the part before the cut, per sample.
        n_params: Parameters of the part before the cut.
    """

    name: str
    index: int
    scope: str
    kind: Literal["map", "tokens", "vector"]
    shape: tuple[int, ...]
    channel_dim: int
    n_prefix_tokens: int
    n_macs: int
    n_params: int

    @property
    def n_channels(self) -> int:
        """Size of the channel dimension."""
        return self.shape[self.channel_dim - 1]

    @property
    def size(self) -> int:
        """Number of elements for one image."""
        return math.prod(self.shape)

    @property
    def is_pooled(self) -> bool:
        """Whether there is only one position, which makes it equivalent to a vector."""
        return self.size == self.n_channels

    def is_alike(self, other: "CutPoint") -> bool:
        """Whether both tensors have the same shape and meaning of dims, so that one could replace the other."""
        keys = ("kind", "shape", "channel_dim", "n_prefix_tokens")
        return all(getattr(self, key) == getattr(other, key) for key in keys)

    def is_same_place(self, other: "CutPoint") -> bool:
        """Whether both are the same tensor with the same meaning of dims; costs and order are ignored."""
        return self.name == other.name and self.is_alike(other)


# ----------------------------------------------------------------------------------------------------------- cut points
def cut_points(recording: Recording) -> tuple[CutPoint, ...]:
    """All cut points of a recorded network, in order from its input.

    These have the batch first and 2 to 4 dimensions; with 4 they must have the image's proportions (attention scores,
    for example, are not a map).
    """
    nodes = dominators(recording.module.graph)
    dims, prefixes = channel_dims(recording), prefix_tokens(recording.module.graph)
    found: list[CutPoint] = []
    for node, costs in zip(nodes, costs_before(nodes), strict=True):
        shape = info(node).shape or ()
        kind = _KINDS.get(len(shape))
        channel_dim = dims.get(node, 2 if kind == "tokens" else 1)
        if kind is None or channel_dim not in CHANNEL_DIMS[kind]:
            continue
        if kind == "map" and not _is_map(shape, channel_dim, recording.input_shape):
            continue
        n_prefix_tokens = prefixes.get(node, 0) if kind == "tokens" else 0
        if kind == "tokens" and n_prefix_tokens == shape[3 - channel_dim]:
            n_prefix_tokens = 0  # class tokens alone form a grid
        name = INPUT if node.op == "placeholder" else node.name
        found.append(
            CutPoint(name, len(found), info(node).scope, kind, shape[1:], channel_dim, n_prefix_tokens, *costs)
        )
    return tuple(found)


def _is_map(shape: Sequence[int], channel_dim: int, input_shape: Sequence[int]) -> bool:
    """Whether height and width were reduced by the same factor, up to rounding."""
    height, width = (size for dim, size in enumerate(shape) if dim not in (0, channel_dim))
    ratio = (input_shape[1] / height) / (input_shape[2] / width)
    return 2 / 3 <= ratio <= 3 / 2


# ---------------------------------------------------------------------------------------------------------------- parts
def extract(recording: Recording, start: CutPoint | None, outputs: Sequence[str | CutPoint]) -> fx.GraphModule:
    """A part of the network as a module over the same weights, in eval mode.

    It works at any batch size and never writes to its input; an output is copied if the network writes to it later.

    Args:
        recording: The network.
        start: The cut point whose tensor the part takes; None for the network's input.
        outputs: Cut points, names of nodes, or `LOGITS`. The part returns a tensor for one output, a tuple for several.
    Raises:
        InputError: a name is unknown, there is no output, or `start` does not determine an output.
    """
    if not outputs:
        raise InputError("outputs: expected at least one cut point, node name or LOGITS, got none")
    nodes = {node.name: node for node in recording.module.graph.nodes if info(node).shape is not None}
    nodes[INPUT] = recording.input
    nodes[LOGITS] = recording.output
    names = [output.name if isinstance(output, CutPoint) else output for output in outputs]
    start_name = INPUT if start is None else start.name
    unknown = [name for name in (start_name, *names) if name not in nodes]
    if unknown:
        raise InputError(f"cut: the network has no tensor named {unknown[0]!r}; its cut points: {_names(recording)}")
    return subgraph(recording.module, nodes[start_name], [nodes[name] for name in names])


def _names(recording: Recording) -> str:
    return ", ".join(cut.name for cut in cut_points(recording))
