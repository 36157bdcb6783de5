import sys

import torch

from pnc.bench.clock_and_memory import peak_memory


def test_peak_memory_is_that_of_the_work():
    result, peak = peak_memory(lambda: float(torch.ones(32, 1024, 1024).sum()))
    assert result == 2**25
    if sys.platform.startswith("linux"):
        assert 0.99 * 2**27 <= peak < 2**28  # 128 MiB of floats; the count of pages lags behind a little
