from functools import cache

import pytest
import torch

import pnc
from digits import NEW, held_out_images, pair, support
from pnc.channels.compaction import own_copy
from pnc.composite.metrics import measure_logits
from pnc.foundation.errors import InputError
from pnc.foundation.network_state import differences, take_snapshot
from pnc.method import paper_search
from pnc.method.held_out import Outcome, source_body
from pnc.method.paper_search import depths, search
from pnc.method.source_part import SourcePart


@pytest.fixture(autouse=True)
def _fewer_steps(monkeypatch):
    monkeypatch.setattr(paper_search, "N_STEPS", 60)
    monkeypatch.setattr(paper_search, "LEARNING_RATES", (0.003, 0.01))


@cache
def task(n_base=5):
    nets = pair()
    data = support(n_base=n_base)
    return pnc.prepare_task(nets.source.module, nets.target.module, data, classes=NEW, **nets.names())


def accuracy(clone):
    test, target = held_out_images(), pair().target.module
    with torch.no_grad():
        return measure_logits(pnc.attach(target, clone)(test.images), test.labels, target(test.images))


def clone(**settings):
    nets = pair()
    data = settings.pop("support", None) or support()
    return pnc.clone(nets.source.module, nets.target.module, data, strategy="sequential", **nets.names(), **settings)


def test_a_sequential_clone_works_like_any_other(tmp_path):
    nets = pair()
    before = [take_snapshot(net.module) for net in (nets.source, nets.target)]
    state = torch.get_rng_state()
    made = clone()
    assert torch.equal(torch.get_rng_state(), state)
    assert [differences(net.module, was) for net, was in zip((nets.source, nets.target), before, strict=True)] == [
        [],
        [],
    ]
    assert made.recipe["strategy"] == "sequential" and made.recipe["learning_rate"] in (0.003, 0.01)
    found = accuracy(made)
    assert found.average_accuracy > 0.85  # the closed form reaches .96
    assert found.conditional_kl <= 1e-6
    pnc.save(made, tmp_path / "c")
    images = held_out_images().images
    loaded = pnc.load(tmp_path / "c", source=nets.source.module)
    with torch.no_grad():
        logits = [pnc.attach(nets.target.module, one)(images) for one in (made, loaded)]
    assert torch.equal(*logits)


def test_masks_are_chosen_behind_the_trained_adapter():
    made = clone(density=0.5, method="magnitude")
    assert made.masks is None or made.recipe["density"] <= 0.5
    assert accuracy(made).average_accuracy > 0.8


def test_positions_pair_equal_depths_deepest_first():
    pairs = depths(task())
    assert [target.name for target, _ in pairs] == [source.name for _, source in pairs]  # one architecture
    costs = [source.n_macs for _, source in pairs]
    assert costs == sorted(costs, reverse=True) and costs[-1] == 0


@pytest.mark.parametrize("patience", [1, 2])
def test_the_search_stops_if_the_next_positions_do_not_help(monkeypatch, patience):
    """Outcomes are given; the training behind them does not matter here."""
    monkeypatch.setattr(paper_search, "PATIENCE", patience)
    scores = dict(zip((source.name for _, source in depths(task())), (0.5, 0.6, 0.6, 0.9, 0.1), strict=False))
    tried, images = [], torch.ones(10, dtype=torch.float64)

    def fit(place, learning_rate, rows, held_out):
        name = place._source_cut.name
        tried.append((name, learning_rate, bool(rows.all())))
        score = scores[name] - abs(learning_rate - 0.01)
        return paper_search.Trained(None, None, None, learning_rate, Outcome(images * score, images == 1))

    monkeypatch.setattr(paper_search._Place, "fit", fit)
    found = search(task(), lambda adapter: SourcePart(own_copy(source_body(task(), adapter.source_cut))))
    names, best = list(scores), 0.01
    further = [(names[3], best, False), (names[4], best, False)] if patience == 2 else []
    assert tried == [
        *((names[0], rate, False) for rate in (0.003, 0.01)),
        (names[1], best, False),
        (names[2], best, False),
        *further,
        (names[3 if further else 1], best, True),
    ]
    assert found.outcome.average[0] == pytest.approx(0.9 if further else 0.6)


def test_without_base_samples_the_new_classes_are_learned_among_themselves():
    made = clone(support=support(20, 0))
    assert made.recipe["score"] > 0.7  # .2 by chance
    assert made.branch.head.kind == "source"


@pytest.mark.parametrize("settings", [{"max_macs": 0.5}, {"max_bytes": 9999}, {"refine": True}])
def test_bounds_and_refine_are_refused_by_the_search(settings):
    with pytest.raises(InputError, match="strategy: 'sequential' does not support"):
        clone(**settings)


def test_an_unknown_strategy_is_refused():
    nets = pair()
    with pytest.raises(InputError, match="strategy: expected one of scan, sequential; got 'best'"):
        pnc.clone(nets.source.module, nets.target.module, support(), strategy="best", **nets.names())
