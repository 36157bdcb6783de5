import re
from functools import cache
from typing import get_args

import pytest
import torch

import pnc
from digits import BASE, NEW, pair, support
from pnc.bench.channel_methods import masked_source_accuracy
from pnc.channels.channel_spaces import channel_spaces
from pnc.channels.mac_budget import Costs
from pnc.data.image_set import class_subset
from pnc.data.readers import load_data
from pnc.foundation.errors import InputError
from pnc.foundation.network_state import differences, take_snapshot
from pnc.method.held_out import source_body
from pnc.method.localization import aim, localizer
from pnc.method.localization.localizer import Method, localize

METHODS = get_args(Method)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    for name in ("GATES_STEPS", "NORMS_STEPS", "SURROGATE_STEPS"):
        monkeypatch.setattr(localizer, name, 12)


@cache
def case():
    """A task and the adapter behind which most of the source lies."""
    nets = pair()
    task = pnc.prepare_task(nets.source.module, nets.target.module, support(8, 3), classes=NEW, **nets.names())
    found = pnc.scan(task)
    return task, found.adapter(next(p for p in found.positions if p.is_exact)).adapter


def n_macs(part):
    return sum(node.meta["pnc"].n_macs for node in part.module.graph.nodes)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_budget_is_reproducible_and_changes_nothing(method):
    task, adapter = case()
    nets = pair()
    before = [take_snapshot(nets.source.module), take_snapshot(nets.target.module)]
    state = torch.get_rng_state()
    steps = []
    part, again = (localize(task, adapter, 0.4, method, progress=lambda *step: steps.append(step)) for _ in range(2))
    body = source_body(task, adapter.source_cut)
    costs = Costs(body, channel_spaces(body))
    assert 0.35 < part.density <= 0.4
    assert n_macs(part) == costs.n_macs(part.masks.flat) <= costs.bound(0.4)
    assert part.masks.to_bytes() == again.masks.to_bytes()
    for name, tensor in part.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name])
    assert differences(nets.source.module, before[0]) == [] == differences(nets.target.module, before[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert bool(steps) == (method in ("gates", "local-surrogate"))
    assert all(done <= total for _, done, total in steps)


def test_gates_leave_the_features_closer_to_the_sources_own_than_taylor_does(monkeypatch):
    for name in ("GATES_STEPS", "NORMS_STEPS"):
        monkeypatch.setattr(localizer, name, 60)
    task, adapter = case()
    body = source_body(task, adapter.source_cut)
    costs = Costs(body, channel_spaces(body))
    choice = localizer._Choice(task, adapter, body, costs, None)
    distances = {}
    for method in ("gates", "taylor"):
        module = localize(task, adapter, 0.2, method, norms=method == "gates").module
        batches = choice.batches()
        with torch.no_grad():
            distances[method] = sum(float(loss(module(x))) for (x, loss), _ in zip(batches, range(4), strict=False))
    assert distances["gates"] < 0.7 * distances["taylor"]


def test_weights_of_the_part_remain_the_sources(method="gates"):
    task, adapter = case()
    part = localize(task, adapter, 0.4, method, norms=True)
    plain = localize(task, adapter, 0.4, "random")
    names = set(part.module.state_dict())
    assert names == set(plain.module.state_dict())
    weights = dict(task.source.model.named_parameters())
    for name, tensor in part.module.named_parameters():
        values = set(weights[name].detach().flatten().tolist())
        assert set(tensor.flatten().tolist()) <= values, f"{name} holds values that the source does not have"


def test_channels_are_kept_in_multiples():
    task, adapter = case()
    part = localize(task, adapter, 0.5, "taylor", round_to=8)
    counts = {name: (int(mask.sum()), len(mask)) for name, mask in part.masks.kept.items()}
    assert all(kept % 8 == 0 or kept == size for kept, size in counts.values())
    assert any(kept < size for kept, size in counts.values())


def test_full_density_keeps_the_part_unchanged():
    task, adapter = case()
    part = localize(task, adapter, 1.0, "gates")
    assert part.masks is None and part.density == 1.0
    body = source_body(task, adapter.source_cut)
    assert all(torch.equal(part.module.state_dict()[name], tensor) for name, tensor in body.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "luck"}, "method: expected one of gates, taylor, magnitude, random, local-surrogate; got 'luck'"),
        ({"density": 0.0}, "density: expected a share of"),
        ({"density": 1.5}, "density: expected a share of"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    task, adapter = case()
    with pytest.raises(InputError, match=re.escape(message)):
        localize(task, adapter, **{"density": 0.5, "method": "taylor", **options})
    assert task.target.classes == BASE


def test_a_part_forgets_the_classes_that_are_not_cloned(monkeypatch):
    """Judged by the source's own head, on images that the part never saw: those of classes that are not cloned."""
    for name in ("GATES_STEPS", "NORMS_STEPS"):
        monkeypatch.setattr(localizer, name, 60)
    nets, classes = pair(), ("5", "7")
    task = pnc.prepare_task(
        nets.source.module, nets.target.module, support(20, 5, classes), classes=classes, **nets.names()
    )
    found = pnc.scan(task)
    fitted = found.adapter(next(p for p in found.positions if p.is_exact))
    test = class_subset(load_data("digits", "test"), NEW)
    whole, forgetful = (
        masked_source_accuracy(task, pnc.fit(task, fitted, density=density, tune="norms"), test)
        for density in (1.0, 0.5)
    )
    assert whole["cloned"] > 0.95 and whole["not_cloned"] > 0.95
    assert forgetful["cloned"] > 0.9
    assert forgetful["not_cloned"] < 0.3


def test_features_of_a_single_class_have_no_discriminants():
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(aim._discriminants(features, torch.full((6,), 3)), torch.zeros(4, 1))
    found = aim._discriminants(features, torch.tensor([2, 2, 2, 5, 5, 5]))
    torch.testing.assert_close(found[:, 0], -found[:, 1])  # rounding of the mean
