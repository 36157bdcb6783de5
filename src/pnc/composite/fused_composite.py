"""The inference form of a composite: the same logits from fewer operations, for a fixed set of clones.

The target's computation does not change, bit for bit. In the clones, layers that only scale, shift or mix channels are
folded into their neighbours, and equal work of several clones is merged:

- BatchNorm is folded into the convolution or linear layer before it, which may be the adapter;
- an adapter is folded into the 1x1 convolution or linear layer after it, if they are adjacent and that saves
  multiplications;
- adapters that read the same tensor of the target with the same geometry become one convolution;
- convolutions run channels-last, and later operations overwrite their results if nothing else reads them;
- heads with the same number of classes become one batch of matrices, with their mixing weights folded in.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pnc.clones.adapter import Adapter
from pnc.clones.branch import Branch, against_rivals
from pnc.clones.heads import DiscriminantHead, SourceHead, StackedHead
from pnc.clones.position_grids import from_grid, grid_size, pool, resize, to_grid
from pnc.composite.forward_plan import Plan, check_like
from pnc.composite.layer_folding import FoldedPart, folded_part, grows
from pnc.foundation.errors import InputError, PNCError

TOLERANCE, GPU_TOLERANCE = 1e-4, 1e-2
"""Largest accepted difference of new logits on the probe, relative to the largest: ten times what another order of
summation causes in float32, and far less than a wrong rule would. GPUs may round products to eleven bits (TF32)."""

MAGNIFYING = 1e4
"""Largest weight of a head above which rounding alone may cause such differences."""


class FusedComposite(nn.Module):
    """The result of `Composite.fused`: base logits bit for bit, new ones up to rounding, from fewer operations.

    It shares the target's tensors and has its own copies of the clones'. Its set of clones is fixed. It cannot be moved
    or cast: move or cast the composite, then fuse again.

    Attributes:
        classes: Names of all logits.
    """

    _trunk: fx.GraphModule

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.classes, self._features = plan.classes, plan.features
        self._like = plan.probe.new_empty(0, *plan.probe.shape[1:])
        self._watch = plan.watch
        self.__dict__["_trunk"] = plan.trunk  # unregistered: the target's flags must not be set below
        parts = [folded_part(tap, branch.stitched) for tap, branch in zip(plan.taps, plan.branches, strict=True)]
        self.stems = nn.ModuleList(_stems(parts))
        self.bodies = nn.ModuleList(part.body for part in parts)
        self.heads = nn.ModuleList(_heads(plan))
        self._pooled = tuple(branch.stitched.features for branch in plan.branches)
        self._n_clones = len(parts)
        for module in self.modules():
            module.training = False
        self.requires_grad_(False)
        self._check(plan)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (B, K_base + K_new) for images (B, C, H, W)."""
        check_like(images, self._like)
        self._watch.check()
        made = self._trunk(images)
        if not self._n_clones:
            return cast(Tensor, made)
        *tensors, logits = made
        found: dict[int, Tensor] = {}
        for stem in cast(Iterable[_Stem], self.stems):
            for place, tensor in zip(stem.places, stem(tensors[stem.tap]), strict=True):
                found[place] = pool(self.bodies[place](tensor), self._pooled[place])
        features = tensors[len(tensors) - len(self._features) :]
        pooled = [pool(tensor, cut) for tensor, cut in zip(features, self._features, strict=True)]
        new: dict[int, Tensor] = {}
        for head in cast(Iterable[_Heads], self.heads):
            made = head(pooled[head.view], [found[place] for place in head.places], logits)
            new.update(zip(head.places, made, strict=True))
        return torch.cat([logits, *(new[place] for place in range(self._n_clones))], 1)

    def train(self, mode: bool = True) -> Self:
        """Set the module's own flag only, as running statistics must not move."""
        self.training = mode
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        raise InputError(
            "a fused composite cannot be moved or cast; move or cast the composite itself, then call fused() again"
        )

    @torch.no_grad()
    def _check(self, plan: Plan) -> None:
        probe = plan.probe
        n_base = len(self.classes) - sum(len(branch.offset) for branch in plan.branches)
        expected, found = plan.logits(probe)[:, n_base:].float(), self(probe)[:, n_base:].float()
        if not expected.numel() or probe.element_size() < 4:  # 16-bit rounding would hide an error
            return
        difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
        tolerance = TOLERANCE if probe.device.type == "cpu" else GPU_TOLERANCE
        if not difference <= tolerance * max(scale, 1.0):
            raise PNCError(
                f"the fused form differs from the composite by {difference:.2g} (largest logit {scale:.2g}); "
                f"use the composite itself for now; {_remedy(plan)}"
            )


def _remedy(plan: Plan) -> str:
    """The likely cause of a difference and what to do: large weights of a head magnify rounding."""
    largest = {
        name: max(float(tensor.abs().max()) for tensor in branch.head.buffers() if tensor.numel())
        for name, branch in zip(plan.names, plan.branches, strict=True)
    }
    name = max(largest, key=lambda one: largest[one])
    if largest[name] > MAGNIFYING:
        return (
            f"the head of clone {name!r} has weights up to {largest[name]:.2g}, which magnify rounding, as happens if "
            "the source's features hardly vary; clone it again from a better source"
        )
    return "please report the networks"


# -------------------------------------------------------------------------------------------------------------- stems


class _Stem(nn.Module):
    """Adapters that read the same tensor with the same geometry, as one convolution; or several identities.

    Attributes:
        tap: Index of the trunk's tensor that it reads.
        places: Indices of the clones that it serves, in the order of its results.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, places: Sequence[int], parts: Sequence[FoldedPart]) -> None:
        super().__init__()
        first = parts[0]
        self.tap, self.places, self._stride = first.tap, tuple(places), first.stride
        self._cut, self._size = first.adapter.target_cut, grid_size(first.adapter.source_cut)
        self._padding, self._grows = first.adapter.kernel_size // 2, grows(first.adapter)
        self._sizes = [len(part.adapter.bias) for part in parts]
        self._rectified = [part.adapter.rectify for part in parts]
        self._is_identity = first.adapter.is_identity
        self._channels_last = first.channels_last
        self.register_buffer("weight", torch.cat([part.adapter.weight for part in parts]))
        self.register_buffer("bias", torch.cat([part.adapter.bias for part in parts]))
        self.adapters = nn.ModuleList(part.adapter for part in parts)  # needed for their prefix tokens
        for part in parts:
            part.adapter.weight = part.adapter.weight.new_empty(0)

    def forward(self, tensor: Tensor) -> list[Tensor]:
        """Compute the input of each body from the target's tensor."""
        if self._is_identity:
            return [self._laid_out(tensor)] * len(self.places)
        grid, prefix = to_grid(tensor, self._cut)
        grid = self._laid_out(grid)
        made = grid if self._grows else resize(grid, self._size)
        made = F.conv2d(made, self.weight, self.bias, self._stride, self._padding)
        made = resize(made, self._size) if self._grows else made
        if all(self._rectified):
            made = made.relu_()
        pieces = made.split(self._sizes, 1) if len(self._sizes) > 1 else (made,)
        if any(self._rectified) and not all(self._rectified):
            pieces = [F.relu(one) if flag else one for one, flag in zip(pieces, self._rectified, strict=True)]
        return [
            from_grid(piece, adapter.prefix_tokens(grid, prefix), adapter.source_cut)
            for piece, adapter in zip(pieces, cast(Iterable[Adapter], self.adapters), strict=True)
        ]

    def _laid_out(self, maps: Tensor) -> Tensor:
        """Convert to channels-last if the bodies accept it and there are several images, where it pays."""
        if not self._channels_last or maps.shape[0] == 1:
            return maps
        return maps.contiguous(memory_format=torch.channels_last)


def _stems(parts: Sequence[FoldedPart]) -> list[_Stem]:
    """The smallest set of stems that serves all clones."""
    groups: dict[Any, list[int]] = {}
    for place, part in enumerate(parts):
        adapter = part.adapter
        geometry = grid_size(adapter.source_cut), adapter.kernel_size, part.stride, part.channels_last
        key = part.tap, adapter.is_identity, geometry
        groups.setdefault(key, []).append(place)
    return [_Stem(places, [parts[place] for place in places]) for places in groups.values()]


# -------------------------------------------------------------------------------------------------------------- heads


class _Heads(nn.Module):
    """Heads of clones with the same number of classes, as one batch; calibration and base priority are folded in.

    For each clone, one linear map of both networks' features gives the discriminants of the base classes and of the new
    classes, the source's own logits, and the weighted sum of the last two that ranks the new classes. The logits of the
    new classes are then

        scale * (log_softmax(sum) + w0 * (lse(new) - lse(base)) + w1 * lse(own)) + w2 * level + shift,

    where lse is logsumexp and `level` is that of the target's logits: `heads.StackedHead` with its terms collected. For
    a calibrated clone its term against rivals is added.

    Attributes:
        places: Indices of their clones.
        view: Index of the target's features that they read.
    """

    target_weight: Tensor
    bias: Tensor
    weights: Tensor

    def __init__(self, places: Sequence[int], view: int, rows: Sequence["_Rows"]) -> None:
        super().__init__()
        self.places, self.view, self._n_new = tuple(places), view, len(rows[0].shift)
        self.register_buffer("target_weight", torch.cat([row.target_weight for row in rows]))
        self.register_buffer("bias", torch.stack([row.bias for row in rows]))
        self.register_buffer("weights", torch.stack([row.weights for row in rows]))
        self.register_buffer("shift", torch.stack([row.shift for row in rows]))
        self.clone_weight = nn.ParameterList(row.clone_weight for row in rows)
        self.rivals = nn.ParameterList(row.rivals for row in rows)

    def forward(self, target_features: Tensor, clone_features: Sequence[Tensor], base_logits: Tensor) -> list[Tensor]:
        """New logits of each clone, (B, K_new)."""
        dtype, k = self.bias.dtype, self._n_new
        scores = F.linear(target_features.to(dtype), self.target_weight).unflatten(1, self.bias.shape) + self.bias
        own = [F.linear(one.to(dtype), weight) for one, weight in zip(clone_features, self.clone_weight, strict=True)]
        scores = scores + torch.stack(own, 1)  # (B, clones, rows)
        level = base_logits.to(dtype).logsumexp(1)[:, None, None]
        base = scores[..., : -3 * k].logsumexp(2, keepdim=True)
        terms = [scores[..., -3 * k : -2 * k], scores[..., -2 * k : -k]]
        fitted, theirs = (one.logsumexp(2, keepdim=True) if k > 1 else one for one in terms)
        scale, w0, w1, w2 = self.weights.unbind(1)
        new = w0 * (fitted - base) + w1 * theirs + w2 * level + self.shift
        if k > 1:
            new = new + scale * scores[..., -k:].log_softmax(2)
        each = list(new.unbind(1))
        for place, (one, rivals) in enumerate(zip(clone_features, self.rivals, strict=True)):
            if len(rivals):
                each[place] = each[place] + F.logsigmoid(against_rivals(one, rivals, k))
        return [one.to(base_logits.dtype) for one in each]


@dataclass(frozen=True)
class _Rows:
    """The tensors of `_Heads` for one clone, with R = K_base + 3 * K_new rows.

    Attributes:
        target_weight: Weights of the target's features, (R, D_t).
        clone_weight: Weights of the clone's features, (R, D_s).
        bias: (R,).
        weights: scale, w0, w1 and w2, (4, 1).
        shift: (K_new,).
        rivals: As in the branch, (number of rivals + K_new, D_s + 1), or empty.
    """

    target_weight: Tensor
    clone_weight: Tensor
    bias: Tensor
    weights: Tensor
    shift: Tensor
    rivals: Tensor


def _rows(branch: Branch, n_target: int, n_base: int, base_priority: float) -> _Rows:
    """Collect the terms of a head; `n_target` is D_t."""
    head = _stacked(branch, n_target, n_base)
    fitted, own = head.discriminants, head.own
    odds, mixed = head.odds_weight.double(), head.class_weight.double()
    their_weight = F.pad(own.weight.double(), (n_target, 0))
    weight = torch.cat([fitted.weight.double(), their_weight])
    bias = torch.cat([fitted.bias, own.bias]).double()
    new, theirs = slice(n_base, n_base + len(own.bias)), slice(n_base + len(own.bias), None)
    weight = torch.cat([weight, mixed[0] * weight[new] + mixed[1] * weight[theirs]])
    bias = torch.cat([bias, mixed[0] * bias[new] + mixed[1] * bias[theirs]])
    scale = 1 + branch.gain.double()
    weights = torch.stack([scale, scale * odds[0], scale * odds[1], 1 + scale * odds[2]])
    shift = scale * odds[3] + branch.offset.double() - base_priority
    tensors = weight[:, :n_target], weight[:, n_target:], bias, weights, shift, branch.rivals
    return _Rows(*(tensor.to(branch.gain.dtype, copy=True).contiguous() for tensor in tensors))


def _stacked(branch: Branch, n_target: int, n_base: int) -> StackedHead:
    """The head as a `StackedHead`; if it is only one of the two terms, the other gets weight 0."""
    head, n_new = branch.head, len(branch.offset)
    if isinstance(head, StackedHead):
        return head
    if isinstance(head, DiscriminantHead):
        stacked = StackedHead(head, SourceHead(n_new, head.weight.shape[1] - n_target).to(head.weight))
        odds, mixed = (1, 0, 0, 0), (1, 0)
    else:
        none = DiscriminantHead(n_base, n_base + n_new, n_target + head.weight.shape[1]).to(head.weight)
        stacked = StackedHead(none, head)
        odds, mixed = (0, 1, -1, 0), (0, 1)
    stacked.odds_weight, stacked.class_weight = head.weight.new_tensor(odds), head.weight.new_tensor(mixed)
    return stacked


def _heads(plan: Plan) -> list[_Heads]:
    """One batch for each pair of a number of new classes and the features that are read."""
    n_base = len(plan.classes) - sum(len(branch.offset) for branch in plan.branches)
    groups: dict[tuple[int, int], list[int]] = {}
    rows = []
    for place, (branch, view) in enumerate(zip(plan.branches, plan.views, strict=True)):
        groups.setdefault((len(branch.offset), view), []).append(place)
        rows.append(_rows(branch, plan.features[view].n_channels, n_base, plan.base_priority))
    return [_Heads(places, view, [rows[place] for place in places]) for (_, view), places in groups.items()]
