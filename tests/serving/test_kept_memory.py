"""What a server frees stays with its process: later batches need no new pages."""

import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys, threading
import torch
from pnc.serving.kept_memory import keep_freed_memory

def batches(n):
    for _ in range(n):
        maps = [torch.ones(10_000_000) for _ in range(2)]
        del maps

def work():
    batches(20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    batches(10)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

torch.set_num_threads(1)
if sys.argv[1] == "kept" and not keep_freed_memory():
    print(-1)
else:
    thread = threading.Thread(target=work)  # as the server computes batches
    thread.start()
    thread.join()
"""


def _faults(which: str) -> int:
    run = subprocess.run([sys.executable, "-c", _FAULTS, which], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted on Linux")
def test_what_was_freed_is_not_mapped_again() -> None:
    kept = _faults("kept")
    if kept < 0:
        pytest.skip("the C library is not glibc")
    assert kept < 1000  # one batch has 20,000 pages
    assert _faults("returned") > 10_000
