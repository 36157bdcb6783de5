"""Clock and memory for benches, on processors and on GPUs."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
CPU = torch.device("cpu")

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def finish(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked to: calls return before that, and a clock would miss it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(work: Callable[[], T], device: torch.device = CPU) -> tuple[T, int | None]:
    """Run `work` to its end; also give by how many bytes memory grew at most meanwhile.

    Args:
        work: What is measured.
        device: Where it computes. On a GPU what counts is what torch has allocated there; otherwise all that the
            process holds. In a process that has run for long the latter is too much rather than too little: gaps that
            large tensors have left in the heap are used again, and stay in use by the page.
    Returns:
        The result of `work`, and the bytes; None where they cannot be known.
    """
    gc.collect()
    if device.type == "cuda":
        finish(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        finish(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        return work(), None
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)  # what was freed before goes back, so that its use counts again
    libc.mallopt(_MMAP_THRESHOLD, 2**17)  # and so does, at once, what is freed meanwhile: gaps in the heap are no use
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: proc(5)
    before = _status("VmRSS")
    try:
        result = work()
        return result, max(0, _status("VmHWM") - before)
    finally:
        libc.mallopt(_MMAP_THRESHOLD, 2**25)  # where glibc's own ends up after large tensors
        libc.mallopt(_TRIM_THRESHOLD, 2**26)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
