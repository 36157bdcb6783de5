"""Running means of BatchNorm layers."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pnc.graph.cut_points import CutPoint
from pnc.graph.nodes import info
from pnc.graph.recording import Recording


@dataclass(frozen=True, eq=False)
class RememberedMean:
    """A BatchNorm layer's running mean of its input.

    Attributes:
        cut: The input: a map (B, C, H, W) or a vector (B, C). Usually not a cut point, because other tensors bypass it.
        mean: Mean over training images and positions, (C,), float32 on the CPU.
    """

    cut: CutPoint
    mean: Tensor


def last_norm(recording: Recording) -> RememberedMean | None:
    """Find the last BatchNorm layer with running statistics between images and logits; None if there is none."""
    graph = recording.module.graph
    for index, node in reversed(list(enumerate(graph.nodes))):
        layer = recording.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, _BatchNorm) or layer.running_mean is None or not info(node).from_input:
            continue
        (made_by,) = node.all_input_nodes
        shape = info(made_by).shape or ()
        if len(shape) not in (2, 4):
            continue
        place = made_by.name, index, info(made_by).scope
        cut = CutPoint(*place, "map" if len(shape) == 4 else "vector", tuple(shape[1:]), 1, 0, 0, 0)
        return RememberedMean(cut, layer.running_mean.detach().float().cpu())
    return None
