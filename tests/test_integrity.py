import copy
import re

import pytest
import torch
from torch import nn

from pnc.integrity import differences, evaluating, fingerprint, first_difference, same_bits, snapshot


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4, 2))
    model[1].eval()  # a frozen norm inside a training model
    return model


def test_evaluating_restores_each_flag_also_after_an_error():
    model = network()
    flags = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise KeyError
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m[0].weight.data.view(-1)[5].mul_(1 + 1e-7), "values of 0.weight"),
        (lambda m: m[1].running_mean.add_(1), "values of 1.running_mean"),
        (lambda m: m[0].weight.requires_grad_(False), "requires_grad of 0.weight"),
        (lambda m: setattr(m[4].weight, "grad", torch.zeros(2, 4)), "gradient of 4.weight"),
        (lambda m: m[2].eval(), "submodule 2"),
        (lambda m: m.register_forward_hook(lambda *_: None), r"submodule \(root\)"),
        (lambda m: m.register_buffer("extra", torch.zeros(1)), "extra was added"),
        (lambda m: m.__delitem__(4), "4.weight was removed"),
        (lambda m: m.__setitem__(2, nn.Identity()), "submodule 2"),
    ],
)
def test_differences_names_every_kind_of_change(change, words):
    model = network()
    before = snapshot(model)
    assert differences(model, before) == []
    change(model)
    found = differences(model, before)
    assert found
    assert any(re.search(words, line) for line in found)


def test_same_bits_tells_zeros_apart_and_nan_alike():
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert same_bits(torch.arange(6).view(2, 3).T, torch.arange(6).view(2, 3).T.contiguous())


def test_fingerprint_ignores_wrappers_and_names_the_first_difference():
    model = network()
    expected = fingerprint(model)
    assert fingerprint(nn.DataParallel(model)) == expected
    assert fingerprint(copy.deepcopy(model).eval()) == expected
    assert first_difference(model, expected) is None
    model[4].bias.data[0] += 1
    assert "'4.bias'" in first_difference(model, expected)
    model[4] = nn.Linear(4, 3)
    assert "another architecture" in first_difference(model, expected)
    assert "another architecture" in first_difference(model.half(), expected)
