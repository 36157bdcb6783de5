import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from channel_zoo import Chain, Concatenation, ExplicitAttention, GroupedConvolution, SqueezeExcite
from pnc.channels.channel_masks import channel_masks
from pnc.channels.channel_spaces import channel_spaces
from pnc.channels.compaction import compact
from pnc.channels.mac_budget import Costs, masks_within
from pnc.foundation.errors import InputError
from pnc.models.reference_networks import mobilenetv2, resnet
from segments import half, network, segment_of

SEGMENTS = [
    *(segment_of(network(n)) for n in (Concatenation, ExplicitAttention, GroupedConvolution, SqueezeExcite)),
    segment_of(network(lambda: resnet((3, 8, 8), 3, 1))),
    segment_of(network(lambda: mobilenetv2((3, 8, 8), 3, 0.25))),
]
COSTS = [Costs(segment, channel_spaces(segment, free_output=True)) for segment in SEGMENTS]
ANY = st.integers(0, len(SEGMENTS) - 1)


def measured_macs(segment, shape=(3, 8, 8)):
    """Multiply-accumulates per sample, counted in runs of two sizes, so that operations on weights alone cancel."""
    counts = []
    for n_samples in (2, 3):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            segment(torch.zeros(n_samples, *shape, dtype=torch.float64))
        counts.append(counter.get_total_flops())
    return (counts[1] - counts[0]) // 2


def ranks(spaces, seed):
    generator = torch.Generator().manual_seed(seed)
    return {space.name: torch.rand(space.size, generator=generator) for space in spaces.spaces}


def counts(costs, masks):
    """Kept channels and all channels of each space, counted in the first producer."""
    return [(int(masks.kept[s.name].sum()) * s.granule, s.size * s.granule) for s in costs.spaces.spaces]


@settings(deadline=None, max_examples=12)
@given(ANY, st.integers(0, 99))
def test_macs_of_masks_are_those_of_the_compacted_segment(number, seed):
    segment, costs = SEGMENTS[number], COSTS[number]
    masks = half(costs.spaces, seed)
    assert costs.n_macs(masks.flat) == measured_macs(compact(segment, costs.spaces, masks))
    assert costs.most == measured_macs(segment)
    assert costs.density(torch.ones(costs.spaces.n_units, dtype=torch.bool)) == 1.0


@settings(deadline=None, max_examples=12)
@given(ANY, st.integers(0, 99), st.floats(0.0, 1.0), st.sampled_from([1, 2, 3, 4]))
def test_the_bound_is_kept_and_no_room_is_left(number, seed, density, round_to):
    costs = COSTS[number]
    wanted = ranks(costs.spaces, seed)
    n_macs = costs.bound(density)
    try:
        masks = masks_within(costs, wanted, n_macs, round_to)
    except InputError:
        assert round_to > 1, "one unit of each space is within any density"
        return
    assert measured_macs(compact(SEGMENTS[number], costs.spaces, masks)) <= n_macs
    kept = masks.flat
    for space, (n_kept, n_all) in zip(costs.spaces.spaces, counts(costs, masks), strict=True):
        step = round_to // math.gcd(round_to, space.granule)
        assert n_kept % round_to == 0 or n_kept == n_all
        inside = slice(space.start, space.start + space.size)
        order = wanted[space.name].argsort(descending=True)
        n_units = n_kept // space.granule
        assert bool(kept[inside][order[:n_units]].all()), "the best of each space stay"
        if n_kept < n_all:
            more = kept.clone()
            more[inside][order[n_units : n_units + step]] = True
            assert costs.n_macs(more) > n_macs


def test_a_density_of_one_keeps_all_and_of_nearly_none_one_unit_of_each_space():
    for costs in COSTS:
        everything = masks_within(costs, ranks(costs.spaces, 0), costs.bound(1.0))
        assert bool(everything.flat.all())
        least = masks_within(costs, ranks(costs.spaces, 0), costs.bound(1e-9))
        assert [int(mask.sum()) for mask in least.kept.values()] == [1] * len(least.kept)
        assert costs.density(least.flat) == 0.0
        assert costs.n_macs(least.flat) == costs.least


def test_the_ranking_goes_across_spaces():
    """Two layers of equal price: the units of highest rank stay, in either layer."""
    segment = segment_of(network(lambda: resnet((3, 8, 8), 3, 2)))
    costs = Costs(segment, channel_spaces(segment))
    first, second = [s.name for s in costs.spaces.spaces if s.size == 16 and "conv1" in s.name]
    for high, low in ((first, second), (second, first)):
        nothing = {space.name: torch.zeros(space.size) for space in costs.spaces.spaces}
        kept = masks_within(costs, {**nothing, high: torch.ones(16)}, costs.bound(0.2)).kept
        assert int(kept[high].sum()) == 16
        assert int(kept[low].sum()) < 16


def test_price_of_a_unit_is_what_removing_it_saves():
    for costs in COSTS:
        prices = costs.prices()
        for space in costs.spaces.spaces:
            one = torch.arange(space.size) != 1
            kept = channel_masks(costs.spaces, {space.name: one}).flat
            # Products of shares, in another order.
            assert float(prices[space.start + 1]) == pytest.approx(costs.most - costs.n_macs(kept), rel=1e-9)


def test_nothing_prunable_is_density_one():
    segment = segment_of(network(Chain), start="last")
    costs = Costs(segment, channel_spaces(segment))
    assert costs.spaces.spaces == ()
    assert costs.density(torch.zeros(0, dtype=torch.bool)) == 1.0
    assert costs.bound(0.5) == costs.most == costs.least == measured_macs(segment, (5, 4, 4))
    assert masks_within(costs, {}, costs.most).kept == {}


def test_a_density_made_from_macs_gives_them_back():
    costs = COSTS[0]
    for n_macs in range(costs.least, costs.most + 1, 97):
        assert costs.bound((n_macs - costs.least) / (costs.most - costs.least)) == n_macs


def test_spaces_smaller_than_the_step_stay_whole():
    module = network(lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Flatten(), nn.Linear(512, 3)))
    segment = segment_of(module)
    costs = Costs(segment, channel_spaces(segment))
    assert [space.size for space in costs.spaces.spaces] == [6, 8][: len(costs.spaces.spaces)]
    masks = masks_within(costs, ranks(costs.spaces, 0), costs.most - 1, round_to=4)
    assert counts(costs, masks)[0] == (4, 6)
    with pytest.raises(InputError, match="round_to=16"):
        masks_within(costs, ranks(costs.spaces, 0), costs.most - 1, round_to=16)


@pytest.mark.parametrize(
    ("ranking", "options", "message"),
    [
        ({"first": torch.ones(8)}, {"n_macs": 1}, "n_macs: 1 multiply-accumulates are too few"),
        ({"first": torch.ones(8)}, {"round_to": 0}, "round_to: expected a whole number, at least 1; got 0"),
        ({}, {}, "ranking['first']: expected 8 finite numbers, got nothing"),
        ({"first": torch.ones(7)}, {}, "ranking['first']: expected 8 finite numbers, got shape (7,)"),
        ({"first": torch.full((8,), torch.nan)}, {}, "values that are not finite"),
    ],
)
def test_what_cannot_be_is_refused(ranking, options, message):
    segment = segment_of(network(Chain))
    costs = Costs(segment, channel_spaces(segment))
    with pytest.raises(InputError, match=re.escape(message)):
        masks_within(costs, ranking, options.get("n_macs", costs.most), options.get("round_to", 1))
