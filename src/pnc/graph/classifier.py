"""The classifier of a network: its last linear layer, and the features that it reads."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from pnc.foundation.errors import InputError
from pnc.graph.cut_points import LOGITS, CutPoint, cut_points, extract
from pnc.graph.nodes import info
from pnc.graph.recording import Recording
from pnc.graph.subgraphs import costs_before, needs_of


@dataclass(frozen=True, eq=False)
class ClassifierLayer:
    """The layer that turns features into logits.

    Attributes:
        features: Input of the last linear layer: a vector, or a map or tokens if the head pools afterwards; see
            `find_head` for heads of several layers.
        module: Qualified name of the layer; None if there are several or it is not a module.
        n_features: Number of channels of the features.
        weight: (K, n_features); None unless logits = mean of the features over their positions @ weight.T + bias.
        bias: (K,); None if `weight` is None, or the layer has no bias.
    """

    features: CutPoint
    module: str | None
    n_features: int
    weight: Tensor | None
    bias: Tensor | None


def find_head(recording: Recording) -> ClassifierLayer:
    """Find the layer that computes the logits, and the features that it reads.

    The search goes from the logits back to the last operations with multiply-accumulates. If that is one layer, its
    input is the features. If there are several (a distilled ViT averages two heads), the features are the deepest cut
    point before them without such an operation in between. If there is none (heads on several branches or stages), the
    logits take the place of the features.

    Raises:
        InputError: the network has no operation with multiply-accumulates; the message lists the deepest cut points.
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


def _head(recording: Recording, features: CutPoint, module: str | None) -> ClassifierLayer:
    return ClassifierLayer(features, module, features.n_channels, *_affine_map(recording, features, module))


def _last_layers(recording: Recording) -> list[fx.Node]:
    """The operations with multiply-accumulates from which the output is reached without passing another one."""
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
    """The layer's weight and bias if logits = mean features @ weight.T + bias (tested on noise); else (None, None)."""
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
    # The order of summation differs: the rounding error grows with the square root of the number of terms.
    tolerance = 8 * torch.finfo(weight.dtype).eps * features.n_channels**0.5 * expected.abs().max()
    return (weight, bias) if (found - expected).abs().max() <= tolerance else (None, None)
