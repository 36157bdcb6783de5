import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from channel_zoo import Chain, Concatenation, FusedAttention, GroupedConvolution, SqueezeExcite
from pnc.channels.channel_masks import ChannelMasks, channel_masks
from pnc.channels.channel_spaces import channel_spaces
from pnc.foundation.errors import InputError, MismatchError
from segments import half, network, segment_of

SEGMENTS = [segment_of(network(n)) for n in (Concatenation, FusedAttention, GroupedConvolution, SqueezeExcite)]
SPACES = [channel_spaces(segment, free_output=True) for segment in SEGMENTS]
ANY = st.integers(0, len(SEGMENTS) - 1)


@given(ANY, st.integers(0, 99))
def test_bytes_come_back(number, seed):
    spaces = SPACES[number]
    masks = half(spaces, seed)
    data = masks.to_bytes()
    assert len(data) == 8 + (spaces.n_units + 7) // 8
    assert data == half(spaces, seed).to_bytes()
    back = ChannelMasks.from_bytes(data, spaces.sizes)
    assert list(back.kept) == [space.name for space in spaces.spaces]
    assert all(torch.equal(back.kept[name], masks.kept[name]) for name in masks.kept)


def test_bytes_of_other_spaces_are_refused():
    data = half(SPACES[0]).to_bytes()
    for wrong in (data[:-1], data + b"\0", bytes(8) + data[8:]):
        with pytest.raises(MismatchError, match="for other channel spaces than the given ones"):
            ChannelMasks.from_bytes(wrong, SPACES[0].sizes)
    with pytest.raises(MismatchError, match="use the network that the masks were made for"):
        ChannelMasks.from_bytes(data, SPACES[1].sizes)


def test_keep_gives_indices_and_missing_spaces_keep_all():
    spaces = channel_spaces(segment_of(network(FusedAttention)))
    masks = channel_masks(spaces, {"qkv": torch.tensor([True, False, True])})
    assert masks.keep("qkv").tolist() == [0, 2]
    assert masks.keep("up").tolist() == list(range(10))
    assert bool(channel_masks(spaces, {}).flat.all())


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
