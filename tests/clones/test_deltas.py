import copy

import pytest
import torch
from torch import nn

from pnc.clones.deltas import CODE_BITS, delta_bytes, deltas_of, low_rank_deltas, merge, rank_of, rounded_deltas
from pnc.foundation.errors import MismatchError


def part():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 5, 3, groups=5), nn.Flatten(), nn.Linear(5, 7)
    return nn.Sequential(*layers).requires_grad_(False)


def tuned(module, size=0.1):
    generator = torch.Generator().manual_seed(1)
    return {
        name: parameter + size * torch.randn(parameter.shape, generator=generator)
        for name, parameter in module.named_parameters()
    }


def test_merged_weights_are_within_half_a_step_of_the_tuned_ones():
    module = part()
    wanted, before = tuned(module), copy.deepcopy(module)
    deltas = rounded_deltas(module, wanted)
    merge(module, deltas)
    for name, parameter in module.named_parameters():
        change = wanted[name] - before.get_parameter(name)
        if parameter.dim() < 2:
            assert torch.equal(parameter, before.get_parameter(name) + change.half().float())
            continue
        step = change.flatten(1).abs().amax(1) / (2 ** (CODE_BITS - 1) - 1)
        missed = (parameter - wanted[name]).flatten(1).abs().amax(1)
        assert bool((missed <= 0.51 * step).all()), name
        assert bool((missed > 0).any())
    assert sum(t.numel() * t.element_size() for t in deltas.tensors.values()) <= delta_bytes(before)
    assert 3 * deltas.codes.numel() >= 2 * sum(p.numel() for p in before.parameters() if p.dim() > 1)  # 6 bits each


def test_merging_is_the_same_in_every_memory_format_and_number_of_threads():
    plain, other = part(), part().to(memory_format=torch.channels_last)
    factors = {
        name: (torch.randn(len(p), rank_of(p, 4)), torch.randn(rank_of(p, 4), p[0].numel()))
        for name, p in plain.named_parameters()
        if p.dim() > 1
    }
    for deltas in (rounded_deltas(plain, tuned(plain)), low_rank_deltas(plain, factors, tuned(plain), 4)):
        one, two = copy.deepcopy(plain), copy.deepcopy(other)
        merge(one, deltas)
        merge(two, deltas)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_factors_of_low_rank_are_multiplied_and_take_few_bytes():
    module = part()
    before = copy.deepcopy(module)
    shapes = {name: (len(p), rank_of(p, 2), p[0].numel()) for name, p in module.named_parameters() if p.dim() > 1}
    assert shapes == {"0.weight": (5, 2, 27), "2.weight": (5, 2, 9), "4.weight": (7, 2, 5)}
    factors = {
        name: (torch.randn(rows, rank), torch.randn(rank, columns)) for name, (rows, rank, columns) in shapes.items()
    }
    deltas = low_rank_deltas(module, factors, dict(module.named_parameters()), 2)
    merge(module, deltas)
    for name, (left, right) in factors.items():
        expected = before.get_parameter(name) + (left.half().double() @ right.half().double()).reshape(
            before.get_parameter(name).shape
        )
        torch.testing.assert_close(module.get_parameter(name).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(module.get_parameter("1.weight"), before.get_parameter("1.weight"))
    assert deltas.left.numel() + deltas.right.numel() == 2 * (5 + 27 + 5 + 9 + 7 + 5)
    assert delta_bytes(before, 2) < delta_bytes(before, 4)


@pytest.mark.parametrize("broken", ["codes", "scales", "shifts", "two kinds", "no scales", "rank"])
def test_deltas_of_another_architecture_are_refused(broken):
    module = part()
    tensors = dict(rounded_deltas(module, tuned(module)).tensors)
    if broken == "two kinds":
        tensors |= {"left": torch.ones(1).half(), "right": torch.ones(1).half(), "rank": torch.ones(1).int()}
    elif broken == "no scales":
        del tensors["scales"]
    elif broken == "rank":
        tensors = {"left": torch.ones(17).half(), "right": torch.ones(41).half(), "rank": torch.tensor([-1]).int()}
    else:
        tensors[broken] = tensors[broken][:-1]
    before = copy.deepcopy(module)
    with pytest.raises(MismatchError, match="deltas: its deltas .*; load the file with the source it was made from"):
        merge(module, deltas_of(tensors))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before.parameters(), strict=True))
