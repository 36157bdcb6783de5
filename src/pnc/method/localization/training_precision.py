"""The precision in which parts are trained: bfloat16 where a device computes in it, except grouped convolutions."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pnc.method.task import CloneTask


def in_training_precision(task: CloneTask) -> CloneTask:
    """Return the task in bfloat16, if its device has it: training then takes two thirds of the time."""
    return replace(task, precision="bfloat16") if _has_bfloat16(task.source.device) else task


@contextlib.contextmanager
def training_autocast(task: CloneTask) -> Iterator[None]:
    """Run networks in the task's precision; on processors, grouped convolutions in float32.

    There, the gradients of a depthwise convolution take up to four times as long in bfloat16 (5x5, torch 2.13).
    """
    on_processor = task.source.device.type == "cpu" and task.precision == "bfloat16"
    with task.autocast(), _GroupedInFloat32() if on_processor else contextlib.nullcontext():
        yield


class _GroupedInFloat32(TorchFunctionMode):
    """Runs convolutions of several groups in float32 under autocast."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.conv2d or (args[6] if len(args) > 6 else kwargs.get("groups", 1)) == 1:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(args[0].float(), *args[1:], **kwargs)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())
