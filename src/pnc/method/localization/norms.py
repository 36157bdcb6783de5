"""BatchNorm layers after channels were removed: statistics are recomputed, scales and shifts tuned by gradient.

Tuned scales and shifts are folded into the running statistics, which a clone's file includes anyway; weights and biases
remain the source's.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pnc.foundation.errors import InputError, PNCWarning
from pnc.foundation.process_team import ALONE, Team

Batch = tuple[Tensor, Callable[[Tensor], Tensor]]
"""Inputs of a segment (B, ...), and the loss of its outputs."""

LEARNING_RATE = 0.1
_LEAST_SCALE = 0.05
"""Smallest share of its scale that a channel keeps: a standard deviation cannot express another sign."""


def reestimate_statistics(segment: nn.Module, batches: Iterable[Tensor], team: Team = ALONE) -> None:
    """Recompute the running statistics of a segment's BatchNorm layers on the given inputs, in place.

    After masking, the old statistics describe features that no longer exist. The new ones are the mean over batches
    (`momentum=None`), and every layer returns to evaluation mode. Only for copies, such as `compact` and `mask_segment`
    return.

    Args:
        segment: Only its BatchNorm buffers change.
        batches: Inputs (B, ...), the same in every process; a single sample, such as the last of a fold, is left out.
        team: Processes that share the batches.
    Raises:
        InputError: there is no batch of two samples or more.
    """
    n_batches = 0
    with _averaging(batch_norms(segment)), torch.no_grad():
        for batch in batches:
            if len(batch) < 2:
                continue
            if team.is_mine(n_batches):
                segment(batch)
            n_batches += 1
        if n_batches == 0:
            raise InputError("batches: expected at least one batch of 2 or more inputs, got none")
        if team.size > 1:
            _average(batch_norms(segment), len(range(team.rank, n_batches, team.size)), n_batches, team)


def tune_norms(
    segment: nn.Module,
    batches: Iterable[Batch],
    n_steps: int,
    inputs: Iterable[Tensor],
    start: nn.Module | None = None,
    team: Team = ALONE,
) -> None:
    """Tune the scales and shifts of a segment's BatchNorm layers by gradient, in place, and recompute statistics.

    During tuning the layers use batch statistics. In the end only their running statistics have changed.

    Args:
        segment: A copy, as for `reestimate_statistics`.
        batches: At least `n_steps` batches.
        n_steps: Steps of Adam.
        inputs: Inputs for the statistics, as in `reestimate_statistics`.
        start: The same segment with the weights and biases of norms to start from.
        team: Processes that share every batch; all get the same arguments.
    """
    layers = tunable(batch_norms(segment))
    _warn_of_others(batch_norms(segment), layers)
    before = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in layers]
    if start is not None:
        for layer, other in zip(batch_norms(segment), batch_norms(start), strict=True):
            layer.load_state_dict(other.state_dict())
    with training_norms(segment, team) as parameters:
        if parameters:
            optimizer, decay = optimizer_for([{"params": parameters, "lr": LEARNING_RATE}], n_steps)
            for (x, loss), _ in zip(batches, range(n_steps), strict=False):
                with torch.enable_grad():
                    optimizer.zero_grad()
                    loss(team.whole(segment(x[team.part(len(x))]), len(x))).backward()
                team.sum_gradients(parameters)
                optimizer.step()
                decay.step()
    for layer, (weight, bias) in zip(layers, before, strict=True):
        _keep_sign(layer, weight, bias)
    reestimate_statistics(segment, inputs, team)
    for layer, (weight, bias) in zip(layers, before, strict=True):
        _fold(layer, weight, bias)


def batch_norms(segment: nn.Module) -> list[_BatchNorm]:
    """List the BatchNorm layers that collect running statistics as torch's do.

    Subclasses with another forward are tried; one that collects statistics in another way is left out and keeps them.
    """
    layers = [m for m in segment.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    return [layer for layer in layers if _is_torchs(layer) or _collects(layer)]


def tunable(layers: Iterable[_BatchNorm]) -> list[_BatchNorm]:
    """List the layers whose scale and shift are `weight` and `bias`, so that running statistics can express them.

    Subclasses with another forward are tried: one may multiply by 1 + weight.
    """
    return [layer for layer in layers if layer.affine and (_is_torchs(layer) or _folds(layer))]


def _warn_of_others(layers: list[_BatchNorm], tuned: list[_BatchNorm]) -> None:
    others = {type(layer).__name__ for layer in layers if layer.affine and layer not in tuned}
    if others:
        warnings.warn(
            f"norm layers of type {', '.join(sorted(others))} use weight and bias in another way than torch's, so "
            "their scales and shifts are not tuned",
            PNCWarning,
            stacklevel=2,
        )


def _is_torchs(layer: _BatchNorm) -> bool:
    """Whether a layer has the forward of torch's own."""
    return type(layer).forward is _BatchNorm.forward and "forward" not in vars(layer)


def _tried(layer: _BatchNorm) -> tuple[_BatchNorm, Tensor]:
    """Return a float64 copy of a layer with random values, and inputs for it."""
    copied = copy.deepcopy(layer).cpu().double()
    n = copied.num_features
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(4, n, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        copied.get_buffer("running_mean").copy_(values[0] - 0.5)
        copied.get_buffer("running_var").copy_(values[1] + 0.5)
        if copied.affine:
            copied.weight.copy_(values[2] + 0.5)
            copied.bias.copy_(values[3] - 0.5)
    shape = (
        (4, n) if isinstance(layer, nn.BatchNorm1d) else (4, n, *[3] * (3 if isinstance(layer, nn.BatchNorm3d) else 2))
    )
    return copied, torch.randn(shape, generator=generator, dtype=torch.float64)


@torch.no_grad()
def _folds(layer: _BatchNorm) -> bool:
    """Whether running statistics can replace a change of weight and bias, tried on noise."""
    tuned, x = _tried(layer)
    weight, bias = tuned.weight.detach().clone(), tuned.bias.detach().clone()
    tuned.weight.mul_(1.3)
    tuned.bias.add_(0.2)
    try:
        expected = tuned(x)
        _fold(tuned, weight, bias)
        return torch.allclose(tuned(x), expected, rtol=1e-9, atol=1e-9)
    except (RuntimeError, TypeError, ValueError):
        return False


@torch.no_grad()
def _collects(layer: _BatchNorm) -> bool:
    """Whether `momentum=None` makes the running statistics the mean over batches, tried on noise."""
    copied, x = _tried(layer)
    try:
        with _averaging([copied]):
            copied(x)
            copied(2 * x + 1)
    except (RuntimeError, TypeError, ValueError):
        return False
    dims = [dim for dim in range(x.dim()) if dim != 1]
    mean = (x.mean(dims) + (2 * x + 1).mean(dims)) / 2
    variance = (x.var(dims) + (2 * x + 1).var(dims)) / 2
    found = copied.get_buffer("running_mean"), copied.get_buffer("running_var")
    return torch.allclose(found[0], mean, rtol=1e-9) and torch.allclose(found[1], variance, rtol=1e-9)


@contextlib.contextmanager
def training_norms(segment: nn.Module, team: Team = ALONE) -> Iterator[list[nn.Parameter]]:
    """Within the block, BatchNorm layers use batch statistics, and their weights and biases require gradients.

    Args:
        segment: A copy.
        team: Processes that each have a part of every batch; the statistics are those of the whole batch.
    Yields:
        The weights and biases of `tunable` layers.
    """
    layers = batch_norms(segment)
    momenta = [layer.momentum for layer in layers]
    parameters = [p for layer in tunable(layers) for p in (layer.weight, layer.bias)]
    with contextlib.ExitStack() as stack:
        if team.size > 1:
            stack.enter_context(_shared_statistics(layers, team))
        try:
            for layer in layers:
                layer.training, layer.momentum = team.size == 1, 0.0
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield parameters
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.training, layer.momentum = False, momentum
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None


@contextlib.contextmanager
def _shared_statistics(layers: list[_BatchNorm], team: Team) -> Iterator[None]:
    """Within the block, layers use the statistics of the whole batch, of which each process has a part.

    The layers are in evaluation mode, with mean 0 and variance 1; a hook normalises their inputs.
    """
    before = [(layer.get_buffer("running_mean").clone(), layer.get_buffer("running_var").clone()) for layer in layers]
    hooks = [layer.register_forward_pre_hook(partial(_normalized, team)) for layer in layers]
    try:
        for layer in layers:
            layer.get_buffer("running_mean").zero_()
            layer.get_buffer("running_var").fill_(1 - layer.eps)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, (mean, variance) in zip(layers, before, strict=True):
            layer.get_buffer("running_mean").copy_(mean)
            layer.get_buffer("running_var").copy_(variance)


def _normalized(team: Team, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    """Normalise a part of a batch (B, C, ...) by the statistics of the whole."""
    assert isinstance(layer, _BatchNorm)
    x = inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))  # bfloat16 is too coarse for sums
    dims = [dim for dim in range(x.dim()) if dim != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    n = team.sum(torch.tensor(float(x.numel() // x.shape[1]))).to(x)
    mean = team.sum_with_gradient(x.sum(dims)) / n
    centred = x - mean.reshape(shape)
    variance = team.sum_with_gradient(centred.square().sum(dims)) / n
    return (centred * (variance + layer.eps).rsqrt().reshape(shape),)


def optimizer_for(
    groups: list[dict[str, object]], n_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Make an Adam whose learning rates are constant for the first half of the steps and then fall to zero."""
    optimizer = torch.optim.Adam(groups)
    half = max(1.0, n_steps / 2)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (n_steps - step) / half))


@torch.no_grad()
def _keep_sign(layer: _BatchNorm, weight: Tensor, bias: Tensor) -> None:
    """Limit tuned scales to what running statistics can express: the sign of `weight`; where it is zero, no change."""
    ratio = (layer.weight / weight).clamp(min=_LEAST_SCALE)
    usable = ratio.isfinite() & (layer.bias - bias).div(weight).isfinite()
    layer.weight.copy_(torch.where(usable, weight * ratio, weight))
    layer.bias.copy_(torch.where(usable, layer.bias, bias))


@torch.no_grad()
def _fold(layer: _BatchNorm, weight: Tensor, bias: Tensor) -> None:
    """Restore a layer's weight and bias, and move the difference into its running statistics."""
    assert layer.running_mean is not None and layer.running_var is not None
    unused = weight == 0  # not tuned, see `_keep_sign`
    deviation = (layer.running_var + layer.eps).sqrt() * torch.where(unused, 1.0, weight / layer.weight)
    shift = torch.where(unused, 0.0, (layer.bias - bias) / weight)
    layer.running_mean.sub_(shift * deviation)
    layer.running_var.copy_((deviation.square() - layer.eps).clamp(min=0))
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)


def _average(layers: list[_BatchNorm], n_own: int, n_batches: int, team: Team) -> None:
    """Turn the means over each process's batches into the means over all batches."""
    for layer in layers:
        for name, buffer in layer.named_buffers(recurse=False):
            if buffer.is_floating_point():
                # a process without a batch has the statistics of a new layer, with weight 0
                buffer.copy_(team.sum(buffer * (n_own / n_batches)))
            else:
                assert name == "num_batches_tracked"
                buffer.fill_(n_batches)


@contextlib.contextmanager
def _averaging(layers: list[_BatchNorm]) -> Iterator[None]:
    """Within the block, BatchNorm layers collect the mean of their batches' statistics.

    Flags and momentum are restored afterwards; after an error the old statistics are, too.
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
