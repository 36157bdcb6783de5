"""Few images: nothing is chosen that they cannot support."""

from dataclasses import replace

import pytest
import torch

import pnc
from digits import held_out_images, pair, support
from pnc.bench.rivals import ensemble, tempered
from pnc.bench.rivals.rival import Budget
from pnc.composite.metrics import measure_logits
from pnc.method.head_fitting import ENSEMBLE, HeadSamples, choose_stacking


def task_of(n_new, n_base, seed=0):
    nets = pair()
    data = support(n_new, n_base, seed=seed)
    return pnc.prepare_task(nets.source.module, nets.target.module, data, classes=None, seed=seed, **nets.names())


def test_with_one_image_per_class_the_exact_position_is_chosen():
    found = pnc.scan(task_of(1, 1))
    assert found.exact_first
    chosen = found.choose()
    assert chosen.is_exact and chosen.source_cut.name == "input"
    seems = [replace(one, log_loss=one.log_loss + 5 * one.is_exact) for one in found.positions]
    assert replace(found, positions=tuple(seems)).choose().is_exact
    assert found.choose(max_macs=0.9).macs_share <= 0.9, "a bound still bounds"


@pytest.mark.parametrize(("n_new", "n_base", "wanted"), [(2, 2, True), (5, 20, True), (6, 6, False), (20, 5, False)])
def test_up_to_five_images_of_a_class_count_as_few(n_new, n_base, wanted):
    assert pnc.scan(task_of(n_new, n_base)).exact_first is wanted


@pytest.mark.parametrize("n_images", [1, 2, 5])
def test_clones_of_few_images_are_no_worse_than_ensembles(n_images):
    nets, test = pair(), held_out_images()
    ours, theirs = [], []
    for seed in range(3):
        task = task_of(n_images, n_images, seed)
        found = pnc.scan(task)
        networks = [pnc.attach(nets.target.module, pnc.fit(task, found.adapter(found.choose())))]
        networks += [one.fit(task, Budget()).module for one in (ensemble, tempered)]
        with torch.no_grad():
            base = nets.target.module(test.images)
            scores = [measure_logits(net(test.images), test.labels, base).average_accuracy for net in networks]
        ours.append(scores[0])
        theirs.append(max(scores[1:]))
    assert sum(ours) / 3 >= sum(theirs) / 3 - 0.01


def samples(own_says, n=10, noise=0.1):
    """Samples of two base and two new classes; the source's logits are `own_says` times the truth."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(n)
    right = torch.nn.functional.one_hot(labels, 4).float()
    base = 6 * right[:, :2] + noise * torch.randn(len(labels), 2, generator=generator)
    own = own_says * 6 * right[:, 2:] + noise * torch.randn(len(labels), 2, generator=generator)
    features = torch.randn(len(labels), 3, generator=generator)
    folds = (torch.arange(len(labels)) // 4) % 2
    order = folds.argsort(stable=True)
    made = HeadSamples(features, features, base, own, labels, folds, 4, few=True)
    return made.select(order)


def test_weights_stay_at_the_ensemble_if_it_explains_the_samples():
    found = choose_stacking(samples(1.0, n=2))
    assert found.class_weight[1] == pytest.approx(ENSEMBLE.classes[1], abs=0.3)
    assert found.odds_weight[1] > 0.5 and found.odds_weight[2] < -0.5


def test_weights_leave_the_ensemble_if_it_is_wrong():
    found = choose_stacking(samples(-1.0))
    assert found.class_weight[1] < 0, "the source's logits mean the opposite"
    assert found.odds_weight[1] < 0


def test_with_more_images_nothing_pulls_towards_the_ensemble():
    few, many = samples(1.0, n=2), replace(samples(1.0, n=2), few=False)
    assert choose_stacking(many).odds_weight[1] < choose_stacking(few).odds_weight[1]
