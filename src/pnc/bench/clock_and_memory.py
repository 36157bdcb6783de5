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
    """Wait until a GPU has finished: calls return earlier, which a clock would not notice."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(work: Callable[[], T], device: torch.device = CPU) -> tuple[T, int | None]:
    """Run `work`, and measure the peak growth of memory in bytes.

    Args:
        work: What is measured.
        device: Where it computes. On a GPU, memory allocated by torch counts; otherwise all memory of the process. In a
            process that has run for long this is an overestimate: heap gaps left by large tensors are reused, and stay
            in use page by page.
    Returns:
        The result of `work`, and the bytes; None if they cannot be measured.
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
    libc.malloc_trim(0)  # return freed memory, so that using it again counts
    libc.mallopt(_MMAP_THRESHOLD, 2**17)  # return memory freed meanwhile at once, instead of leaving gaps in the heap
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak: proc(5)
    before = _status("VmRSS")
    try:
        result = work()
        return result, max(0, _status("VmHWM") - before)
    finally:
        libc.mallopt(_MMAP_THRESHOLD, 2**25)  # the value that glibc reaches after large tensors
        libc.mallopt(_TRIM_THRESHOLD, 2**26)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
