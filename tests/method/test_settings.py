"""Every argument is checked before a network is recorded or an image is read."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import pnc
from pnc.foundation.argument_checks import check_choice, check_finite, check_share
from pnc.foundation.errors import InputError
from pnc.method import task as task_file
from pnc.method.settings import Bounds, Removal

PERCENT = "expected a share of the source's multiply-accumulates, above 0 and at most 1, or None; got"


class Unread:
    """A support that must not be read."""

    def __getattribute__(self, name):
        raise AssertionError(f"the support was asked for {name}")


def network(n_classes):
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, n_classes)).eval()


def refused(message, **settings):
    given = {"source_classes": ["c", "d"], "base_classes": ["a", "b"], "support": Unread(), **settings}
    networks = given.pop("source", network(2)), given.pop("target", network(2))
    with pytest.raises(InputError, match=re.escape(message)) as error:
        pnc.clone(*networks, given.pop("support"), **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": True}, "density: expected a share of the prunable multiply-accumulates that is kept, above 0"),
        ({"density": 50}, "at most 1 or 'auto'; got 50 (percent? write 0.5)"),
        ({"density": math.nan}, "got nan"),
        ({"density": "half"}, "got 'half'"),
        ({"density": None}, "got None"),
        ({"method": "gats"}, "method: expected one of gates, taylor, magnitude, random, local-surrogate; got 'gats' "
                             "(did you mean 'gates'?)"),
        ({"method": "Taylor"}, "(did you mean 'taylor'?)"),
        ({"round_to": 0}, "round_to: expected a whole number, at least 1; got 0"),
        ({"round_to": 8.0}, "round_to: expected a whole number, at least 1; got 8.0"),
        ({"max_macs": 50}, f"max_macs: {PERCENT} 50 (percent? write 0.5)"),
        ({"max_macs": -1}, f"max_macs: {PERCENT} -1"),
        ({"max_macs": 0}, f"max_macs: {PERCENT} 0"),
        ({"max_macs": math.inf}, f"max_macs: {PERCENT} inf"),
        ({"max_macs": 10**5000}, f"max_macs: {PERCENT} a number of hundreds of digits"),
        ({"max_macs": "0.5"}, f"max_macs: {PERCENT} '0.5'"),
        ({"max_bytes": -5}, "max_bytes: expected a whole number, at least 1; got -5"),
        ({"max_bytes": math.nan}, "max_bytes: expected a whole number, at least 1; got nan"),
        ({"max_base_drop": 2}, "got 2 (percent? write 0.02)"),
        ({"max_base_drop": 0}, "max_base_drop: expected a share of base images"),
        ({"max_base_drop": 1}, "max_base_drop: 1 allows losing every base image"),
        ({"strategy": "scna"}, "strategy: expected one of scan, sequential; got 'scna' (did you mean 'scan'?)"),
        ({"strategy": "sequential", "max_macs": 0.5}, "strategy: 'sequential' does not support max_macs"),
        ({"refine": "yes"}, "refine: expected True or False; got 'yes'"),
        ({"flip": 1}, "flip: expected True or False; got 1"),
        ({"name": ""}, "name: expected printable text"),
        ({"name": 7}, "name: expected printable text"),
        ({"resume": 3}, "resume: expected a path that ends in .safetensors, got int"),
        ({"resume": "steps.pt"}, "resume: expected a path that ends in .safetensors, got steps.pt"),
        ({"resume": "no/such/folder/steps.safetensors"}, "resume: there is no folder no/such/folder; create it first"),
        ({"progress": True}, "progress: expected a function of (what, done, total) or None; got bool"),
        ({"seed": -1}, "seed: expected a whole number, at least 0; got -1"),
        ({"seed": 2**63}, "seed: expected a whole number, at least 0 and below 2**63; got 9223372036854775808"),
        ({"batch_size": 0}, "batch_size: expected a whole number, at least 1; got 0"),
        ({"memory": 10}, "memory: expected a whole number, at least"),
        ({"memory": "2G"}, "memory: expected a whole number, at least"),
        ({"team": 2}, "team: expected a team of pnc.joined, got int"),
        ({"precision": "bf16"}, "precision: expected one of float32, bfloat16; got 'bf16' (did you mean"),
        ({"source": "resnet18"}, "source: expected a torch.nn.Module, got str"),
        ({"target": None}, "target: expected a torch.nn.Module, got NoneType"),
        ({"target": network(2).half()}, "target has parameters in float16"),
    ],
)  # fmt: skip
def test_each_argument_is_refused_before_a_network_is_recorded_or_an_image_read(settings, message, monkeypatch):
    def recorded(*_):
        raise AssertionError("a network was recorded")

    monkeypatch.setattr(task_file, "record", recorded)
    refused(message, **settings)


def test_settings_are_values_that_check_themselves():
    assert Removal("auto").density == "auto" and Removal(0.5).fixed_density == 0.5
    with pytest.raises(InputError, match="density: 'auto' chooses among positions, which pnc.clone does; give a share"):
        assert Removal("auto").fixed_density
    assert not Bounds().is_bounded and Bounds(max_bytes=1).is_bounded


@pytest.fixture(scope="module")
def task():
    images, labels = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), list("abcd") * 4
    names = {"source_classes": ["c", "d"], "base_classes": ["a", "b"]}
    return pnc.prepare_task(network(2), network(2), (images, labels), classes=None, **names)


def test_the_steps_of_the_job_check_what_they_are_given(task):
    for argument, value in {"max_cuts": 1, "exhaustive": "yes"}.items():
        with pytest.raises(InputError, match=f"^{argument}: "):
            pnc.scan(task, **{argument: value})
    found = pnc.scan(task)
    for bounds in ({"max_macs": 50}, {"max_bytes": -5}):
        with pytest.raises(InputError, match=f"^{next(iter(bounds))}: "):
            found.choose(**bounds)
    adapters = found.adapter(found.choose())
    for argument, value in {"density": "auto", "method": 3, "round_to": -1, "max_base_drop": 5, "refine": 1}.items():
        with pytest.raises(InputError, match=f"^{argument}: "):
            pnc.fit(task, adapters, **{argument: value})
    with pytest.raises(InputError, match=r"^fitted: expected adapters, found.adapter\(position\) of a scan"):
        pnc.fit(task, found.choose())
    for function in (pnc.scan, lambda wrong: pnc.fit(wrong, adapters)):
        with pytest.raises(InputError, match=r"^task: expected what pnc.prepare_task returns, got Sequential"):
            function(network(2))


def test_attach_and_calibrate_check_what_they_are_given(task):
    net, clone = network(2), pnc.fit(task, (found := pnc.scan(task)).adapter(found.choose()))
    ways = {
        "clones: give at least one": (),
        "got PosixPath; read the file first: pnc.load('clone.safetensors')": (Path("clone.safetensors"),),
        "got str; read the file first: pnc.load('clone.safetensors')": ("clone.safetensors",),
        "got list; write *clones": ([clone],),
    }
    for message, clones in ways.items():
        with pytest.raises(InputError, match=re.escape(message)):
            pnc.attach(net, *clones)
    with pytest.raises(InputError, match="^allow_mismatch: expected True or False; got 'no'"):
        pnc.attach(net, clone, allow_mismatch="no")
    composite = pnc.attach(task.target.model, clone)
    with pytest.raises(InputError, match="^clones: expected what"):
        composite.attach("clone.safetensors")
    with pytest.raises(InputError, match="^batch_size: expected a whole number"):
        pnc.calibrate(composite, Unread(), batch_size=0)


def test_numbers_and_choices_of_any_kind_give_one_line():
    for value in (math.nan, -math.inf, True, "1", None, 10**5000):
        with pytest.raises(InputError, match=r"^lr: expected a finite number"):
            check_finite(value, "lr")
    check_finite(0.5, "lr")
    with pytest.raises(InputError, match=r"expected one of one, two; got \['one'\]$"):
        check_choice(["one"], "number", ["one", "two"])


def test_a_share_just_above_one_is_no_percentage():
    with pytest.raises(InputError) as error:
        check_share(1.0000001, "max_macs", "the source's multiply-accumulates")
    assert "percent" not in str(error.value)
