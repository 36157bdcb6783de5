"""Where a network can be cut in two: cut points as data, the classifier's head, and the parts themselves."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from pnc.errors import InputError
from pnc.graph import Recording
from pnc.segments import costs_before, dominators, needs_of, subgraph
from pnc.tracing import info, operation_name

INPUT = "input"
"""Name of the cut point in front of everything."""

LOGITS = "logits"
"""Names the network's output in `extract`."""

_KINDS: dict[int, Literal["map", "tokens", "vector"]] = {2: "vector", 3: "tokens", 4: "map"}
_CONVOLUTIONS = ("conv1d", "conv2d", "conv_transpose2d")


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
        n_prefix_tokens: Class, distillation or register tokens in front of the tokens of the image.
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
    channel_dims, prefix_tokens = _channel_dims(recording), _prefix_tokens(recording.module.graph)
    found: list[CutPoint] = []
    for node, costs in zip(nodes, costs_before(nodes), strict=True):
        shape = info(node).shape or ()
        kind = _KINDS.get(len(shape))
        channel_dim = channel_dims.get(node, 2 if kind == "tokens" else 1)
        if kind is None or (kind == "map" and not _is_map(shape, channel_dim, recording.input_shape)):
            continue
        n_prefix_tokens = prefix_tokens.get(node, 0) if kind == "tokens" else 0
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
        after: Name of the cut point in front.
        before: Name of the one behind; `LOGITS` for the output.
    """

    share: float
    after: str
    before: str


def largest_gap(recording: Recording) -> Gap:
    """Find the largest part of a network that has no cut point inside, by MACs."""
    total = sum(info(node).n_macs for node in recording.module.graph.nodes)
    places = [*((cut.name, cut.n_macs) for cut in cut_points(recording)), (LOGITS, total)]
    gaps = [Gap((high - low) / max(total, 1), a, b) for (a, low), (b, high) in itertools.pairwise(places)]
    return max(gaps, key=lambda gap: gap.share)


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


def _channel_dims(recording: Recording) -> dict[fx.Node, int]:
    """Where each tensor has its channels, followed from the layers that define it; unknown ones are left out."""
    module = recording.module
    nodes = [n for n in module.graph.nodes if info(n).from_input and info(n).shape is not None]
    dims = {recording.input: 1}
    for node in nodes:
        defined = _defined_channel_dim(module, node)
        carried = (_carried(module, node, source, dims) for source in node.all_input_nodes)
        dim = defined if defined is not None else next((d for d in carried if d is not None), None)
        if dim is not None:
            dims[node] = dim
    for node in reversed(nodes):  # what no layer before it has defined, a layer that reads it may
        read_by = [d for user in node.users if (d := _defined_channel_dim(module, user)) is not None]
        if node not in dims and read_by:
            dims[node] = read_by[0]
    return dims


def _defined_channel_dim(module: fx.GraphModule, node: fx.Node) -> int | None:
    """Where a linear layer or a convolution puts its channels."""
    layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    name = operation_name(node.target)
    if isinstance(layer, nn.Linear) or name == "linear":
        return len(info(node).shape or ()) - 1
    return 1 if isinstance(layer, _ConvNd) or name in _CONVOLUTIONS else None


def _carried(module: fx.GraphModule, node: fx.Node, source: fx.Node, dims: dict[fx.Node, int]) -> int | None:
    """The channel dimension of a node's result, given that of one of its arguments."""
    shape, before = info(node).shape, info(source).shape
    dim = dims.get(source)
    if shape is None or before is None or dim is None:
        return None
    name, numbers = operation_name(node.target), _numbers(node.args[1:]) or _numbers(tuple(node.kwargs.values()))
    if node.op == "call_module":  # torchvision's Permute is a module with the order in `dims`
        numbers = _numbers(getattr(module.get_submodule(name), "dims", None))
    if len(numbers) == len(shape) and (name == "permute" or node.op == "call_module"):
        return [number % len(shape) for number in numbers].index(dim)
    if len(numbers) == 2 and name in ("transpose", "swapaxes", "swapdims"):
        a, b = (number % len(shape) for number in numbers)
        return {a: b, b: a}.get(dim, dim)
    if len(shape) == len(before):
        return dim if shape[dim] == before[dim] or name in ("cat", "getitem", "__getitem__") else None
    if dim == 1 and len(shape) > 1 and shape[1] == before[1]:
        return 1
    return len(shape) - 1 if dim == len(before) - 1 and shape[-1] == before[-1] else None


def _numbers(args: object) -> list[int]:
    """The integers in the arguments, whether given one by one or as one tuple."""
    if isinstance(args, int):
        return [args]
    return [n for part in args for n in _numbers(part)] if isinstance(args, (tuple, list)) else []


def _prefix_tokens(graph: fx.Graph) -> dict[fx.Node, int]:
    """How many tokens that do not come from the image stand in front, for tensors (B, N, D)."""
    counts: dict[fx.Node, int] = {}
    for node in graph.nodes:
        shape = info(node).shape
        if shape is None or len(shape) != 3:
            continue
        name, first = operation_name(node.target), node.args[0] if node.args else None
        if not info(node).from_input:
            counts[node] = shape[1]  # class tokens, in case they are put in front of others
        elif name in ("cat", "concat", "concatenate") and isinstance(first, (tuple, list)):
            counts[node] = _leading_tokens(first, counts)
        elif name in ("getitem", "__getitem__") and isinstance(first, fx.Node):
            counts[node] = _sliced_tokens(node.args[1], counts.get(first, 0), (info(first).shape or (0, 0))[1])
        else:
            same = [n for n in node.all_input_nodes if info(n).from_input and (info(n).shape or ())[1:2] == shape[1:2]]
            counts[node] = max((counts.get(n, 0) for n in same), default=0)
    return counts


def _leading_tokens(parts: Sequence[object], counts: dict[fx.Node, int]) -> int:
    """Prefix tokens of concatenated parts: those of the first, and of the next where the first has no others."""
    total = 0
    for part in parts:
        if not isinstance(part, fx.Node) or part not in counts:
            break
        total += counts[part]
        if counts[part] < (info(part).shape or (0, 0))[1]:
            break
    return total


def _sliced_tokens(index: object, count: int, n_tokens: int) -> int:
    """How many of the first `count` of `n_tokens` tokens an index expression keeps in front."""
    tokens = index[1] if isinstance(index, (tuple, list)) and len(index) > 1 else slice(None)
    if not isinstance(tokens, slice) or not all(isinstance(n, int | None) for n in (tokens.start, tokens.stop)):
        return 0
    return len(range(n_tokens)[tokens.start : tokens.stop][: max(0, count - (tokens.start or 0))])


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
