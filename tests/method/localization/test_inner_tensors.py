from functools import cache

import pytest
import torch

import pnc
from channel_zoo import CASES
from digits import BASE, NEW, pair, support
from pnc.channels.channel_spaces import channel_spaces
from pnc.channels.compaction import compact, mask_segment
from pnc.graph.classifier import find_head
from pnc.graph.cut_points import cut_points, extract
from pnc.graph.recording import record
from pnc.method.localization.inner_tensors import InnerTensors, kept_channels, with_inner_outputs
from pnc.method.localization.localizer import localize
from segments import Values, half, network


@cache
def case():
    """A task, and the adapter behind which the whole source lies."""
    nets = pair()
    task = pnc.prepare_task(nets.source.module, nets.target.module, support(), classes=NEW, **nets.names())
    found = pnc.scan(task)
    return task, found.adapter(next(p for p in found.positions if p.is_exact)).adapter


def test_the_source_itself_is_at_no_distance_from_itself():
    task, adapter = case()
    part, images = localize(task, adapter, 1.0), support().images[:20]
    inner = InnerTensors(task, adapter.source_cut, part)
    output, *found = inner.module(images)
    assert torch.equal(output, part.module(images))
    assert len(found) == 3
    assert float(inner.distance(found, inner.aim.answers(images), len(images))) < 1e-8


def test_a_thinned_part_is_compared_on_the_channels_that_it_keeps():
    task, adapter = case()
    part, images = localize(task, adapter, 0.5, "taylor"), support().images[:20]
    inner = InnerTensors(task, adapter.source_cut, part)
    output, *found = inner.module(images)
    wanted = inner.aim.answers(images)
    assert torch.equal(output, part.module(images))
    assert any(own.shape[1] < other.shape[1] for own, other in zip(found, wanted.inner, strict=True))
    both = [
        inner.distance([tensor[rows] for tensor in found], wanted.select(rows), 20)
        for rows in (torch.arange(8), torch.arange(8, 20))
    ]
    together = inner.distance(found, wanted, 20)
    assert float(together) > 0.01
    torch.testing.assert_close(both[0] + both[1], together)


@pytest.mark.parametrize("name", CASES)
def test_inner_tensors_have_the_channels_that_are_said_to_be_kept(name):
    """On every kind of network: the masked one's tensor, on these channels, is the compacted one's."""
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    recording = record(network(CASES[name][0]), images[:2])
    cuts = cut_points(recording)[1:]
    whole = extract(recording, None, [find_head(recording).features])
    spaces = channel_spaces(whole)
    masks = half(spaces)
    left = kept_channels(whole, masks, cuts)
    assert set(left) <= {cut.name for cut in cuts}
    masked, smaller = mask_segment(whole, spaces, masks), compact(whole, spaces, masks)
    module, compared = with_inner_outputs(smaller, cuts, left)
    values = Values(masked)
    with torch.no_grad():
        output, *found = module(images)
        values.run(images.clone())
        assert torch.equal(output, smaller(images))
    assert compared
    for cut, own in zip(compared, found, strict=True):
        other = values.values[cut.name]
        if (channels := left.get(cut.name)) is not None:
            other = other.index_select(channels.dim, channels.units)
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9, msg=lambda m, cut=cut: f"{cut.name}: {m}")


def test_nothing_is_compared_if_the_part_should_forget_other_classes():
    nets = pair()
    some = NEW[:2]
    images = pnc.draw_support(pnc.load_data("digits", "train"), some, BASE, n_new=8, n_base=3)
    task = pnc.prepare_task(nets.source.module, nets.target.module, images, classes=some, **nets.names())
    found = pnc.scan(task)
    adapter = found.adapter(next(p for p in found.positions if p.is_exact)).adapter
    inner = InnerTensors(task, adapter.source_cut, localize(task, adapter, 0.5, "taylor"))
    (output,) = inner.module(images.images[:5])
    assert len(output) == 5
    assert float(inner.distance([], inner.aim.answers(images.images[:5]), 5)) == 0
