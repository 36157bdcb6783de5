"""Localization, one-shot forms: which channels of a segment serve the images that are to be cloned.

Each method gives a score per unit (`taylor_scores`, `magnitude_scores`, `random_scores`); `localize` ranks all units of
a segment together and keeps the best ones within a budget of multiply-accumulates.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pnc.budgets import Costs, masks_within
from pnc.channels import KEPT, Channels, ChannelSpaces
from pnc.errors import InputError
from pnc.leaf_probes import owned_tensor
from pnc.masks import ChannelMasks
from pnc.nodes import batch_dims, shape_of
from pnc.opening import opened
from pnc.tracing import BATCH_SIZES

Method = Literal["taylor", "magnitude", "random"]

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs of the segment (B, ...), indices of these samples among the inputs (B,)) -> loss per sample (B,)."""

N_PROJECTIONS = 4
"""Random directions of the output along which `taylor_scores` measures where there is no loss."""

_BATCH = 32


def localize(
    segment: fx.GraphModule,
    spaces: ChannelSpaces,
    inputs: Tensor,
    density: float,
    generator: torch.Generator,
    *,
    method: Method = "taylor",
    loss: Loss | None = None,
    round_to: int = 1,
) -> ChannelMasks:
    """Choose which channels of a segment to keep for some inputs.

    Eight arguments: what is cut, for which images, how much, and by which rule.

    Args:
        segment: The part of the source that would be cloned.
        spaces: Its channel spaces.
        inputs: What the segment sees of the support, (N, ...).
        density: Share of the prunable multiply-accumulates to keep, in (0, 1]: the most that the compacted segment
            costs, reached as nearly as one unit allows.
        generator: For "random", and for "taylor" without a loss.
        method: "taylor": effect on the output for these inputs, to first order; "magnitude": size of the weights;
            "random": the baseline, uniform over all units.
        loss: What "taylor" measures the effect on; see `taylor_scores`.
        round_to: As in `masks_within`.
    Raises:
        InputError: an unknown method, a density that cannot be met, or inputs that do not fit.
    """
    if not 0 < density <= 1:
        raise InputError(f"density: expected a share in (0, 1], got {density}")
    costs = Costs(segment, spaces)
    if method == "taylor":
        ranking = taylor_scores(segment, spaces, inputs, generator, loss)
        prices = _by_space(spaces, costs.prices())
        ranking = {name: scores / prices[name] for name, scores in ranking.items()}
    elif method == "magnitude":
        ranking = magnitude_scores(segment, spaces)
    elif method == "random":
        ranking = random_scores(spaces, generator)
    else:
        raise InputError(f"method: expected one of {', '.join(get_args(Method))}, got {method!r}")
    return masks_within(costs, ranking, costs.bound(density), round_to)


def taylor_scores(
    segment: fx.GraphModule,
    spaces: ChannelSpaces,
    inputs: Tensor,
    generator: torch.Generator,
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """Effect of removing each unit, to first order, from gradients at gates of 1 on whatever is read of it.

    With a loss: the sum over samples of |d loss / d gate|. Without: the expected squared change of the output,
    sum over samples of |d output / d gate|^2, estimated along random directions of the output. (The distance to the
    output without a mask cannot serve as the loss: at the start it is zero, and so is its gradient.)

    Args:
        inputs: (N, ...).
        generator: Draws the random directions.
        loss: Such as `class_loss`.
    Returns:
        Space name -> scores (size,), float64, non-negative.
    Raises:
        InputError: the inputs do not fit to the segment.
    Source: Molchanov et al., 2017 (arXiv:1611.06440) with a loss; `localize` divides by the price in MACs instead of
    their normalisation by layer.
    """
    _check_inputs(segment, inputs)
    if not spaces.spaces:
        return {}
    segment = opened(segment)
    total = torch.zeros(spaces.n_units, dtype=torch.float64)
    for rows in torch.arange(len(inputs)).split(_BATCH):
        gates = torch.ones(len(rows), spaces.n_units, dtype=inputs.dtype, device=inputs.device, requires_grad=True)
        with torch.enable_grad():
            out = _Gated(segment, spaces, gates).run(inputs[rows].detach())
            if loss is not None:
                (gradient,) = torch.autograd.grad(loss(out, rows).sum(), gates, allow_unused=False)
                total += gradient.detach().abs().double().sum(0).cpu()
                continue
            for left in reversed(range(N_PROJECTIONS)):
                direction = torch.randn(out.shape, generator=generator, dtype=out.dtype).to(out.device)
                (gradient,) = torch.autograd.grad(out, gates, direction, retain_graph=left > 0)
                total += gradient.detach().double().square().sum(0).cpu() / N_PROJECTIONS
    return _by_space(spaces, total)


def class_loss(classify: Callable[[Tensor], Tensor], labels: Tensor) -> Loss:
    """Cross entropy of a classifier behind the segment, as the loss of `taylor_scores`.

    Args:
        classify: Maps the segment's output to logits (B, K): the source's own head, say.
        labels: Class of every input, (N,), in [0, K).
    """

    def loss(outputs: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(classify(outputs), labels[rows.to(labels.device)].to(outputs.device), reduction="none")

    return loss


def magnitude_scores(segment: fx.GraphModule, spaces: ChannelSpaces) -> dict[str, Tensor]:
    """Size of each unit's weights: L2 norm of the producers' rows, times the scale of the norms behind them.

    Sizes are taken relative to the mean of their space, since layers differ in scale for reasons of their own.

    Returns:
        Space name -> scores (size,), float64, non-negative.
    """
    rows = torch.zeros(spaces.n_units, dtype=torch.float64)
    scale = torch.zeros(spaces.n_units, dtype=torch.float64)
    n_scales = torch.zeros(spaces.n_units, dtype=torch.float64)
    for s in spaces.slices:
        if not s.zeroed or s.user or not s.tensor.endswith("weight"):
            continue
        there = s.units != KEPT
        weight = owned_tensor(segment, s.tensor).double().cpu().movedim(s.dim, 0).reshape(s.shape[s.dim], -1)
        if len(s.shape) > 1:
            rows.index_add_(0, s.units[there], weight.square().sum(1)[there])
        else:
            scale.index_add_(0, s.units[there], weight.abs().sum(1)[there])
            n_scales.index_add_(0, s.units[there], torch.ones(int(there.sum()), dtype=torch.float64))
    size = rows.sqrt() * torch.where(n_scales > 0, scale / n_scales.clamp(min=1), 1.0)
    for space in spaces.spaces:
        part = size[space.start : space.start + space.size]
        part /= part.mean().clamp(min=torch.finfo(torch.float64).tiny)
    return _by_space(spaces, size)


def random_scores(spaces: ChannelSpaces, generator: torch.Generator) -> dict[str, Tensor]:
    """Scores that make `masks_within` drop units uniformly; space name -> (size,), float64."""
    return _by_space(spaces, torch.rand(spaces.n_units, generator=generator, dtype=torch.float64))


def reestimate_statistics(segment: fx.GraphModule, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of a segment's BatchNorm layers by those of the given inputs, in place.

    After a mask the old statistics describe features that are no longer there. The mean over batches is kept
    (`momentum=None`), and every layer goes back to evaluation mode. Only for segments of one's own, such as what
    `compact` and `mask_segment` return.

    Args:
        segment: Changed in its BatchNorm buffers only.
        batches: Inputs (B, ...), B >= 2.
    Raises:
        InputError: no batch, or one of a single sample.
    """
    layers = [m for m in segment.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    n_batches = 0
    with _averaging(layers), torch.no_grad():
        for batch in batches:
            if len(batch) < 2:
                raise InputError("batches: statistics need at least 2 samples per batch, got a batch of 1")
            segment(batch)
            n_batches += 1
    if n_batches == 0:
        raise InputError("batches: expected at least one batch of inputs, got none")


@contextlib.contextmanager
def _averaging(layers: list[_BatchNorm]) -> Iterator[None]:
    """Let BatchNorm layers collect the mean of their batches' statistics; flags and momentum come back.

    After an error the statistics come back too.
    """
    before = [(layer.training, layer.momentum) for layer in layers]
    statistics = [{name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)} for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.training, layer.momentum = True, None
        yield
    except BaseException:
        for layer, saved in zip(layers, statistics, strict=True):
            for name, buffer in saved.items():
                layer.get_buffer(name).copy_(buffer)
        raise
    finally:
        for layer, (training, momentum) in zip(layers, before, strict=True):
            layer.training, layer.momentum = training, momentum


# --------------------------------------------------------------------------------------------------------- gates


class _Gated(fx.Interpreter):
    """Runs a segment with a factor on every unit, one per sample, wherever units are read (`ChannelSpaces.reads`)."""

    def __init__(self, segment: fx.GraphModule, spaces: ChannelSpaces, gates: Tensor) -> None:
        super().__init__(segment)
        self._spaces, self._reads = spaces, set(spaces.reads)
        self._gates = F.pad(gates, (0, 1), value=1.0)  # the last one for KEPT, -1

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; what it reads is scaled for this node only."""
        values = {source: self.env[source] for source in n.all_input_nodes if (n.name, source.name) in self._reads}
        for source, value in values.items():
            self.env[source] = value * self._factors(source, self._spaces.nodes[source.name])
        try:
            return super().run_node(n)
        finally:
            self.env.update(values)

    def _factors(self, node: fx.Node, channels: Channels) -> Tensor:
        """The gates in the shape of a node's tensor: 1 everywhere but along the batch and the channels."""
        factors = self._gates[:, channels.units.to(self._gates.device)]  # (B, size)
        shape = [1] * len(shape_of(node))
        batch = batch_dims(node)[0]
        # Windows or tokens folded into the batch: those of a sample follow each other.
        factors = factors.repeat_interleave(shape_of(node)[batch] // BATCH_SIZES[0], 0)
        shape[batch], shape[channels.dim] = factors.shape
        return (factors if batch < channels.dim else factors.T).reshape(shape)


def _by_space(spaces: ChannelSpaces, flat: Tensor) -> dict[str, Tensor]:
    return {space.name: flat[space.start : space.start + space.size].clone() for space in spaces.spaces}


def _check_inputs(segment: fx.GraphModule, inputs: Tensor) -> None:
    given = next(node for node in segment.graph.nodes if node.op == "placeholder")
    expected = shape_of(given)[1:]
    if tuple(inputs.shape[1:]) != expected or len(inputs) == 0 or not inputs.is_floating_point():
        raise InputError(
            f"inputs: expected a floating-point batch (N, {', '.join(map(str, expected))}) with N >= 1, "
            f"got {inputs.dtype} {tuple(inputs.shape)}"
        )
