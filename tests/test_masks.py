import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from channel_zoo import Chain, Concatenation, FusedAttention, GroupedConvolution, SqueezeExcite
from pnc.channels import channel_spaces
from pnc.compaction import compact
from pnc.errors import InputError, MismatchError
from pnc.masks import ChannelMasks, channel_masks, masks_for_density, unit_params
from segments import half, network, segment_of

SEGMENTS = [segment_of(network(n)) for n in (Concatenation, FusedAttention, GroupedConvolution, SqueezeExcite)]
SPACES = [channel_spaces(segment, free_output=True) for segment in SEGMENTS]
ANY = st.integers(0, len(SEGMENTS) - 1)


def n_params(module):
    return sum(p.numel() for p in module.parameters())


def random_scores(spaces, seed):
    generator = torch.Generator().manual_seed(seed)
    return {space.name: torch.rand(space.size, generator=generator) for space in spaces.spaces}


def minimal(spaces):
    """One unit of each space."""
    return channel_masks(spaces, {space.name: torch.arange(space.size) == 0 for space in spaces.spaces})


@settings(deadline=None, max_examples=30)
@given(ANY, st.integers(0, 99))
def test_density_is_the_kept_share_of_all_parameters_that_can_go(number, seed):
    segment, spaces = SEGMENTS[number], SPACES[number]
    full = n_params(segment)
    masks, least = half(spaces, seed), minimal(spaces)
    removed, most_removed = (full - n_params(compact(segment, spaces, m)) for m in (masks, least))
    assert (1 - masks.density) * most_removed == pytest.approx((1 - least.density) * removed)


@settings(deadline=None, max_examples=50)
@given(ANY, st.integers(0, 99), st.floats(0.0, 1.0))
def test_the_budget_is_met_up_to_one_unit(number, seed, room):
    spaces = SPACES[number]
    least = minimal(spaces).density
    density = least + room * (1 - least)
    scores = random_scores(spaces, seed)
    masks = masks_for_density(spaces, scores, density)
    assert masks.density <= density  # also where exactly one unit per space fits
    assert all(bool(mask.any()) for mask in masks.kept.values())
    price, kept = unit_params(spaces), masks.flat
    ranking = torch.cat(list(scores.values())).double() / price
    if not bool(kept.all()):
        best_removed = torch.where(kept, -1.0, ranking).argmax()
        for space in spaces.spaces:  # nothing worse was kept, but for the best one of a space
            inside = slice(space.start, space.start + space.size)
            survivors = ranking[inside][kept[inside]]
            assert len(survivors) == 1 or bool((survivors >= ranking[best_removed]).all())
        more = kept.clone()
        more[best_removed] = True
        pieces = {space.name: more[space.start : space.start + space.size] for space in spaces.spaces}
        assert channel_masks(spaces, pieces).density > density


@given(ANY, st.integers(0, 99))
def test_bytes_come_back(number, seed):
    spaces = SPACES[number]
    masks = half(spaces, seed)
    data = masks.to_bytes()
    assert len(data) == 8 + (spaces.n_units + 7) // 8
    assert data == half(spaces, seed).to_bytes()
    back = ChannelMasks.from_bytes(data, spaces)
    assert back.density == masks.density
    assert list(back.kept) == [space.name for space in spaces.spaces]
    assert all(torch.equal(back.kept[name], masks.kept[name]) for name in masks.kept)


def test_bytes_of_other_spaces_are_refused():
    data = half(SPACES[0]).to_bytes()
    for wrong in (data[:-1], data + b"\0", bytes(8) + data[8:]):
        with pytest.raises(MismatchError, match="belong to other channel spaces than the given ones"):
            ChannelMasks.from_bytes(wrong, SPACES[0])
    with pytest.raises(MismatchError, match="use the network that the masks were made for"):
        ChannelMasks.from_bytes(data, SPACES[1])


def test_price_of_a_unit_is_what_removing_it_saves():
    segment, spaces = SEGMENTS[2], SPACES[2]
    for space in spaces.spaces:
        one = torch.arange(space.size) != 1
        saved = n_params(segment) - n_params(compact(segment, spaces, channel_masks(spaces, {space.name: one})))
        assert unit_params(spaces)[space.start + 1] == saved


def test_keep_gives_indices_and_missing_spaces_keep_all():
    spaces = channel_spaces(segment_of(network(FusedAttention)))
    masks = channel_masks(spaces, {"qkv": torch.tensor([True, False, True])})
    assert masks.keep("qkv").tolist() == [0, 2]
    assert masks.keep("up").tolist() == list(range(10))
    assert channel_masks(spaces, {}).density == 1.0
    assert 0 < masks.density < 1


def test_nothing_prunable_is_density_one():
    spaces = channel_spaces(segment_of(network(Chain), start="last"))
    assert spaces.spaces == ()
    masks = masks_for_density(spaces, {}, 0.5)
    assert masks.density == 1.0
    assert ChannelMasks.from_bytes(masks.to_bytes(), spaces).kept == {}


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"lost": torch.ones(8, dtype=torch.bool)}, "no channel space 'lost'; there are first"),
        ({"first": torch.ones(7, dtype=torch.bool)}, r"expected a bool mask of shape (8,), got torch.bool (7,)"),
        ({"first": torch.ones(8)}, r"expected a bool mask of shape (8,), got torch.float32 (8,)"),
        ({"first": torch.zeros(8, dtype=torch.bool)}, "keeps no unit of the space; at least one must stay"),
    ],
)
def test_masks_that_do_not_fit_are_refused(kept, message):
    spaces = channel_spaces(segment_of(network(Chain)))
    with pytest.raises(InputError, match=re.escape(message)):
        channel_masks(spaces, kept)


@pytest.mark.parametrize(
    ("scores", "density", "message"),
    [
        ({"first": torch.ones(8)}, 0.0, "density: expected a share in (0, 1], got 0.0"),
        ({"first": torch.ones(8)}, 1.5, "density: expected a share in (0, 1], got 1.5"),
        ({"first": torch.ones(8)}, 0.01, "0.01 cannot be reached, one unit of each space makes 0.1250 already"),
        ({}, 0.5, "scores['first']: expected 8 finite numbers, got nothing"),
        ({"first": torch.ones(7)}, 0.5, "scores['first']: expected 8 finite numbers, got shape (7,)"),
        ({"first": torch.full((8,), torch.nan)}, 0.5, "values that are not finite"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(scores, density, message):
    spaces = channel_spaces(segment_of(network(Chain)))
    with pytest.raises(InputError, match=re.escape(message)):
        masks_for_density(spaces, scores, density)
