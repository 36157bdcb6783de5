import copy
import re

import pytest
import torch
from torch import nn

from pnc.foundation import fingerprints
from pnc.foundation.fingerprints import KnownFingerprint, fingerprint, first_difference
from pnc.foundation.network_state import differences, evaluating, take_snapshot, undisturbed
from pnc.foundation.tensor_bits import same_bits


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
        (lambda m: m.register_forward_hook(lambda *_: None), r"hooks of submodule \(root\)"),
        (lambda m: m[0].to(memory_format=torch.channels_last), "0.weight is channels last on cpu, was contiguous"),
        (lambda m: m.register_buffer("extra", torch.zeros(1)), "extra was added"),
        (lambda m: m.__delitem__(4), "4.weight was removed"),
        (lambda m: m.__setitem__(2, nn.Identity()), "submodule 2"),
    ],
)
def test_differences_names_every_kind_of_change(change, words):
    model = network()
    before = take_snapshot(model)
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


def test_a_hook_in_place_of_another_is_a_difference():
    model = network()
    handle = model[0].register_forward_hook(lambda *_: None)
    before = take_snapshot(model)
    handle.remove()
    model[0].register_forward_hook(lambda *_: None)
    assert differences(model, before) == ["hooks of submodule 0 changed"]


def test_fingerprint_names_the_first_difference():
    model = network()
    expected = fingerprint(model)
    assert fingerprint(copy.deepcopy(model).eval()) == expected
    assert first_difference(model, expected) is None
    model[4].bias.data[0] += 1
    assert first_difference(model, expected) == "the values of '4.bias' differ"
    assert first_difference(model, expected, structure_only=True) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.bfloat16(), "architecture: '0.bias' is bfloat16, expected float32"),
        (lambda m: m[4].half(), "architecture: '4.bias' is float16, expected float32"),
        (
            lambda m: m.__setitem__(4, nn.Linear(4, 3)),
            r"architecture: '4.bias' has another shape than expected; it is \(3,\) in float32",
        ),
        (lambda m: m.__delitem__(4), "architecture: 2 tensors are missing after '1.weight'"),
        (
            lambda m: m.__setitem__(0, nn.Identity()),
            "architecture: a tensor is missing at the start, before '1.bias'",
        ),
        (lambda m: m.append(nn.Linear(2, 2)), "architecture: '5.bias' is a tensor that it should not have"),
        (lambda m: m.__setitem__(2, nn.PReLU()), "architecture: '2.weight' is a tensor that it should not have"),
        (
            lambda m: m.__setitem__(1, nn.GroupNorm(1, 4)),
            "a tensor is missing after '1.bias', before '1.weight'",
        ),
    ],
)
def test_another_architecture_is_described_by_its_first_tensor(change, words):
    model = network()
    expected = fingerprint(model)
    change(model)
    assert re.search(words, first_difference(model, expected))
    assert re.search("architecture", first_difference(model, expected, structure_only=True))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def test_fingerprints_do_not_depend_on_wrappers_and_memory_format():
    model = network()
    expected = fingerprint(model)
    assert fingerprint(nn.DataParallel(model)) == expected
    assert fingerprint(compiled(model)) == expected
    assert fingerprint(compiled(nn.DataParallel(model))) == expected
    assert fingerprint(copy.deepcopy(model).to(memory_format=torch.channels_last)) == expected
    inside = copy.deepcopy(model)
    inside[0] = nn.DataParallel(inside[0])
    inside[1] = compiled(inside[1])
    assert fingerprint(inside) == expected
    named = nn.ModuleDict({"module": nn.Linear(1, 1), "_orig": nn.Linear(1, 1)})
    assert len(fingerprint(named).tensors) == 4, "a layer of the user's may be called module"


def test_the_fingerprint_of_fixed_weights_is_fixed():
    """Clone files contain these digests: they must be the same in every version of pnc and torch."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    for number, tensor in enumerate(model.state_dict().values()):
        tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) + number)
    found = fingerprint(model)
    assert found.structure == "105f023f8fadf2271c43971c757ccb56"
    assert found.weights == "d8a249eb2569d2b0af684dc57f4a4dd3"
    assert found.tensors[0] == "5b0d19aeb9c80b5a"


def test_large_networks_are_digested_by_threads_to_the_same_digests(monkeypatch):
    model = network()
    expected = fingerprint(model)
    monkeypatch.setattr("pnc.foundation.tensor_bits._BYTES_FOR_THREADS", 0)
    assert fingerprint(model) == expected


def exchange(tensor):
    tensor.copy_(tensor.flip(0))


def write_past_the_count(tensor):
    tensor.data.view(-1)[0] += 1e-3


def write_by_numpy(tensor):
    tensor.detach().numpy().reshape(-1)[-1] = 7


def reverse_by_numpy(tensor):
    values = tensor.detach().numpy().reshape(-1)
    values[:] = values[::-1].copy()


CHANGES = [lambda t: t.add_(1e-3), exchange, write_past_the_count, write_by_numpy, reverse_by_numpy]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["0.weight", "1.running_mean", "4.bias"])
def test_a_known_fingerprint_is_computed_anew_where_a_tensor_has_changed(monkeypatch, change, name):
    model, known, calls = network(), KnownFingerprint(), []
    model[1].running_mean.copy_(torch.arange(4.0))
    monkeypatch.setattr(fingerprints, "fingerprint", lambda module: calls.append(module) or fingerprint(module))
    first = known.of(model)
    assert known.of(model) == first == fingerprint(model) and len(calls) == 1
    with torch.no_grad():
        change(model.state_dict()[name])
    assert known.of(model) == fingerprint(model) and known.of(model) != first and len(calls) == 2


def test_a_known_fingerprint_follows_tensors_that_were_replaced_and_odd_places_in_memory():
    model, known = network(), KnownFingerprint()
    first = known.of(model)
    model[4].bias = nn.Parameter(torch.arange(7.0)[3:5])  # not at a multiple of eight bytes
    assert known.of(model) == fingerprint(model) != first
    with torch.inference_mode():
        model[4].bias = nn.Parameter(torch.ones(2))
    assert known.of(model) == fingerprint(model)
    assert known.of(copy.deepcopy(model)) == fingerprint(model)


def test_training_in_bfloat16_reads_the_weights_of_each_step():
    # The block turns autocast off, and a cache that lives as long as the block would keep the first step's weights.
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    with undisturbed():
        outputs = []
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                outputs.append(layer(x).detach())
            with torch.no_grad():
                layer.weight += 1
    assert not torch.equal(*outputs)
