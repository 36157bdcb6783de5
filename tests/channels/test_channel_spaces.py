import re

import pytest
import torch
from torch import nn

from channel_zoo import CASES, Chain, FusedAttention
from pnc.channels.channel_spaces import KEPT, channel_spaces
from pnc.foundation.network_state import differences, take_snapshot
from segments import assert_compact_is_masked, network, segment_of


@pytest.mark.parametrize("name", CASES)
def test_spaces_of(name):
    factory, expected, frozen = CASES[name]
    spaces = channel_spaces(segment_of(network(factory)))
    assert {space.name: (space.size, space.granule) for space in spaces.spaces} == expected
    for layer, reason in frozen.items():
        assert re.search(reason, spaces.frozen[layer]), spaces.frozen[layer]


@pytest.mark.parametrize("free_output", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_compact_is_masked_after_every_operation(name, free_output):
    factory, expected, _ = CASES[name]
    spaces = assert_compact_is_masked(segment_of(network(factory)), free_output)
    assert expected.keys() <= {space.name for space in spaces.spaces}


def test_units_are_numbered_in_the_order_of_the_forward_pass():
    spaces = channel_spaces(segment_of(network(FusedAttention)))
    assert [(space.name, space.start, space.size) for space in spaces.spaces] == [("qkv", 0, 3), ("up", 3, 10)]
    assert spaces.n_units == 13
    (rows,) = [s for s in spaces.slices if s.tensor == "qkv.weight"]
    assert rows.units.reshape(3, 3, 4).equal(torch.arange(3).reshape(1, 3, 1).expand(3, 3, 4))
    assert rows.zeroed and rows.dim == 0 and rows.is_parameter


def test_producers_and_consumers_are_named():
    (space,) = channel_spaces(segment_of(network(Chain))).spaces
    assert (space.producers, space.consumers) == (("first.weight", "first.bias"), ("last.weight",))


def test_a_free_output_tells_where_its_channels_are():
    segment = segment_of(network(Chain))
    assert channel_spaces(segment).output is None
    spaces = channel_spaces(segment, free_output=True)
    assert [space.name for space in spaces.spaces] == ["first", "last"]
    assert spaces.output.dim == 1
    assert spaces.output.units.tolist() == [8, 9, 10, 11, 12]


def test_channels_added_to_those_of_the_input_are_filled_in_again():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner, self.outer = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)
            self.last, self.head = nn.Conv2d(4, 5, 1), nn.Linear(5, 4)

        def forward(self, x):
            x = self.stem(x)
            return self.head(self.last(x + self.outer(self.inner(x))).mean((2, 3)))

    module = network(Blocks)
    whole = assert_compact_is_masked(segment_of(module))
    assert [space.name for space in whole.spaces] == ["stem", "inner"]  # outer's go with the stem's
    assert whole.refills == ()
    spaces = assert_compact_is_masked(segment_of(module, start="stem"))
    assert {space.name for space in spaces.spaces} == {"inner", "outer"}
    assert spaces.refills == (("add", "outer"),)
    assert all(bool((s.units != KEPT).any()) for s in spaces.slices)


@pytest.mark.parametrize("name", ["Chain", "FusedAttention", "ForeignNorms", "TorchAttention"])
def test_looking_changes_nothing(name):
    module = network(CASES[name][0]).train()
    module.requires_grad_(True)
    segment = segment_of(module)
    before, code, state = take_snapshot(module), segment.code, torch.get_rng_state()
    first, second = channel_spaces(segment), channel_spaces(segment)
    assert not differences(module, before)
    assert segment.code == code
    assert torch.get_rng_state().equal(state)
    assert first.spaces == second.spaces  # the same names and numbers every time: masks in files rely on it


class Counting(torch.overrides.TorchFunctionMode):
    """Counts operations on tensors."""

    n_calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.n_calls += 1
        return func(*args, **(kwargs or {}))


def test_the_work_grows_in_proportion_to_the_depth():
    def n_calls(depth):
        layers = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(depth)]
        module = network(lambda: nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)))
        segment = segment_of(module)
        with Counting() as counting:
            channel_spaces(segment)
        return counting.n_calls

    assert n_calls(40) < 2.2 * n_calls(20)
