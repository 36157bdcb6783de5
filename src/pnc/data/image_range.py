"""The range of values that a network says its images have, as `pnc.Preprocessed` does, and images held against it.

A network says so by an attribute `image_range`, a pair of numbers. It counts where the network is the outermost one, or
the first in an `nn.Sequential`: what stands in front of it may change values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from pnc.foundation.errors import InputError

_UNCHECKED: ContextVar[bool] = ContextVar("unchecked", default=False)
_SLACK = 1e-3  # of the range: resizing in floating point leaves it by so much at most


def image_range(module: nn.Module) -> tuple[float, float] | None:
    """The smallest and largest value that a network's images may have; None where it does not say."""
    found = getattr(module, "image_range", None)
    if isinstance(found, tuple):
        return found
    if isinstance(module, nn.Sequential) and len(module):
        return image_range(module[0])
    for wrapped in ("_orig_mod", "module"):  # of torch.compile and of DataParallel
        inner = module._modules.get(wrapped) if isinstance(module, nn.Module) else None
        if inner is not None and (wrapped != "module" or len(module._modules) == 1):
            return image_range(inner)
    return None


def check_range(values: tuple[float, float], module: nn.Module, role: str, argument: str) -> None:
    """Refuse images outside of the range that a network says.

    Args:
        values: The smallest and the largest value that came.
        module: The network.
        role: What messages call it.
        argument: What messages call the images.
    Raises:
        InputError: the message says how images come into the range.
    """
    taken = image_range(module)
    if taken is None or len(values) != 2:
        return
    slack = _SLACK * (taken[1] - taken[0])
    low, high = values
    if taken[0] - slack <= low and high <= taken[1] + slack:
        return
    way_out = "give images / 255, or images.byte()" if low >= 0 and high > 2 else "give them before any normalisation"
    raise InputError(
        f"{argument}: values lie in [{low:.3g}, {high:.3g}], but {role} does its own preprocessing and takes images in "
        f"[{taken[0]:g}, {taken[1]:g}]; {way_out}"
    )


@contextmanager
def values_unchecked() -> Iterator[None]:
    """Within the block, in this thread, networks are run on noise, which has any values."""
    token = _UNCHECKED.set(True)
    try:
        yield
    finally:
        _UNCHECKED.reset(token)


def check_values(images: Tensor, module: nn.Module, role: str) -> None:
    """Refuse a batch outside of the range that a network says, where reading the values costs next to nothing.

    Not looked at are images on other devices than the CPU, which a call would have to wait for, and calls that are
    being compiled, exported, traced or recorded, in which values must not be read.

    Raises:
        InputError: as `check_range`.
    """
    if image_range(module) is None or images.device.type != "cpu" or not images.numel():
        return
    if not images.is_floating_point():  # of a type that is refused by itself
        return
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or type(images) not in (Tensor, nn.Parameter):
        return
    if _UNCHECKED.get() or torch._C._is_torch_function_mode_enabled() or torch._C._len_torch_dispatch_stack():
        return
    low, high = images.detach().aminmax()
    check_range((low.item(), high.item()), module, role, "images")
