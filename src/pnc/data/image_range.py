"""The range of values that a network, such as `pnc.Preprocessed`, declares for its images, and the check against it.

A network declares it in an attribute `image_range`, a pair of numbers. It is used only if the network is the outermost
one or the first in an `nn.Sequential`, because a module in front of it may change the values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from pnc.foundation.errors import InputError

_UNCHECKED: ContextVar[bool] = ContextVar("unchecked", default=False)
_SLACK = 1e-3  # share of the range by which resizing in floating point may leave it


def image_range(module: nn.Module) -> tuple[float, float] | None:
    """The smallest and largest value that a network's images may have; None if it does not declare any."""
    found = getattr(module, "image_range", None)
    if isinstance(found, tuple):
        return found
    if isinstance(module, nn.Sequential) and len(module):
        return image_range(module[0])
    if isinstance(module, torch.jit.ScriptModule):
        return None  # it keeps its submodules in another way
    for wrapped in ("_orig_mod", "module"):  # torch.compile and DataParallel
        inner = module._modules.get(wrapped) if isinstance(module, nn.Module) else None
        if inner is not None and (wrapped != "module" or len(module._modules) == 1):
            return image_range(inner)
    return None


def check_range(values: tuple[float, float], module: nn.Module, role: str, argument: str) -> None:
    """Refuse images outside of the range that a network declares.

    Args:
        values: The smallest and the largest value of the images.
        module: The network.
        role: What messages call the network.
        argument: What messages call the images.
    Raises:
        InputError: the message says how to bring images into the range.
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
    """Turn off `check_values` within the block, in this thread: for running networks on noise."""
    token = _UNCHECKED.set(True)
    try:
        yield
    finally:
        _UNCHECKED.reset(token)


def check_values(images: Tensor, module: nn.Module, role: str) -> None:
    """Refuse a batch outside of the range that a network declares, if its values can be read cheaply.

    Images on other devices than the CPU are not checked, as the call would have to wait for them; nor are calls that
    are being compiled, exported, traced or recorded, in which values must not be read.

    Raises:
        InputError: as `check_range`.
    """
    if image_range(module) is None or images.device.type != "cpu" or not images.numel():
        return
    if not images.is_floating_point():  # the network refuses such types itself
        return
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or type(images) not in (Tensor, nn.Parameter):
        return
    if _UNCHECKED.get() or torch._C._is_torch_function_mode_enabled() or torch._C._len_torch_dispatch_stack():
        return
    low, high = images.detach().aminmax()
    check_range((low.item(), high.item()), module, role, "images")
