"""Clones made in bfloat16: networks run in it, solvers do not, and the composite is not affected."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pnc
from digits import NEW, held_out_images, pair, support
from pnc.composite.metrics import measure_logits
from pnc.foundation import process_team
from pnc.method import refinement
from pnc.method.localization import localizer
from pnc.method.refinement import Schedule


class Dtypes(TorchDispatchMode):
    """Records the dtypes of convolutions, and of everything that solves or decomposes."""

    def __init__(self):
        super().__init__()
        self.convolutions, self.solvers = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if "convolution" in name:
            self.convolutions.add(args[0].dtype)
        if any(word in name for word in ("cholesky", "solve", "linalg")):
            self.solvers.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


def average_accuracy(net):
    data = held_out_images()
    with torch.no_grad():
        logits = net(data.images)
    assert logits.dtype == torch.float32
    assert torch.equal(logits[:, :5], net.target(data.images))
    return measure_logits(logits, data.labels, logits[:, :5]).average_accuracy


def clone(**settings):
    nets = pair()
    if "density" not in settings:
        settings["effort"] = "seconds"
    made = pnc.clone(nets.source.module, nets.target.module, support(), classes=NEW, **nets.names(), **settings)
    assert all(one.dtype != torch.bfloat16 for one in made.branch.state_dict().values())
    return pnc.attach(nets.target.module, made)


def test_the_closed_form_runs_networks_in_bfloat16_and_solves_in_float32():
    with Dtypes() as seen:
        half = clone(precision="bfloat16")
    # float32: the recorder's own check of both networks, bit for bit
    assert seen.convolutions == {torch.bfloat16, torch.float32}
    assert seen.solvers and torch.bfloat16 not in seen.solvers
    with Dtypes() as seen:
        whole = clone()
    assert seen.convolutions == {torch.float32}
    assert average_accuracy(half) == pytest.approx(average_accuracy(whole), abs=0.02)


def test_gates_norms_and_refinement_learn_in_bfloat16(monkeypatch):
    monkeypatch.setattr(localizer, "GATES_STEPS", 10)
    monkeypatch.setattr(localizer, "NORMS_STEPS", 10)
    monkeypatch.setattr(refinement, "SCHEDULE", Schedule(0.0003, 6, 3))
    settings = {"density": 0.6, "refine": True}
    half, whole = clone(precision="bfloat16", **settings), clone(**settings)
    assert average_accuracy(half) == pytest.approx(average_accuracy(whole), abs=0.03)


def test_parts_are_tuned_in_bfloat16():
    half, whole = (clone(precision=precision, density=0.6) for precision in ("bfloat16", "float32"))
    assert average_accuracy(half) == pytest.approx(average_accuracy(whole), abs=0.03)


def test_another_precision_is_refused():
    with pytest.raises(pnc.InputError, match="precision: expected one of float32, bfloat16; got 'float16'"):
        clone(precision="float16")


def test_the_precision_of_accelerate_launch_is_used(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert process_team.launched_precision() == "float32"
    for asked, expected in (("no", "float32"), ("bf16", "bfloat16")):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        assert process_team.launched_precision() == expected
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(pnc.InputError, match="launched with 'fp16'.*--mixed_precision bf16 or no"):
        process_team.launched_precision()
