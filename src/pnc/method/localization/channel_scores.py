"""One-shot localization: scores which channels of a segment matter for the images of the support.

Each method gives a score per unit (`taylor_scores`, `magnitude_scores`, `random_scores`); `one_shot_ranking` makes them
comparable between all units of a segment, and `masks_within` keeps the best ones within a budget.
"""

from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from pnc.channels.channel_spaces import KEPT, Channels, ChannelSpaces
from pnc.channels.mac_budget import Costs
from pnc.channels.module_inlining import opened
from pnc.channels.module_probes import owned_tensor
from pnc.foundation.errors import InputError
from pnc.graph.nodes import BATCH_SIZES, batch_dims, shape_of

OneShot = Literal["taylor", "magnitude", "random"]

N_PROJECTIONS = 4
"""Random directions of the output along which `taylor_scores` measures."""

_BATCH = 32


def one_shot_ranking(
    segment: fx.GraphModule,
    costs: Costs,
    inputs: Tensor,
    generator: torch.Generator,
    method: OneShot = "taylor",
) -> dict[str, Tensor]:
    """Rank the units of a segment for `masks_within`.

    Args:
        segment: The part of the source.
        costs: Its costs.
        inputs: Its inputs for the support, (N, ...).
        generator: For "random" and "taylor".
        method: "taylor": effect on the output for these inputs, to first order, per multiply-accumulate; "magnitude":
            size of the weights; "random": the baseline, uniform over all units.
    Returns:
        Space name -> ranks (size,), float64.
    """
    spaces = costs.spaces
    if method == "taylor":
        scores = taylor_scores(segment, spaces, inputs, generator)
        prices = by_space(spaces, costs.prices())
        return {name: of_space / prices[name] for name, of_space in scores.items()}
    if method == "magnitude":
        return magnitude_scores(segment, spaces)
    return random_scores(spaces, generator)


def taylor_scores(
    segment: fx.GraphModule, spaces: ChannelSpaces, inputs: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Estimate the effect of removing each unit on the output, to first order.

    Each unit has a gate of 1 wherever it is read. The effect is the expected squared change of the output, the sum over
    samples of |d output / d gate|^2, estimated along random directions of the output.

    Args:
        segment: The part of the source.
        spaces: Its channel spaces.
        inputs: Its inputs, (N, ...).
        generator: Draws the random directions.
    Returns:
        Space name -> scores (size,), float64, non-negative.
    Raises:
        InputError: the inputs do not fit the segment.
    Source: after Molchanov et al., 2017 (arXiv:1611.06440). Deviations: the output replaces their loss, which is at a
    minimum here and has no gradient; `one_shot_ranking` divides by the price in MACs instead of normalising by layer.
    """
    _check_inputs(segment, inputs)
    if not spaces.spaces:
        return {}
    gated = Gated(opened(segment), spaces)
    total = torch.zeros(spaces.n_units, dtype=torch.float64)
    for rows in torch.arange(len(inputs)).split(_BATCH):
        gates = torch.ones(len(rows), spaces.n_units, dtype=inputs.dtype, device=inputs.device, requires_grad=True)
        with torch.enable_grad():
            out = gated.run_with(inputs[rows].detach(), gates)
            for left in reversed(range(N_PROJECTIONS)):
                direction = torch.randn(out.shape, generator=generator, dtype=out.dtype).to(out.device)
                (gradient,) = torch.autograd.grad(out, gates, direction, retain_graph=left > 0)
                total += gradient.detach().double().square().sum(0).cpu() / N_PROJECTIONS
    return by_space(spaces, total)


def magnitude_scores(segment: fx.GraphModule, spaces: ChannelSpaces) -> dict[str, Tensor]:
    """Measure each unit's weights: L2 norm of the producers' rows, times the scale of the norms behind them.

    Sizes are relative to the mean of their space, since scales differ between layers for other reasons.

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
    return by_space(spaces, size)


def random_scores(spaces: ChannelSpaces, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw scores with which `masks_within` drops units uniformly; space name -> (size,), float64."""
    return by_space(spaces, torch.rand(spaces.n_units, generator=generator, dtype=torch.float64))


# --------------------------------------------------------------------------------------------------------- gates


class Gated(fx.Interpreter):
    """Runs a segment with a factor on every unit, wherever it is read (`ChannelSpaces.reads`).

    Args:
        segment: The segment of `spaces`, opened.
        spaces: Its channel spaces.
    Raises:
        InputError: the images' values choose the rows of a tensor, so that no row belongs to a known sample.
    """

    def __init__(self, segment: fx.GraphModule, spaces: ChannelSpaces) -> None:
        super().__init__(segment)
        read = {source for _, source in spaces.reads}
        chosen = [node.name for node in segment.graph.nodes if node.name in read and not batch_dims(node)]
        if chosen:
            raise InputError(
                "density: channels cannot be chosen by gradient, as the values of the images choose the rows of "
                f"{chosen[0]}; give density=1, or effort='seconds'"
            )
        self._spaces, self._reads = spaces, set(spaces.reads)
        self._gates = torch.empty(0)

    def run_with(self, inputs: Tensor, gates: Tensor) -> Tensor:
        """Return the outputs for inputs (B, ...) and factors of the units: per sample (B, n_units), or (n_units,)."""
        self._gates = F.pad(gates, (0, 1), value=1.0)  # the last one is for KEPT, which is -1
        out: Tensor = self.run(inputs)
        return out

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; its inputs are scaled for this node only."""
        values = {source: self.env[source] for source in n.all_input_nodes if (n.name, source.name) in self._reads}
        for source, value in values.items():
            self.env[source] = value * self._factors(source, self._spaces.nodes[source.name])
        try:
            return super().run_node(n)
        finally:
            self.env.update(values)

    def _factors(self, node: fx.Node, channels: Channels) -> Tensor:
        """Return the gates in a shape that broadcasts to a node's tensor along batch and channels."""
        factors = self._gates[..., channels.units.to(self._gates.device)]  # (size,) or (B, size)
        shape = [1] * len(shape_of(node))
        shape[channels.dim] = len(channels.units)
        if factors.dim() == 1:
            return factors.reshape(shape)
        batch = batch_dims(node)[0]
        # If windows or tokens are folded into the batch, those of a sample are contiguous.
        factors = factors.repeat_interleave(shape_of(node)[batch] // BATCH_SIZES[0], 0)
        shape[batch] = len(factors)
        return (factors if batch < channels.dim else factors.T).reshape(shape)


def by_space(spaces: ChannelSpaces, flat: Tensor) -> dict[str, Tensor]:
    """Split values of all units, (n_units,), into copies by space name."""
    return {space.name: flat[space.start : space.start + space.size].clone() for space in spaces.spaces}


def _check_inputs(segment: fx.GraphModule, inputs: Tensor) -> None:
    given = next(node for node in segment.graph.nodes if node.op == "placeholder")
    expected = shape_of(given)[1:]
    if tuple(inputs.shape[1:]) != expected or len(inputs) == 0 or not inputs.is_floating_point():
        raise InputError(
            f"inputs: expected a floating-point batch (N, {', '.join(map(str, expected))}) with N >= 1, "
            f"got {inputs.dtype} {tuple(inputs.shape)}"
        )
