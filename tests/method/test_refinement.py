from functools import cache

import pytest
import torch

import pnc
from digits import NEW, pair, support
from pnc.channels.compaction import own_copy
from pnc.clones.adapter import Stitched
from pnc.clones.heads import DiscriminantHead
from pnc.foundation.network_state import differences, take_snapshot
from pnc.method import refinement
from pnc.method.held_out import run_parts, source_body
from pnc.method.refinement import Schedule, composite_class_loss, feature_loss, held_out_quality, refined, train, views


@cache
def task(n_base=5):
    nets = pair()
    data = support(n_base=n_base)
    return pnc.prepare_task(nets.source.module, nets.target.module, data, classes=NEW, **nets.names())


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setattr(refinement, "SCHEDULE", Schedule(learning_rate=0.003, n_steps=12, n_snapshots=3))


@cache
def place(n_base=5, choose=max):
    """The position with the largest (smallest) error of the closed form, and the source's part there."""
    found = pnc.scan(task(n_base))
    fitted = found.adapter(choose(found.positions, key=lambda p: (p.adapter_error, p.n_macs)))
    return fitted, own_copy(source_body(task(n_base), fitted.adapter.source_cut))


@pytest.mark.parametrize("n_base", [5, 0])
def test_refinement_is_never_worse_on_held_out_folds_and_says_what_it_gained(n_base):
    fitted, part = place(n_base)
    before = take_snapshot(part)
    found = refined(task(n_base), fitted, part)
    assert differences(part, before) == []
    closed, tuned = (
        held_out_quality(task(n_base), samples)
        for samples in run_parts(task(n_base), [(fitted, part), (found.fitted, part)])
    )
    assert tuned[0] >= closed[0] and tuned[1] <= closed[1]
    assert found.gain == tuned[0] - closed[0]
    if found.n_steps == 0:
        assert found.fitted.adapter is fitted.adapter
    else:
        assert tuned[1] < closed[1]
        assert not any(b.requires_grad for b in found.fitted.adapter.buffers())


def test_without_a_gain_the_closed_form_is_kept(monkeypatch):
    """A learning rate that destroys every adapter, at a position where the closed form is exact."""
    monkeypatch.setattr(refinement, "SCHEDULE", Schedule(learning_rate=100.0, n_steps=6, n_snapshots=2))
    fitted, part = place(choose=min)
    found = refined(task(), fitted, part)
    assert (found.n_steps, found.gain) == (0, 0)
    assert found.fitted.adapter is fitted.adapter and found.fitted.held_out == fitted.held_out


def test_a_refined_clone_says_so_and_is_reproducible(tmp_path):
    nets = pair()
    files = []
    for name in ("a", "b"):
        clone = pnc.clone(nets.source.module, nets.target.module, support(), refine=True, max_macs=0.3, **nets.names())
        assert clone.recipe["refine"].keys() == {"gain", "steps"}
        assert clone.recipe["refine"]["gain"] >= 0
        pnc.save(clone, tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


def test_training_lowers_the_loss_and_does_not_change_its_inputs():
    fitted, part = place()
    features = task().source.head.features
    data = views(task(), fitted.adapter.target_cut)
    stitched = Stitched(fitted.adapter, part, features)
    head = DiscriminantHead(5, 10, data.target_features.shape[1] + data.source_features.shape[1])
    before = [take_snapshot(module) for module in (stitched, head)]
    steps = train(stitched, head, data, composite_class_loss, Schedule(0.01, 60, 3), torch.Generator().manual_seed(0))
    assert len(steps) == 3
    assert [differences(module, was) for module, was in zip((stitched, head), before, strict=True)] == [[], []]
    with torch.no_grad():
        losses = [
            float(composite_class_loss(Stitched(adapter, part, features)(data.tensors), trained, data))
            for adapter, trained in [(fitted.adapter, head), *steps]
        ]
    assert losses[-1] < losses[1] < losses[0]


def test_views_are_what_both_networks_see():
    cut = place()[0].adapter.target_cut
    data = views(task(), cut)
    nets, images = pair(), task().samples.images[:]
    with torch.no_grad():
        # other batches, hence another order of summation
        torch.testing.assert_close(data.base_logits, nets.target.module(images), atol=1e-4, rtol=1e-4)
        logits = data.source_features @ task().source.head.weight.T + task().source.head.bias
        torch.testing.assert_close(logits, nets.source.module(images), atol=1e-4, rtol=1e-4)
    assert data.tensors.shape[1:] == cut.shape
    assert torch.equal(data.labels, task().samples.labels)
    own = data.select(torch.arange(4))
    assert float(feature_loss(own.source_features, None, own)) == 0
