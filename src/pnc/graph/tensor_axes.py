"""The meaning of dims in a recorded network: which one is the channels, and which tokens are not the image's."""

from collections.abc import Mapping, Sequence

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from pnc.graph.nodes import info, operation_name
from pnc.graph.recording import Recording

_CONVOLUTIONS = ("conv1d", "conv2d", "conv_transpose2d")


def channel_dims(recording: Recording) -> dict[fx.Node, int]:
    """Channel dim of each tensor, derived from the layers that define it; tensors without a known one are left out."""
    nodes = [n for n in recording.module.graph.nodes if info(n).from_input and info(n).shape is not None]
    modules = dict(recording.module.named_modules(remove_duplicate=False))
    dims = {recording.input: 1}
    for node in nodes:
        defined = _defined_channel_dim(modules, node)
        carried = (_carried(modules, node, source, dims) for source in node.all_input_nodes)
        dim = defined if defined is not None else next((d for d in carried if d is not None), None)
        if dim is not None:
            dims[node] = dim
    for node in reversed(nodes):  # if no layer before a tensor defines its dim, one that reads it may
        read_by = [d for user in node.users if (d := _defined_channel_dim(modules, user)) is not None]
        if node not in dims and read_by:
            dims[node] = read_by[0]
    return dims


def _defined_channel_dim(modules: Mapping[str, nn.Module], node: fx.Node) -> int | None:
    """Channel dim of the output of a linear layer or convolution; None for other nodes."""
    layer = modules[str(node.target)] if node.op == "call_module" else None
    name = operation_name(node.target)
    if isinstance(layer, nn.Linear) or name == "linear":
        return len(info(node).shape or ()) - 1
    return 1 if isinstance(layer, _ConvNd) or name in _CONVOLUTIONS else None


def _carried(
    modules: Mapping[str, nn.Module], node: fx.Node, source: fx.Node, dims: Mapping[fx.Node, int]
) -> int | None:
    """Channel dim of a node's result, given that of one of its arguments."""
    shape, before = info(node).shape, info(source).shape
    dim = dims.get(source)
    if not shape or before is None or dim is None:
        return None
    name, numbers = operation_name(node.target), _numbers(node.args[1:]) or _numbers(tuple(node.kwargs.values()))
    if node.op == "call_module":  # torchvision's Permute has its order in `dims`
        numbers = _numbers(getattr(modules[name], "dims", None))
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
    """The integers in arguments, whether given one by one or as a tuple."""
    if isinstance(args, int):
        return [args]
    return [n for part in args for n in _numbers(part)] if isinstance(args, (tuple, list)) else []


def prefix_tokens(graph: fx.Graph) -> dict[fx.Node, int]:
    """Number of leading tokens that do not come from the image, for tensors (B, N, D)."""
    counts: dict[fx.Node, int] = {}
    for node in graph.nodes:
        shape = info(node).shape
        if shape is None or len(shape) != 3:
            continue
        name, first = operation_name(node.target), node.args[0] if node.args else None
        if not info(node).from_input:
            counts[node] = shape[1]  # class tokens, if concatenated with others later
        elif name in ("cat", "concat", "concatenate") and isinstance(first, (tuple, list)):
            counts[node] = _leading_tokens(first, counts)
        elif name in ("getitem", "__getitem__") and isinstance(first, fx.Node):
            counts[node] = _sliced_tokens(node.args[1], counts.get(first, 0), (info(first).shape or (0, 0))[1])
        else:
            same = [n for n in node.all_input_nodes if info(n).from_input and (info(n).shape or ())[1:2] == shape[1:2]]
            counts[node] = max((counts.get(n, 0) for n in same), default=0)
    return counts


def _leading_tokens(parts: Sequence[object], counts: dict[fx.Node, int]) -> int:
    """Prefix tokens of concatenated parts: those of the first part, and of the next if it has only prefix tokens."""
    total = 0
    for part in parts:
        if not isinstance(part, fx.Node) or part not in counts:
            break
        total += counts[part]
        if counts[part] < (info(part).shape or (0, 0))[1]:
            break
    return total


def _sliced_tokens(index: object, count: int, n_tokens: int) -> int:
    """How many of the first `count` of `n_tokens` tokens an index expression keeps."""
    tokens = index[1] if isinstance(index, (tuple, list)) and len(index) > 1 else slice(None)
    if not isinstance(tokens, slice) or not all(isinstance(n, int | None) for n in (tokens.start, tokens.stop)):
        return 0
    return len(range(n_tokens)[tokens.start : tokens.stop][: max(0, count - (tokens.start or 0))])
