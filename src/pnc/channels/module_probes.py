"""Numeric experiments on leaf modules of any library: does one work channel by channel, does it map 0 to 0?

Each experiment runs a copy of the module in float64 on a small random input, instead of relying on class names. What no
experiment shows counts as unknown.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError, AssertionError)
"""Errors that a foreign module may raise on an unsuitable input."""

_MAX_EXTENT = 9
"""Spatial size of the probes: larger than usual kernels, small enough to be cheap."""


@dataclass(frozen=True)
class PerChannel:
    """A leaf module whose output channel i depends only on its input channel i.

    Attributes:
        tensors: (name, dim) of each parameter and buffer that has one entry per channel.
        makes_zero: Whether its output is exactly 0 where those parameters are 0, for any input.
        keeps_zero: Whether its output is exactly 0 where those parameters and the input are 0.
    """

    tensors: tuple[tuple[str, int], ...]
    makes_zero: bool
    keeps_zero: bool


def run(module: nn.Module, *inputs: Tensor) -> list[Tensor] | None:
    """Outputs of a copy of the module in evaluation mode and float64; None if it fails or returns no single tensor.

    Calls `forward` directly, so that no hooks run, and keeps the global random state.
    """
    copied = _copied(module)
    return None if copied is None else _run(copied, *inputs)


def _copied(module: nn.Module) -> nn.Module | None:
    """A copy to experiment with, in evaluation mode and float64 on the CPU; None if it cannot be copied."""
    try:
        return copy.deepcopy(module).to(device="cpu", dtype=torch.float64).eval()
    except FAILURES:
        return None


def _run(copied: nn.Module, *inputs: Tensor) -> list[Tensor] | None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            outs = [copied.forward(x.clone()) for x in inputs]
        except FAILURES:
            return None
    return outs if all(isinstance(out, Tensor) for out in outs) else None


def probe_input(shape: Sequence[int], dim: int) -> Tensor:
    """Random tensor of a recorded shape, with spatial dims of at most `_MAX_EXTENT`; float64."""
    sizes = [min(s, _MAX_EXTENT) if len(shape) > 3 and d not in (0, dim) else s for d, s in enumerate(shape)]
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def is_elementwise(module: nn.Module, rank: int) -> bool:
    """Whether every output entry is the same function of the input entry at its place alone.

    False for modules with parameters or buffers.
    """
    if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        return False
    x = torch.randn((2, 4, 3, 3, 3)[:rank], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = (0, x.numel() // 3, x.numel() - 1)
    others = [x.clone() for _ in places]
    for place, other in zip(places, others, strict=True):
        other.view(-1)[place] += 3.0
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(1))
    outs = run(module, x, x.view(-1)[order].view_as(x), *others)
    if outs is None or any(out.shape != x.shape for out in outs):
        return False
    if not close(outs[1].reshape(-1), outs[0].reshape(-1)[order]):
        return False
    for place, out in zip(places, outs[2:], strict=True):
        same = out == outs[0]
        same.view(-1)[place] = True
        if not bool(same.all()):
            return False
    return True


def maps_zero_to_zero(module: nn.Module, rank: int) -> bool:
    """Whether an elementwise module maps 0 to exactly 0."""
    outs = run(module, torch.zeros((1, 1, 2, 2, 2)[:rank], dtype=torch.float64))
    return outs is not None and not bool(outs[0].any())


def per_channel(module: nn.Module, shape: Sequence[int], dim: int) -> PerChannel | None:
    """Test whether a module with parameters treats the channels along `dim` one by one; None if not.

    Dropping two channels of the input, with the parameters' entries for them, must drop the same two channels of the
    output and change nothing else.
    """
    copied, x = _copied(module), probe_input(shape, dim)
    n_channels = shape[dim]
    outs = None if copied is None else _run(copied, x)
    if copied is None or outs is None or outs[0].shape != x.shape or n_channels < 3:
        return None
    tensors = []
    for name, tensor in [*copied.named_parameters(), *copied.named_buffers()]:
        dims = [d for d, size in enumerate(tensor.shape) if size == n_channels]
        if len(dims) > 1:
            return None
        tensors += [(name, d) for d in dims]
    dropped = torch.tensor([0, n_channels // 2])
    keep = torch.tensor([c for c in range(n_channels) if c not in (0, n_channels // 2)])
    smaller = copy.deepcopy(copied)
    parameters = {name for name, _ in copied.named_parameters()}
    for name, d in tensors:
        tensor = owned_tensor(copied, name)
        replace_tensor(smaller, name, tensor.index_select(d, keep))
        if name in parameters:
            replace_tensor(copied, name, tensor.index_fill(d, dropped, 0.0))
    resize_attributes(smaller, n_channels, len(keep))
    part = _run(smaller, x.index_select(dim, keep))
    if part is None or not close(part[0], outs[0].index_select(dim, keep)):
        return None
    zeroed = _run(copied, x, x.index_fill(dim, dropped, 0.0))
    assert zeroed is not None  # it ran on other values
    makes_zero, keeps_zero = (not bool(z.index_select(dim, dropped).any()) for z in zeroed)
    return PerChannel(tuple(tensors), makes_zero, keeps_zero)


def owned_tensor(root: nn.Module, name: str) -> Tensor:
    """Parameter or buffer by qualified name, detached."""
    owner, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(root.get_submodule(owner), leaf)
    return tensor.detach()


def replace_tensor(root: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter (by a new one, without gradient) or a buffer of a copied module."""
    owner, _, leaf = name.rpartition(".")
    module = root.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value.clone(), requires_grad=False)
    else:
        module._buffers[leaf] = value.clone()


def resize_attributes(module: nn.Module, old: int, new: int) -> None:
    """Correct the sizes that a layer stores as attributes when `old` channels became `new`."""
    for name in ("num_features", "num_channels", "num_parameters", "dim", "in_channels", "out_channels", "groups"):
        if getattr(module, name, None) == old and isinstance(getattr(module, name), int):
            setattr(module, name, new)


def sliceable_conv(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, shape: Sequence[int]) -> tuple[bool, bool]:
    """Test whether a convolution with its own forward can lose output and input channels.

    Returns:
        (rows, columns): dropping rows of its weight drops outputs and changes nothing else; dropping input channels
        with the weight's columns equals setting them to zero. Both False if it has groups but is not depthwise.
    """
    module, x = copy.deepcopy(module).cpu(), probe_input(shape, 1)
    outs = run(module, x, x.index_fill(1, torch.tensor([0]), 0.0))
    depthwise = 1 < module.groups == module.in_channels == module.out_channels
    if outs is None or min(module.in_channels, module.out_channels) < 3 or not (module.groups == 1 or depthwise):
        return False, False
    keep_in = torch.arange(1, module.in_channels)
    keep_out = keep_in if depthwise else torch.arange(1, module.out_channels)
    smaller = copy.deepcopy(module)
    resize_attributes(smaller, module.out_channels, len(keep_out))
    for name in ("weight", "bias"):
        if getattr(module, name) is not None:
            replace_tensor(smaller, name, owned_tensor(module, name).index_select(0, keep_out))
    part = run(smaller, x.index_select(1, keep_in) if depthwise else x)
    rows = part is not None and close(part[0], outs[0].index_select(1, keep_out))
    if depthwise or not rows:
        return rows, rows
    smaller = copy.deepcopy(module)
    smaller.in_channels = len(keep_in)
    replace_tensor(smaller, "weight", owned_tensor(module, "weight").index_select(1, keep_in))
    part = run(smaller, x.index_select(1, keep_in))
    return rows, part is not None and close(part[0], outs[1])


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    """Whether two tensors are equal up to rounding, relative to the largest entry."""
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())
