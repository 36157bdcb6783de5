"""How the work of a scan grows, in counts that are the same on every machine; and the two shortcuts of large jobs."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch.testing import assert_close

import pnc
from digits import NEW, pair, support
from pnc.clones.adapter import Stitched
from pnc.data.folded_samples import spread_rows
from pnc.graph.cut_points import LOGITS, extract
from pnc.method import adapter_moments, held_out, one_position, positions, ridge
from pnc.method.adapter_fitting import AdapterFitter
from pnc.method.ridge import PENALTIES


def prepared(n_new=8, n_base=4, **settings):
    nets = pair()
    data = support(n_new, n_base)
    return pnc.prepare_task(nets.source.module, nets.target.module, data, classes=NEW, **nets.names(), **settings)


@dataclass
class Counts:
    """Operation counts of one scan."""

    factorizations: int = 0
    part_runs: int = 0
    part_samples: int = 0
    target_samples: int = 0
    source_samples: int = 0
    fitters: list = field(default_factory=list)


def counted(monkeypatch, task, **settings):
    """A scan and its operation counts."""
    counts = Counts()

    def counting(function, name, of=lambda *_: 1):
        def wrapped(*arguments, **options):
            setattr(counts, name, getattr(counts, name) + of(*arguments))
            return function(*arguments, **options)

        return wrapped

    def run(self, tensor):
        counts.part_runs, counts.part_samples = counts.part_runs + 1, counts.part_samples + len(tensor)
        return forward(self, tensor)

    def made(self, *arguments):
        init(self, *arguments)
        counts.fitters.append(self)

    def watched(recording, start, outputs):
        part = extract(recording, start, outputs)
        if LOGITS in outputs or len(outputs) > 1:
            name = "target_samples" if recording is task.target.recording else "source_samples"
            part.register_forward_pre_hook(counting(lambda *_: None, name, of=lambda _, inputs: len(inputs[0])))
        return part

    forward, init = Stitched.forward, AdapterFitter.__init__
    with monkeypatch.context() as patch:
        patch.setattr(ridge, "_solve", counting(ridge._solve, "factorizations"))
        patch.setattr(Stitched, "forward", run)
        patch.setattr(AdapterFitter, "__init__", made)
        for module in (adapter_moments, held_out):
            patch.setattr(module, "extract", watched)
        found = pnc.scan(task, **settings)
    return found, counts


def held_bytes(fitter):
    """Bytes of a fitter's moments and rows."""
    total = 0
    for folds in fitter._seen.values():
        for fold in folds.values():
            tensors = [fold.xx, fold.xy] if hasattr(fold, "xx") else [t for part in fold._parts for t in part[:2]]
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total


def test_each_sample_is_seen_twice_by_the_target_once_by_the_source_and_once_by_each_adapters_part(monkeypatch):
    task = prepared()
    n, n_folds = len(task.samples.labels), task.samples.n_folds
    found, counts = counted(monkeypatch, task, max_cuts=3)
    assert (counts.target_samples, counts.source_samples) == (2 * n, n)
    n_run = len(found.positions) - 1  # what the whole source does is known from the first pass
    assert counts.part_samples == n * n_run
    assert counts.part_runs == n_folds * n_run  # one batch for each fold
    (fitter,) = counts.fitters
    same = [one for one in found.positions if found.adapter(one).adapter.is_identity]  # from input to input
    assert len(same) == 1
    solved = (len({cut for _, cut in found.adapter_errors}) - 1) * (n_folds + 1)  # one target cut for each source cut
    measured = len(fitter._regressions) * n_folds * len(PENALTIES)
    assert counts.factorizations == solved + measured
    assert held_bytes(fitter) == fitter.n_bytes(n_folds)


def test_mirror_images_fit_adapters_but_do_not_score_positions(monkeypatch):
    task = prepared(flip=True)
    n = len(task.samples.labels)
    found, counts = counted(monkeypatch, task, max_cuts=3)
    assert (counts.target_samples, counts.source_samples) == (n + n // 2, n)
    assert counts.part_samples == n // 2 * (len(found.positions) - 1)
    samples = {found.adapter(one).adapter.is_identity: found.adapter(one).samples for one in found.positions}
    assert samples[False] is None, "heads are fitted on mirror images too"
    assert len(samples[True].labels) == n


def test_what_is_known_of_the_whole_source_is_what_running_it_gives():
    task = prepared(flip=True)
    found = pnc.scan(task, max_cuts=3)
    (whole,) = (found.adapter(one) for one in found.positions if one.is_exact)
    (run,) = held_out.run_parts(task, [(whole, held_out.source_body(task, whole.adapter.source_cut))])
    assert_close(vars(whole.samples), vars(run))
    judged = held_out.judge(run.select(~task.samples.is_copy))
    (position,) = (one for one in found.positions if one.is_exact)
    assert position.log_loss == pytest.approx(
        -held_out.outcome_of(judged.log_likelihoods, task.without_copies).average[0]
    )


def test_twice_the_samples_are_twice_the_runs_and_no_more_factorizations(monkeypatch):
    (_, few), (_, many) = (counted(monkeypatch, prepared(8 * k, 4 * k), max_cuts=3) for k in (1, 2))
    assert many.target_samples == 2 * few.target_samples and many.source_samples == 2 * few.source_samples
    assert many.part_samples / few.part_samples == pytest.approx(2, rel=0.35)  # another target cut may be as good
    assert many.factorizations <= 1.35 * few.factorizations


def test_pairs_are_ranked_on_a_part_if_the_moments_of_all_do_not_fit(monkeypatch):
    task = prepared(24, 8)
    found, _ = counted(monkeypatch, task)
    monkeypatch.setattr(adapter_moments, "RANKED_IMAGES", 60)
    small, counts = counted(monkeypatch, replace(task, memory=2**20))
    _, ranking, fitting = counts.fitters  # the first would have been too large
    assert len(ranking._columns) > len(fitting._columns)
    assert fitting.n_bytes(5) < ranking.n_bytes(5)
    assert small.adapter_errors.keys() == found.adapter_errors.keys()
    assert len(small.positions) == len({p.source_cut for p in found.positions})  # one target cut for each
    assert abs(small.choose().score - found.choose().score) <= 0.05
    for p in small.positions:
        least = min(e for (_, s), e in found.adapter_errors.items() if s == p.names[1])
        assert found.adapter_errors[p.names] <= 1.3 * least + 1e-9  # from input to input the error is 0


def test_the_best_positions_of_a_first_round_are_scored_again_on_all_images(monkeypatch):
    task = prepared(24, 8)
    whole = pnc.scan(task)
    monkeypatch.setattr(positions, "ROUND_MACS", 0)
    monkeypatch.setattr(positions, "FIRST_IMAGES", 50)
    monkeypatch.setattr(positions, "N_FINALISTS", 2)
    found, counts = counted(monkeypatch, task)
    n = len(task.samples.labels)
    again = [p for p in found.positions if p.n_images == n]
    assert 1 <= len(again) <= positions.N_FINALISTS
    assert {p.n_images for p in found.positions} == {50, n}
    adapted = [p for p in found.positions if not p.is_exact]
    assert counts.part_samples == 50 * len(adapted) + (n - 50) * len(
        [p for p in again if p in adapted]
    )  # no image twice
    scores = {p.names: p.score for p in whole.positions}
    assert all(p.score == scores[p.names] for p in again)
    assert found.choose() in again
    assert found.choose().score >= whole.choose().score - 0.02
    cheapest = min(p.macs_share for p in found.positions)
    assert found.choose(max_macs=cheapest).macs_share == cheapest


def test_a_large_support_is_scored_on_a_part(monkeypatch):
    monkeypatch.setattr(positions, "SCORED_IMAGES", 40)
    monkeypatch.setattr(positions, "FITTED_IMAGES", 50)
    task = prepared(12, 6)
    found, counts = counted(monkeypatch, task, max_cuts=2)
    assert {p.n_images for p in found.positions} == {40}
    assert counts.source_samples == 50
    made = pnc.fit(task, found.adapter(found.choose()))
    assert made.recipe["n_new_samples"] == 60


def test_a_part_of_the_support_keeps_base_images_of_each_fold():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, *([2] * 3), *([3] * 3), *([4] * 3)])
    folds, groups = torch.tensor([0, 1, 2] * 5), torch.arange(15)
    chosen = spread_rows(labels, groups, folds, 9, 2)
    assert sorted(folds[chosen & (labels < 2)].tolist()) == [0, 1, 2]
    assert chosen.sum() == 12, "and one image of each new class and fold"


def test_the_first_round_sees_base_images_and_reads_the_same_features(monkeypatch):
    task = prepared(8, 8)
    monkeypatch.setattr(positions, "ROUND_MACS", 0)
    monkeypatch.setattr(positions, "N_FINALISTS", 2)
    whole = pnc.scan(task)
    monkeypatch.setattr(positions, "FIRST_IMAGES", 20)  # fewer than one of each new class and fold
    found = pnc.scan(task)
    for pair_of_cuts, fitted in found.adapters.items():
        if fitted.samples is not None and not fitted.adapter.is_identity:
            assert_close(fitted.samples.target_features, whole.adapters[pair_of_cuts].samples.target_features)
    assert {p.n_images for p in found.positions} == {30, 80}


def test_there_is_one_round_if_the_first_takes_all_images(monkeypatch):
    task = prepared(5, 0)
    monkeypatch.setattr(positions, "ROUND_MACS", 0)
    monkeypatch.setattr(positions, "N_FINALISTS", 1)
    monkeypatch.setattr(positions, "FIRST_IMAGES", 20)  # but each new class needs one in each fold
    assert {p.n_images for p in pnc.scan(task).positions} == {25}


def test_little_memory_leaves_base_images_for_the_head():
    task = replace(prepared(8, 2), memory=2**15)
    few = one_position.head_images(task)
    assert len(few.samples.labels) < len(task.samples.labels)
    assert few.has_base
