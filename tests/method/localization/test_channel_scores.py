import re

import pytest
import torch

from channel_zoo import Chain, FusedAttention, Net, NormalizedHeads, NormInBetween, SqueezeExcite
from pnc.channels.channel_masks import channel_masks
from pnc.channels.channel_spaces import channel_spaces
from pnc.channels.compaction import mask_segment
from pnc.channels.mac_budget import Costs, masks_within
from pnc.foundation.errors import InputError
from pnc.foundation.network_state import differences, take_snapshot
from pnc.method.localization import channel_scores
from pnc.method.localization.channel_scores import (
    magnitude_scores,
    one_shot_ranking,
    random_scores,
    taylor_scores,
)
from segments import half, network, segment_of


def images(n, seed=1):
    return torch.randn((n, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def without(segment, spaces, space, unit):
    """The change of the outputs when one unit is masked."""
    masks = channel_masks(spaces, {space: torch.arange(len(half(spaces).kept[space])) != unit})
    x = images(4)
    return mask_segment(segment, spaces, masks)(x) - segment(x)


class Linear(Net):
    """A segment without nonlinearity after the first layer, for which the first order is exact."""


# -------------------------------------------------------------------------------------------------------------- scores


def test_taylor_estimates_the_squared_change_of_the_output(monkeypatch):
    monkeypatch.setattr(channel_scores, "N_PROJECTIONS", 3000)
    segment = segment_of(network(Linear))
    spaces = channel_spaces(segment)
    scores = taylor_scores(segment, spaces, images(4), seeded())
    expected = torch.stack([without(segment, spaces, "first", unit).square().sum() for unit in range(8)])
    # The mean of 3000 random directions: its relative standard error is at most sqrt(2 / 3000) = .026.
    torch.testing.assert_close(scores["first"], expected.detach(), rtol=0.12, atol=0.0)


@pytest.mark.parametrize("factory", [SqueezeExcite, FusedAttention, NormalizedHeads, NormInBetween])
def test_scores_of_several_samples_add_up(factory, monkeypatch):
    """Each sample has its own gates, even if windows or tokens are folded into the batch."""
    segment = segment_of(network(factory))
    spaces = channel_spaces(segment)
    x, direction = images(3), torch.randn(1, *segment(images(1)).shape[1:], generator=seeded(), dtype=torch.float64)
    monkeypatch.setattr(torch, "randn", lambda shape, **_: direction.expand(shape))  # the same for every sample
    together = taylor_scores(segment, spaces, x, seeded())
    single = [taylor_scores(segment, spaces, x[i : i + 1], seeded()) for i in range(3)]
    for name, scores in together.items():
        torch.testing.assert_close(scores, sum(s[name] for s in single))  # another order of sums


def test_taylor_finds_units_that_do_nothing():
    module = network(FusedAttention)
    with torch.no_grad():
        module.proj.weight[:, 4:8] = 0  # nobody reads the second head
        module.down.weight[:, 7] = 0
    segment = segment_of(module)
    scores = taylor_scores(segment, channel_spaces(segment), images(2), seeded())
    assert (scores["qkv"] == 0).tolist() == [False, True, False]
    assert (scores["up"] == 0).nonzero().tolist() == [[7]]


def test_taylor_counts_every_reader_and_the_free_output():
    segment = segment_of(network(SqueezeExcite))
    spaces = channel_spaces(segment, free_output=True)
    scores = taylor_scores(segment, spaces, images(2), seeded())
    assert list(scores) == ["first", "squeeze", "last"]
    assert bool((scores["first"] > 0).all()) and bool((scores["last"] > 0).all())


def test_magnitude_is_the_norm_of_the_rows_times_the_scale_of_the_norm():
    module = network(NormInBetween)
    segment = segment_of(module)
    spaces = channel_spaces(segment)
    scores = magnitude_scores(segment, spaces)["first"]
    expected = module.first.weight.flatten(1).norm(dim=1) * module.norm.weight.abs()
    torch.testing.assert_close(scores, (expected / expected.mean()).detach())  # another order of operations


def test_random_scores_are_uniform_over_all_units():
    spaces = channel_spaces(segment_of(network(FusedAttention)))
    flat = torch.cat(list(random_scores(spaces, seeded(3)).values()))
    assert torch.equal(flat, torch.rand(spaces.n_units, generator=seeded(3), dtype=torch.float64))


# ------------------------------------------------------------------------------------------------------------- rankings


def chosen(segment, inputs, density, **options):
    spaces = channel_spaces(segment)
    costs = Costs(segment, spaces)
    return masks_within(costs, one_shot_ranking(segment, costs, inputs, seeded(), **options), costs.bound(density))


@pytest.mark.parametrize("method", ["taylor", "magnitude", "random"])
def test_ranking_changes_nothing_and_is_reproducible(method):
    module = network(SqueezeExcite).requires_grad_(True).train()
    segment = segment_of(module)
    before, state = take_snapshot(module), torch.get_rng_state()
    masks, again = (chosen(segment, images(4), 0.6, method=method) for _ in range(2))
    assert masks.to_bytes() == again.to_bytes()
    assert not differences(module, before)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.get_rng_state().equal(state)


def test_units_without_effect_are_removed_first():
    module = network(Chain)
    with torch.no_grad():
        module.last.weight[:, [2, 5]] = 0
    masks = chosen(segment_of(module), images(4), 0.75)
    assert masks.keep("first").tolist() == [0, 1, 3, 4, 6, 7]


def test_effects_count_per_multiply_accumulate():
    segment = segment_of(network(SqueezeExcite))
    costs = Costs(segment, channel_spaces(segment))
    ranking = one_shot_ranking(segment, costs, images(4), seeded())
    scores = taylor_scores(segment, costs.spaces, images(4), seeded())
    for space in costs.spaces.spaces:
        prices = costs.prices()[space.start : space.start + space.size]
        assert torch.equal(ranking[space.name], scores[space.name] / prices)


def test_ranking_without_gradients_enabled_and_with_nothing_to_prune():
    segment = segment_of(network(Chain))
    expected = chosen(segment, images(4), 0.5)
    with torch.no_grad():
        assert chosen(segment, images(4), 0.5).to_bytes() == expected.to_bytes()
    rest = segment_of(network(Chain), start="last")
    assert chosen(rest, torch.zeros(2, 5, 4, 4), 0.5).kept == {}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (images(0), "expected a floating-point batch (N, 3, 8, 8) with N >= 1, got torch.float64 (0, 3, 8, 8)"),
        (images(4)[:, :2], "got torch.float64 (4, 2, 8, 8)"),
        (images(4).long(), "got torch.int64 (4, 3, 8, 8)"),
    ],
)
def test_bad_input_is_refused(inputs, message):
    with pytest.raises(InputError, match=re.escape(message)):
        chosen(segment_of(network(Chain)), inputs, 0.5)
