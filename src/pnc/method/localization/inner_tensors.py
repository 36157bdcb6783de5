"""Tensors inside a part of the source, and how far they are from the source's own: a guide for tuning."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from pnc.channels.channel_masks import ChannelMasks
from pnc.channels.channel_spaces import Channels, channel_spaces
from pnc.channels.compaction import kept_flags, own_copy
from pnc.data.image_store import Images
from pnc.graph.candidate_cuts import candidate_cuts
from pnc.graph.cut_points import CutPoint
from pnc.graph.nodes import info
from pnc.method.held_out import source_body
from pnc.method.localization.aim import Aim, Answers
from pnc.method.source_part import SourcePart
from pnc.method.task import CloneTask

N_CUTS = 3
"""At most this many cut points, spread evenly over a part's multiply-accumulates; the last is at its end."""
N_IMAGES, BATCH_SIZE = 256, 32
"""At most this many images for the variances, and how many are run at a time."""


class InnerTensors:
    """Tensors at cut points inside a part of the source, to be compared with the source's own.

    A part that has lost channels is compared on those that it keeps. If only some of the source's classes are cloned,
    nothing is compared: the part should forget the others, inside too.

    Args:
        task: Gives the source, and images for the variances.
        start: Cut point of the source where the part begins.
        part: From `localize`; not changed.

    Attributes:
        module: The part with its own tensors; it returns its output and the inner tensors.
        aim: The part's aim; its answers hold the source's inner tensors.
    """

    def __init__(self, task: CloneTask, start: CutPoint, part: SourcePart) -> None:
        cuts = candidate_cuts(task.source.recording, N_CUTS + 1, start)[1:] if task.clones_all else ()
        left = kept_channels(source_body(task, start), part.masks, cuts)
        self.module, found = with_inner_outputs(part.module, cuts, left)
        self._left = [left.get(cut.name) for cut in found]
        self.aim = Aim(task, found)
        self._variances = self._measured(task.samples.images)

    def distance(self, found: Sequence[Tensor], wanted: Answers, n: int) -> Tensor:
        """Return the squared distance in units of the variance, the mean over cut points and a batch of n images.

        Args:
            found: The part's inner tensors, for some images of the batch.
            wanted: The source's answers to the same images.
            n: Size of the batch; the distances of all its images add up.
        """
        pairs = zip(found, self._on_kept(wanted), self._variances, strict=True)
        total = wanted.logits.new_zeros(())
        for one, other, variance in pairs:
            total = total + (one.float() - other).square().mean() / variance
        return total * (len(wanted.logits) / n / max(1, len(found)))

    def _measured(self, images: Images) -> list[float]:
        """Return the variances of the source's inner tensors; they are large, so a few images are run at a time."""
        rows = torch.arange(0, len(images), -(-len(images) // N_IMAGES))
        sums = torch.zeros(3, len(self._left), dtype=torch.float64)
        for some in rows.split(BATCH_SIZE):
            for place, tensor in enumerate(self._on_kept(self.aim.answers(images[some]))):
                both = tensor.sum(dtype=torch.float64), tensor.square().sum(dtype=torch.float64)
                sums[:, place] += torch.tensor([*map(float, both), tensor.numel()], dtype=torch.float64)
        mean, square = sums[:2] / sums[2]
        return [max(float(variance), 1e-12) for variance in square - mean.square()]

    def _on_kept(self, answers: Answers) -> list[Tensor]:
        return [_select(tensor, left) for tensor, left in zip(answers.inner, self._left, strict=True)]


def kept_channels(whole: fx.GraphModule, masks: ChannelMasks | None, cuts: Sequence[CutPoint]) -> dict[str, Channels]:
    """Where the channels that masks keep lie in a segment's tensors at cut points; those that keep all are missing."""
    if masks is None:
        return {}
    spaces = channel_spaces(whole)
    flags = kept_flags(spaces, masks)
    found = {cut.name: spaces.nodes[cut.name] for cut in cuts if cut.name in spaces.nodes}
    return {name: Channels(one.dim, flags[one.units].nonzero().flatten()) for name, one in found.items()}


def with_inner_outputs(
    part: fx.GraphModule, cuts: Sequence[CutPoint], left: dict[str, Channels]
) -> tuple[fx.GraphModule, list[CutPoint]]:
    """Copy a part so that it returns a tuple: its output and its tensors at cut points.

    Args:
        part: Whole or compacted.
        cuts: Cut points; those that the part does not compute are left out.
        left: From `kept_channels`.
    Returns:
        The copy, and the cut points whose tensors it returns.
    """
    module = own_copy(part)
    nodes = {node.name: node for node in module.graph.nodes if node.op not in ("placeholder", "output")}
    found, inner = [], []
    for cut in cuts:
        shape = list(cut.shape)
        if (channels := left.get(cut.name)) is not None:
            shape[channels.dim - 1] = len(channels.units)
        node = nodes.get(cut.name)
        if node is None or list((info(node).shape or ())[1:]) != shape:
            continue  # a part's nodes have the source's names, except where they would name two nodes
        with module.graph.inserting_after(node):  # a copy, since later operations may write to the tensor
            inner.append(module.graph.call_method("clone", (node,)))
        found.append(cut)
    output = next(node for node in module.graph.nodes if node.op == "output")
    output.args = ((output.args[0], *inner),)
    module.graph.lint()
    module.recompile()
    return module, found


def _select(tensor: Tensor, left: Channels | None) -> Tensor:
    return tensor if left is None else tensor.index_select(left.dim, left.units.to(tensor.device))
