import copy
from dataclasses import replace
from functools import cache

import pytest
import torch

import pnc
from digits import NEW, pair, support
from pnc.clones.position_grids import pool
from pnc.foundation.errors import InputError
from pnc.graph.cut_points import extract
from pnc.graph.shared_trunk import shared_cut
from pnc.method.held_out import outcome_of, run_parts, source_body
from pnc.method.positions import COST_STEP, shortlist


@cache
def task(n_base: int = 5):
    nets = pair()
    data = support(n_base=n_base)
    return pnc.prepare_task(nets.source.module, nets.target.module, data, classes=NEW, **nets.names())


@cache
def found(n_base: int = 5):
    return pnc.scan(task(n_base))


def test_positions_are_sorted_by_log_loss_and_cost_what_their_parts_cost():
    scan, source = found(), task().source
    losses = [position.log_loss for position in scan.positions]
    assert losses == sorted(losses) and losses[0] > 0
    for position in scan.positions:
        adapter = scan.adapter(position).adapter
        assert (adapter.target_cut, adapter.source_cut) == (position.target_cut, position.source_cut)
        rest = source.head.features.n_macs - position.source_cut.n_macs
        assert position.n_macs == rest + adapter.n_macs
        assert position.macs_share == pytest.approx(position.n_macs / source.n_macs)
        body = source_body(task(), position.source_cut)
        assert position.n_params == adapter.n_params + sum(p.numel() for p in body.parameters())
        assert 0 <= position.score <= 1
        assert position.standard_error < 0.1


def test_the_whole_source_is_chosen_if_parts_are_worse_and_no_bound_forbids_it():
    scan = found()
    (whole,) = (position for position in scan.positions if position.is_exact)
    worse = dict(scan.outcomes)
    for position in scan.positions:
        if position is not whole:
            values = torch.full_like(scan.outcomes[position.names].values, -9.0)
            worse[position.names] = replace(scan.outcomes[position.names], values=values)
    positions = tuple(replace(p, log_loss=p.log_loss if p is whole else 9.0) for p in scan.positions)
    assert replace(scan, positions=positions, outcomes=worse).choose().names == whole.names
    assert replace(scan, positions=positions, outcomes=worse).choose(max_macs=0.9).macs_share <= 0.9


def test_all_pairs_have_an_error_but_few_are_run():
    scan = found()
    targets, sources = ({names[side] for names in scan.adapter_errors} for side in (0, 1))
    assert len(scan.adapter_errors) == len(targets) * len(sources)
    assert len(scan.positions) <= 2 * len(sources)
    everything = pnc.scan(task(), exhaustive=True)
    assert len(everything.positions) == len(scan.adapter_errors)
    best = {(p.target_cut.name, p.source_cut.name): p.score for p in everything.positions}
    assert all(best[p.target_cut.name, p.source_cut.name] == p.score for p in scan.positions)


def test_a_trunk_that_both_networks_share_is_not_run_twice():
    """The target is the source with other last layers, as after fine-tuning."""
    nets = pair()
    target = copy.deepcopy(nets.source.module)
    names = {"classes": NEW, "source_classes": NEW, "base_classes": nets.target.classes}
    changed = list(target.parameters())[-4:]
    with torch.no_grad():
        for parameter in changed:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    shared = pnc.prepare_task(nets.source.module, target, support(), **names)
    scan = pnc.scan(shared)
    assert scan.shared == scan.positions[0].source_cut.n_macs / shared.source.n_macs > 0.7
    assert f"{scan.shared:.1%} of the source's MACs are not added" in str(scan)
    (deepest,) = (position for position in scan.positions if scan.adapter(position).adapter.is_identity)
    assert deepest.target_cut.name == deepest.source_cut.name and deepest.adapter_error == 0
    assert deepest.macs_share == max(position.macs_share for position in scan.positions) < 0.3
    clone = pnc.fit(shared, scan.adapter(deepest))
    trunk = extract(shared.target.recording, None, [deepest.target_cut])
    teacher = extract(shared.source.recording, None, [shared.source.head.features])
    with torch.no_grad():
        features = clone.branch.stitched(trunk(support().images))
        expected = pool(teacher(support().images), shared.source.head.features)
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("n_kept", [2, 4, 6])
def test_the_trunk_is_left_at_its_last_cut_even_among_few_cuts(n_kept, tmp_path):
    """A clone adds only what comes after the layers that both networks share; with a new head alone, nothing."""
    nets = pair()
    target = copy.deepcopy(nets.source.module)
    names = {"source_classes": NEW, "base_classes": nets.target.classes}
    with torch.no_grad():
        for parameter in list(target.parameters())[-n_kept:]:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    made = pnc.prepare_task(nets.source.module, target, support(), classes=NEW, **names)
    recordings = made.target.recording, made.source.recording
    scan = pnc.scan(made, max_cuts=2)
    chosen = next(position for position in scan.positions if position.is_exact)
    assert (chosen.target_cut, chosen.source_cut) == shared_cut(*recordings)
    rest = made.source.head.features.n_macs - chosen.source_cut.n_macs
    assert chosen.n_macs == rest == max(position.n_macs for position in scan.positions)
    assert n_kept > 2 or rest == 0
    path = tmp_path / "clone.safetensors"
    pnc.save(pnc.fit(made, scan.adapter(chosen), name="new"), path)
    net = pnc.attach(target, pnc.load(path, source=nets.source.module))
    images = support().images
    with torch.no_grad():
        assert torch.equal(net(images)[:, :5], target(images))
    assert pnc.clone(nets.source.module, target, support(), effort="seconds", **names).recipe["macs_share"] <= (
        rest / made.source.n_macs
    )


def test_the_shortlist_pairs_each_source_cut_with_the_target_cut_whose_adapter_misses_least():
    cuts = {cut.name: cut for position in found().positions for cut in (position.target_cut, position.source_cut)}
    (a, b), s = list(cuts.values())[:2], next(iter(cuts.values()))
    errors = {(a.name, s.name): 0.52, (b.name, s.name): 0.50}
    assert shortlist([a, b], [s], errors) == [(b, s)]


def test_the_front_is_not_beaten():
    front = found().front()
    assert [p.n_macs for p in front] == sorted({p.n_macs for p in front})
    assert [p.log_loss for p in front] == sorted({p.log_loss for p in front}, reverse=True)
    assert front[-1].log_loss == found().positions[0].log_loss
    for position in found().positions:
        assert any(p.n_macs <= position.n_macs and p.log_loss <= position.log_loss for p in front)


def test_the_front_within_a_bound_on_bytes_has_only_positions_within_it():
    bytes_of = sorted({p.n_bytes for p in found().positions})
    for bound in bytes_of:
        front = found().front(bound)
        allowed = [p for p in found().positions if p.n_bytes <= bound]
        assert front[0].n_macs == min(p.n_macs for p in allowed)
        assert front[-1].log_loss == min(p.log_loss for p in allowed)
    assert found().front(bytes_of[0] - 1) == ()


def test_the_choice_is_the_cheapest_within_standard_errors_and_bounds():
    scan = found()
    best = scan.positions[0]
    for n_errors in (0.0, 1.0, 2.0):
        losses = {p: scan.loss_against(p, best) for p in scan.positions}
        as_good = [p for p, (loss, error) in losses.items() if loss <= n_errors * error + 1e-12]  # rounding
        chosen, cheapest = scan.choose(n_errors=n_errors), min(p.macs_share for p in as_good)
        assert chosen in as_good and chosen.macs_share <= cheapest + COST_STEP
        alike = [p for p in as_good if p.macs_share <= cheapest + COST_STEP and p.is_exact == chosen.is_exact]
        assert chosen.log_loss == min(p.log_loss for p in alike)
    assert scan.choose(n_errors=0.0).log_loss == best.log_loss
    assert scan.choose(max_macs=0.3).macs_share <= 0.3
    with pytest.raises(InputError, match="max_macs=1e-09: the cheapest position adds"):
        scan.choose(max_macs=1e-9)
    smallest = min(p.n_bytes for p in scan.positions)
    assert scan.choose(max_bytes=smallest).n_bytes == smallest
    with pytest.raises(
        InputError, match=f"max_bytes={smallest - 1}: the smallest file is estimated at up to {smallest} bytes"
    ):
        scan.choose(max_bytes=smallest - 1)


@pytest.mark.parametrize("n_base", [5, 0])
def test_a_thin_file_is_no_larger_than_the_scan_says_and_not_much_smaller(tmp_path, n_base):
    for position in found(n_base).positions[:: len(found(n_base).positions) - 1]:
        clone = pnc.fit(task(n_base), found(n_base).adapter(position))
        size = pnc.save(clone, tmp_path / "clone")
        assert size <= position.n_bytes <= size + 2000


def test_an_adapter_must_save_macs_to_be_chosen_before_an_exact_position():
    scan = found()
    (whole,) = (position for position in scan.positions if position.is_exact)
    part = next(position for position in scan.positions if not position.is_exact)
    assert all(position.n_macs <= whole.n_macs for position in scan.positions), "what costs more is not run"
    same = dict.fromkeys(scan.outcomes, scan.outcomes[part.names])
    for saved, chosen in ((0.05, whole), (0.2, part)):
        cheaper = replace(part, macs_share=whole.macs_share - saved)
        pair = replace(scan, positions=(cheaper, whole), outcomes=same)
        assert pair.choose().names == chosen.names


def test_positions_are_compared_on_the_same_images():
    scan = found()
    best, worst = scan.positions[0], scan.positions[-1]
    loss, error = scan.loss_against(worst, best)
    assert loss == pytest.approx(worst.log_loss - best.log_loss)
    likelihoods = [scan.outcomes[position.names].values for position in (best, worst)]
    is_base = scan.outcomes[best.names].is_base
    parts = [(likelihoods[0] - likelihoods[1])[rows] for rows in (is_base, ~is_base)]
    assert error == pytest.approx(sum(part.var(correction=0) / len(part) / 4 for part in parts) ** 0.5)
    assert scan.loss_against(best, best) == (0, 0)


def test_two_scans_agree_bit_for_bit():
    again = pnc.scan(task())
    for one, two in zip(found().positions, again.positions, strict=True):
        assert (one.score, one.adapter_error, one.target_cut) == (two.score, two.adapter_error, two.target_cut)


def test_each_image_passes_the_adapter_that_has_not_seen_it():
    scan = found()
    position = scan.positions[-1]
    fitted, body = scan.adapter(position), source_body(task(), position.source_cut)
    (samples,) = run_parts(task(), [(fitted, body)])
    taps = extract(task().target.recording, None, [position.target_cut, "logits"])
    with torch.no_grad():
        tensor = taps(task().samples.images[:])[0]
        for fold in range(task().samples.n_folds):
            rows = task().samples.folds == fold
            expected = body(fitted.held_out[fold](tensor[rows])).float()
            # another batch, hence another order of summation
            torch.testing.assert_close(samples.clone_features[rows], expected, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(fitted.held_out[fold].weight, fitted.adapter.weight)


def test_without_base_samples_positions_are_scored_among_the_new_classes():
    scan = found(n_base=0)
    assert max(position.score for position in scan.positions) > 0.9
    assert all(position.score >= 0.1 for position in scan.positions)


def test_copies_of_one_image_count_once():
    correct = torch.arange(len(task().samples.labels)) % 3 > 0
    mean, error = outcome_of(correct, task()).average
    is_base = task().samples.labels < 5
    assert mean == pytest.approx((correct[is_base].double().mean() + correct[~is_base].double().mean()) / 2)
    nets = pair()
    twice = pnc.prepare_task(nets.source.module, nets.target.module, support(), classes=NEW, flip=True, **nets.names())
    # a mirrored copy that is correct exactly when its original is adds no evidence
    of_image = correct[task().samples.groups.argsort()]
    again = outcome_of(of_image[twice.samples.groups], twice).average
    assert again == pytest.approx((mean, error))


def test_progress_reaches_its_end():
    seen = []
    pnc.scan(task(), progress=lambda what, done, total: seen.append((what, done, total)))
    ends = {what: done == total for what, done, total in seen}
    assert ends == {"fitting adapters": True, "scoring positions": True}
