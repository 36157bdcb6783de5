"""Fixtures for all tests, and the order of the folders: those of benches run last."""

from pathlib import Path

import pytest
import torch

import torchvision_shim

torch.set_num_threads(1)  # networks this small only lose by more, above all where tests share the machine

BENCH = Path(__file__).parent / "bench"


def pytest_collection_modifyitems(items):
    for item in items:
        if BENCH in item.path.parents:
            item.add_marker(pytest.mark.bench)
    items.sort(key=lambda item: item.get_closest_marker("bench") is not None)  # stable: all else keeps its order


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Parts are tuned for a few steps only, except where a test asks for more: what it gains is for the benches."""
    monkeypatch.setattr("pnc.method.part_tuning.N_STEPS", 30)


@pytest.fixture(scope="session")
def torchvision():
    """The torchvision package; ask for it also before timm or transformers are imported, which import it."""
    return torchvision_shim.import_torchvision()


@pytest.fixture(scope="session")
def stage():
    """A tiny target, four clones for it from two sources, and images: shared, so no test may change it."""
    from pnc.bench.random_lives import make_stage

    return make_stage()
