"""The trunk that two recorded networks share: the same operations on the same weights, as after one pretraining.

Compared are operations, their settings and the bits of their weights, not tensors of some images: what is equal here is
equal for every image.
"""

import hashlib

from torch import Tensor, fx

from pnc.foundation.tensor_bits import value_digests
from pnc.graph.classifier import find_head
from pnc.graph.cut_points import INPUT, CutPoint, cut_points
from pnc.graph.forward_prints import described
from pnc.graph.recording import Recording

UNUSED = "num_batches_tracked"
"""A buffer of BatchNorm that plays no part in eval mode."""


def shared_cut(target: Recording, source: Recording) -> tuple[CutPoint, CutPoint]:
    """The last cut before the features at which both networks have the same tensor, whatever the images.

    Args:
        target: One network.
        source: The other one, for images of the same shape.
    Returns:
        The cut in each network; the inputs, if all that the networks share has no multiply-accumulates, such as a
        normalization.
    """
    cuts = [cut_points(recording)[: find_head(recording).features.index] for recording in (target, source)]
    in_target, in_source = (
        dict(zip(_keys(recording, some), some, strict=True))
        for recording, some in zip((target, source), cuts, strict=True)
    )
    for key, cut in reversed(in_source.items()):
        if cut.n_macs > 0 and key in in_target and in_target[key].is_alike(cut):
            return in_target[key], cut
    return cuts[0][0], cuts[1][0]


def _keys(recording: Recording, cuts: tuple[CutPoint, ...]) -> list[str]:
    """For each cut, a digest of everything that its tensor is computed by."""
    module = recording.module
    last = cuts[-1].name
    keys: dict[fx.Node, str] = {}
    for node in module.graph.nodes:
        kind = type(module.get_submodule(str(node.target))) if node.op == "call_module" else None
        line = f"{kind} {described(node, module, keys, _digest)}"
        keys[node] = hashlib.sha256(line.encode()).hexdigest()
        if node.name == last:
            break
    by_name = {node.name: key for node, key in keys.items()}
    by_name[INPUT] = keys[recording.input]
    return [by_name[cut.name] for cut in cuts]


def _digest(name: str, tensor: Tensor) -> str:
    if name.rpartition(".")[2] == UNUSED:
        return name
    return f"{tuple(tensor.shape)} {tensor.dtype} {value_digests([tensor])[0]}"
