"""Sources that autograd cannot differentiate: refused before any work if gradients are needed, cloned if not."""

import re

import pytest
import torch
from torch import nn

import pnc
from pnc.foundation.errors import InputError
from pnc.method import paper_search, pipeline


class Then(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return 2 * tensor


def overwritten(tensor):
    found = tensor.sigmoid()
    found.mul_(2.0)
    return found


def without_gradient(tensor):
    with torch.no_grad():
        return tensor.relu()


BREAKS = {
    "spikes": lambda tensor: (tensor >= 0.2).float(),
    "overwritten": overwritten,
    "no backward": NoBackward.apply,
    "detached": torch.Tensor.detach,
    "data": lambda tensor: tensor.data,
    "rounded": lambda tensor: (4 * tensor).round() / 4,
    "no_grad": without_gradient,
    "signs": torch.sign,
}


def network(function=torch.relu, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)]
    return nn.Sequential(*layers, Then(function), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).eval()


def given():
    images = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return (images, list("abcd") * 6), {"source_classes": ["c", "d"], "base_classes": ["a", "b"]}


@pytest.mark.parametrize("name", BREAKS)
def test_methods_that_need_a_gradient_are_refused_at_that_position_and_others_work(name):
    support, names = given()
    task = pnc.prepare_task(network(BREAKS[name]), network(seed=1), support, classes=None, **names)
    found = pnc.scan(task, exhaustive=True)
    whole = found.adapter(next(one for one in found.positions if one.source_cut.name == "input"))
    for settings, words in (
        ({"density": 0.5}, "method: no gradient flows through the source from 'input' on"),
        ({"density": 0.5, "method": "taylor"}, "use method='magnitude', which needs none, or density=1"),
        ({"density": 0.5, "method": "local-surrogate"}, "which method='local-surrogate' needs"),
        ({"refine": True}, "which refine=True needs; leave refine out"),
    ):
        with pytest.raises(InputError, match=re.escape(words)) as error:
            pnc.fit(task, whole, **settings)
        assert "\n" not in str(error.value)
    assert pnc.fit(task, whole, density=0.5, method="magnitude").recipe["density"] <= 0.5
    assert pnc.fit(task, whole).recipe["density"] == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"density": 0.5}, "method: no gradient flows"),
        ({"density": "auto", "method": "taylor"}, "method: no gradient flows"),
        ({"refine": True}, "refine: no gradient flows"),
        ({"strategy": "sequential"}, "strategy: no gradient flows .* use strategy='scan'"),
    ],
)
def test_it_is_refused_before_the_scan_or_the_search(settings, words, monkeypatch):
    def scanned(*arguments, **settings):
        raise AssertionError("the scan was made first")

    monkeypatch.setattr(pipeline, "scan", scanned)
    monkeypatch.setattr(paper_search, "search", scanned)
    support, names = given()
    with pytest.raises(InputError, match=words):
        pnc.clone(network(torch.Tensor.detach), network(), support, **names, **settings)
