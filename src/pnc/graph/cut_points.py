"""Where a network can be cut in two: cut points as data, the classifier's head, and the parts themselves."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from pnc.foundation.errors import InputError
from pnc.graph.nodes import info
from pnc.graph.recording import Recording
from pnc.graph.subgraphs import costs_before, dominators, needs_of, subgraph
from pnc.graph.tensor_axes import channel_dims, prefix_tokens

INPUT = "input"
"""Name of the cut point in front of everything."""

LOGITS = "logits"
"""Names the network's output in `extract`."""

LARGE_GAP = 0.2
"""Share of a network without a cut point inside that is worth a word."""

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


@dataclass(frozen=True, eq=False)
class Head:
    """What turns features into logits.

    Attributes:
        features: Input of the last linear layer. A vector, or a map or tokens where the head pools afterwards; see
            `find_head` for heads of several layers.
        module: Qualified name of that layer; None where there are several or it is no module.
        n_features: Size of the features' channel dimension.
        weight: (K, n_features); None unless logits = mean of the features over their positions @ weight.T + bias.
        bias: (K,); None where `weight` is, or where the layer has none.
    """

    features: CutPoint
    module: str | None
    n_features: int
    weight: Tensor | None
    bias: Tensor | None


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


@dataclass(frozen=True)
class Gap:
    """Neighbouring cut points, or the last one and the output, with no way to part the network between them.

    Attributes:
        share: Of the network's MACs, the part that lies between them.
        params_share: Of its parameters.
        after: Name of the cut point in front.
        before: Name of the one behind; `LOGITS` for the output.
    """

    share: float
    params_share: float
    after: str
    before: str

    @property
    def is_large(self) -> bool:
        """Whether a fifth of the network's MACs or parameters lies between them."""
        return max(self.share, self.params_share) >= LARGE_GAP


def gaps(recording: Recording) -> tuple[Gap, ...]:
    """The parts of a network that have no cut point inside, by MACs, the largest first."""
    n_macs, n_params = (max(n, 1) for n in costs_before([recording.output])[0])
    cuts = cut_points(recording)
    places = [*((cut.name, cut.n_macs, cut.n_params) for cut in cuts), (LOGITS, n_macs, n_params)]
    found = [Gap((y[1] - x[1]) / n_macs, (y[2] - x[2]) / n_params, x[0], y[0]) for x, y in itertools.pairwise(places)]
    return tuple(sorted(found, key=lambda gap: -gap.share))


def candidate_cuts(recording: Recording, limit: int = 12) -> tuple[CutPoint, ...]:
    """The cut points worth trying, from the input to the deepest one before the head's features.

    Of cuts with no multiply-accumulate between them (convolution, norm, activation, dropout, pooling to a smaller
    map) only the last is kept, as it saves the most at no cost. The input stays, and so does the last tensor with
    more than one position where positions are then pooled away; what that gives is kept as well, but not where it is
    as good as the head's features. Of what remains, `limit` are spread evenly over the depth in MACs.

    Raises:
        InputError: `limit` is below 2, or the network's head is not found (`find_head`).
    """
    if limit < 2:
        raise InputError(f"limit: expected at least 2 (the input and the deepest cut), got {limit}")
    features = find_head(recording).features
    cuts = cut_points(recording)
    chain_ends = [cuts[0]]
    for n_macs, chain in itertools.groupby(cuts[1 : features.index], key=lambda cut: cut.n_macs):
        if n_macs > 0:
            chain_ends.extend(_chain_ends(list(chain), is_last=n_macs == features.n_macs))
    return _spread(chain_ends, limit)


def _chain_ends(chain: Sequence[CutPoint], is_last: bool) -> list[CutPoint]:
    """The cuts to keep of those with the same cost; `is_last`: the head's features belong to them as well.

    A map is preferred to the same values as tokens or as one long vector: it knows which positions are neighbours. And
    a map before it is padded for the next layer to the padded one, whose border an adapter could not know.
    """
    spatial = [cut for cut in chain if not cut.is_pooled]
    pooled = [cut for cut in chain if cut.is_pooled and not is_last][-1:]
    if not spatial:
        return pooled
    maps = [cut for cut in spatial if cut.kind == "map"]
    size = min(cut.size for cut in maps) if spatial[-1].kind == "map" else spatial[-1].size
    last = next((cut for cut in reversed(maps) if cut.size == size), spatial[-1])
    return [last] if pooled and pooled[0].size == last.size else [last, *pooled]


def _spread(cuts: Sequence[CutPoint], limit: int) -> tuple[CutPoint, ...]:
    """At most `limit` of the cuts, first and last included, nearest to even steps in MACs."""
    if len(cuts) <= limit:
        return tuple(cuts)
    chosen = {0, len(cuts) - 1}
    total = cuts[-1].n_macs
    for step in range(1, limit - 1):
        wanted = total * step / (limit - 1)
        free = [i for i in range(len(cuts)) if i not in chosen]
        chosen.add(min(free, key=lambda i: (abs(cuts[i].n_macs - wanted), i)))
    return tuple(cuts[i] for i in sorted(chosen))


# ----------------------------------------------------------------------------------------------------------------- head


def find_head(recording: Recording) -> Head:
    """The layer that makes the logits, and the features that it reads.

    Walks from the logits back to the last operations that multiply and add. If that is one layer, its input are the
    features. If there are several (a distilled ViT averages two heads), the features are the deepest cut point with
    no such operation between it and them. Where there is none either (heads on several branches or stages), the
    logits stand in for the features.

    Raises:
        InputError: no operation of the network multiplies and adds; the message lists the deepest cut points.
    """
    cuts = cut_points(recording)
    layers = _last_layers(recording)
    if not layers:
        raise InputError(
            "model: no classifier head found, that is, no linear layer whose output becomes the logits; the deepest "
            f"cut points are {', '.join(cut.name for cut in cuts[-5:])}"
        )
    read = {n.name for layer in layers for n in layer.all_input_nodes if info(n).from_input}
    n_macs, n_params = costs_before([recording.output])[0]
    n_macs_of_features = n_macs - sum(info(layer).n_macs for layer in layers)
    found = [cut for cut in cuts[1:] if len(read) == 1 and cut.name in read]
    found = found or [cut for cut in cuts[1:] if cut.n_macs == n_macs_of_features]
    if not found:
        logits = recording.output.name, len(cuts), info(recording.output).scope
        return _head(recording, CutPoint(*logits, "vector", (recording.n_classes,), 1, 0, n_macs, n_params), None)
    module = str(layers[0].target) if len(layers) == 1 and layers[0].op == "call_module" else None
    return _head(recording, found[-1], module)


def _head(recording: Recording, features: CutPoint, module: str | None) -> Head:
    return Head(features, module, features.n_channels, *_affine_map(recording, features, module))


def _last_layers(recording: Recording) -> list[fx.Node]:
    """The operations with multiply-accumulates that reach the output through none other."""
    needs = needs_of(recording.module.graph)
    found: list[fx.Node] = []
    seen: set[fx.Node] = set()
    todo = [recording.output]
    while todo:
        node = todo.pop()
        if node not in seen and info(node).from_input:
            seen.add(node)
            if info(node).n_macs:
                found.append(node)
            else:
                todo.extend(needs[node])
    return found


def _affine_map(recording: Recording, features: CutPoint, module: str | None) -> tuple[Tensor | None, Tensor | None]:
    """The layer's weight and bias if logits = mean features @ weight.T + bias, tried on noise; else (None, None)."""
    layer = None if module is None else recording.module.get_submodule(module)
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(weight, Tensor) or weight.numel() != recording.n_classes * features.n_channels:
        return None, None
    weight = weight.detach().reshape(recording.n_classes, features.n_channels)
    bias = bias.detach() if isinstance(bias, Tensor) else None
    noise = torch.randn((2, *features.shape), generator=torch.Generator().manual_seed(0)).to(weight)
    pooled = noise.movedim(features.channel_dim, 1).flatten(2).mean(2) if noise.dim() > 2 else noise
    expected = nn.functional.linear(pooled, weight, bias)
    with torch.no_grad():
        found = extract(recording, features, [LOGITS])(noise)
    # Another order of summation: rounding grows with the root of the number of terms.
    tolerance = 8 * torch.finfo(weight.dtype).eps * features.n_channels**0.5 * expected.abs().max()
    return (weight, bias) if (found - expected).abs().max() <= tolerance else (None, None)


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
