"""Where a network can be cut in two: cut points as data, the classifier's head, and the parts themselves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from pnc.foundation.errors import InputError
from pnc.graph.nodes import info
from pnc.graph.recording import Recording
from pnc.graph.subgraphs import costs_before, dominators, subgraph
from pnc.graph.tensor_axes import channel_dims, prefix_tokens

INPUT = "input"
"""Name of the cut point in front of everything."""

LOGITS = "logits"
"""Names the network's output in `extract`."""


_KINDS: dict[int, Literal["map", "tokens", "vector"]] = {2: "vector", 3: "tokens", 4: "map"}


@dataclass(frozen=True)
class CutPoint:
    """A tensor through which everything passes on its way from the input to the logits.

    Attributes:
        name: Name of the node that makes it (the last one of a chain in place), `INPUT` for the network's input.
        index: Order from the input, 0 for the input.
        scope: Qualified name of the module in whose forward it was made.
        kind: "map": (B, C, H, W), or (B, H, W, C) where `channel_dim` is 3; "tokens": (B, N, D), or (B, D, N) where
            `channel_dim` is 1; "vector": (B, D).
        shape: Without batch.
        channel_dim: Dimension of the channels, batch counted.
        n_prefix_tokens: Class, distillation or register tokens in front of the tokens of the image; 0 where they are
            alone.
        n_macs: Of the part before the cut, per sample.
        n_params: Of the part before the cut.
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
        """Whether there is one position only, so that it is as good as a vector."""
        return self.size == self.n_channels

    def is_alike(self, other: "CutPoint") -> bool:
        """Whether both tensors are read in the same way, so that one could stand for the other."""
        keys = ("kind", "shape", "channel_dim", "n_prefix_tokens")
        return all(getattr(self, key) == getattr(other, key) for key in keys)

    def is_same_place(self, other: "CutPoint") -> bool:
        """Whether both are the same tensor, read in the same way; costs and order do not matter."""
        return self.name == other.name and self.is_alike(other)


# ----------------------------------------------------------------------------------------------------------- cut points


def cut_points(recording: Recording) -> tuple[CutPoint, ...]:
    """Every cut point of a recorded network, from its input on.

    Only tensors with the batch in front and 2 to 4 dimensions count, those with 4 only in the proportions of the
    image (attention scores, for example, are no map).
    """
    nodes = dominators(recording.module.graph)
    dims, prefixes = channel_dims(recording), prefix_tokens(recording.module.graph)
    found: list[CutPoint] = []
    for node, costs in zip(nodes, costs_before(nodes), strict=True):
        shape = info(node).shape or ()
        kind = _KINDS.get(len(shape))
        channel_dim = dims.get(node, 2 if kind == "tokens" else 1)
        if kind is None or (kind == "map" and not _is_map(shape, channel_dim, recording.input_shape)):
            continue
        n_prefix_tokens = prefixes.get(node, 0) if kind == "tokens" else 0
        if kind == "tokens" and n_prefix_tokens == shape[3 - channel_dim]:
            n_prefix_tokens = 0  # class tokens alone are a grid of their own
        name = INPUT if node.op == "placeholder" else node.name
        found.append(
            CutPoint(name, len(found), info(node).scope, kind, shape[1:], channel_dim, n_prefix_tokens, *costs)
        )
    return tuple(found)


def _is_map(shape: Sequence[int], channel_dim: int, input_shape: Sequence[int]) -> bool:
    """Whether height and width were shrunk alike, to within rounding."""
    height, width = (size for dim, size in enumerate(shape) if dim not in (0, channel_dim))
    ratio = (input_shape[1] / height) / (input_shape[2] / width)
    return 2 / 3 <= ratio <= 3 / 2


# ----------------------------------------------------------------------------------------------------------------- head


# ------------------------------------------------------------------------------------------------------------ the parts


def extract(recording: Recording, start: CutPoint | None, outputs: Sequence[str | CutPoint]) -> fx.GraphModule:
    """A part of the network as a module over the same weights, in eval mode.

    Works at any batch size. The tensor that it is given is never written to; a tensor handed out is copied where the
    network goes on to write to it.

    Args:
        start: The cut point whose tensor the part takes; None for the network's input.
        outputs: Cut points, names of nodes, or `LOGITS`. One gives a tensor, several a tuple in this order.
    Raises:
        InputError: an unknown name, no output, or one that `start` does not determine.
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
