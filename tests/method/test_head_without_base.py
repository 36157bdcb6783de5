from dataclasses import replace

import pytest
import torch
from torch import nn

import pnc
from digits import BASE, NEW, held_out_images, pair, support
from pnc.bench.rivals.ensemble import DirectEnsemble
from pnc.clones.heads import SourceHead, StackedHead
from pnc.clones.position_grids import pool
from pnc.composite.batched_logits import logits_of
from pnc.composite.metrics import measure_logits
from pnc.data.image_set import class_subset, images_as_float
from pnc.data.readers import load_data
from pnc.graph.batch_norm_means import last_norm
from pnc.graph.cut_points import extract
from pnc.graph.recording import record
from pnc.method.head_fitting import HeadSamples
from pnc.method.head_without_base import remembering_head
from pnc.models.reference_networks import cnn, resnet, vit_tiny

N_BASE, N_NEW = 3, 2


@pytest.mark.parametrize("spec", ["cnn", "resnet"])
def test_the_remembered_mean_is_that_of_the_pooled_input_of_the_last_layer(spec):
    """A layer that averages over images, in batches of one size, keeps the mean of the tensors at the cut."""
    model = cnn((1, 8, 8), 5) if spec == "cnn" else resnet((1, 8, 8), 5, 1)
    images = images_as_float(class_subset(load_data("digits"), BASE).images)[:600]
    last = [layer for layer in model.eval().modules() if isinstance(layer, nn.BatchNorm2d)][-1]
    last.reset_running_stats()
    last.momentum, last.training = None, True
    with torch.no_grad():
        for batch in images.split(100):
            model(batch)
    last.training = False
    found = last_norm(record(model, images[:2]))
    assert found is not None and found.cut.kind == "map"
    assert torch.equal(found.mean, last.running_mean)
    with torch.no_grad():
        pooled = pool(extract(record(model, images[:2]), None, [found.cut])(images), found.cut)
    assert torch.allclose(pooled.mean(0), found.mean, atol=1e-5)  # sums of float32 in another order


def test_a_network_without_batchnorm_remembers_nothing():
    images = torch.rand(2, 3, 16, 16)
    assert last_norm(record(vit_tiny((3, 16, 16), 4).eval(), images)) is None


def samples(n: int = 60, n_features: int = 6, seed: int = 0, n_folds: int = 5) -> HeadSamples:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return HeadSamples(
        target_features=draw(n, n_features) + 1.0,
        clone_features=draw(n, 4),
        base_logits=draw(n, N_BASE),
        own_logits=draw(n, N_NEW),
        labels=N_BASE + torch.arange(n) % N_NEW,
        folds=torch.arange(n) % n_folds,
        n_classes=N_BASE + N_NEW,
    )


def own_head() -> SourceHead:
    head = SourceHead(N_NEW, 4)
    head.weight.copy_(torch.randn(N_NEW, 4, generator=torch.Generator().manual_seed(1)))
    return head


def log_odds(head: nn.Module, some: HeadSamples) -> torch.Tensor:
    logits = head(some.target_features, some.clone_features, some.base_logits)
    return logits.logsumexp(1) - some.base_logits.logsumexp(1)


def test_a_discriminant_is_added_to_the_log_odds_of_the_ensemble():
    some, mean = samples(), torch.zeros(6)
    head, own = remembering_head(some, mean, own_head()), own_head()
    assert isinstance(head, StackedHead)
    added = log_odds(head, some) - log_odds(own, some)
    weight = head.odds_weight[0] * head.discriminants.weight[N_BASE, :6]
    expected = (some.target_features - (some.target_features.mean(0) + mean) / 2) @ weight
    assert torch.allclose(added, expected, atol=1e-4)  # sums of float32 in another order
    assert added.mean() > 0
    logits = head(some.target_features, some.clone_features, some.base_logits)
    theirs = own(some.target_features, some.clone_features, some.base_logits)
    assert torch.allclose(logits.log_softmax(1), theirs.log_softmax(1), atol=1e-5), (
        "among new classes the source decides"
    )


def test_a_discriminant_that_only_holds_on_fitted_samples_counts_less():
    few, many = samples(10, 60), samples(2000, 60)
    shares = [float(remembering_head(some, torch.zeros(60), own_head()).odds_weight[0]) for some in (few, many)]
    assert 0 <= shares[0] < shares[1] <= 0.5


@pytest.mark.parametrize(("margin", "least", "most"), [(0.0, 0.3, 0.5), (5.0, 0.01, 0.1), (40.0, 0.0, 1e-6)])
def test_the_discriminant_counts_less_the_surer_the_ensemble_is_of_new_samples(margin, least, most):
    some = samples(2000)
    surer = replace(some, own_logits=some.own_logits + margin)
    share = float(remembering_head(surer, torch.zeros(6), own_head()).odds_weight[0])
    assert least <= share <= most


@pytest.mark.parametrize("n_new", [20, 100])
@pytest.mark.parametrize("seed", range(3))
def test_without_base_samples_a_clone_is_never_below_the_ensemble(n_new, seed):
    nets, images = pair(), held_out_images(NEW)
    target = nets.target.module
    some = support(n_new, 0, seed=seed)
    made = pnc.clone(nets.source.module, target, some, effort="seconds", **nets.names())
    ensemble = DirectEnsemble(target, nets.source.module, list(range(5)))
    own = logits_of(target, images.images)
    found, theirs = (
        measure_logits(logits_of(net, images.images), images.labels, own).average_accuracy
        for net in (pnc.attach(target, made), ensemble)
    )
    assert found >= theirs


def test_if_nothing_can_be_held_out_the_source_decides_alone():
    own = own_head()
    assert remembering_head(samples(n_folds=1), torch.zeros(6), own) is own


@pytest.fixture(scope="module")
def clones():
    nets = pair()
    return {
        n_base: pnc.clone(
            nets.source.module,
            nets.target.module,
            support(20, n_base, classes),
            effort="seconds",
            classes=classes,
            name=str(n_base),
            **nets.names(),
        )
        for n_base, classes in ((0, NEW[:3]), (5, NEW[3:]))
    }


def test_without_base_samples_a_clone_does_better_than_the_ensemble():
    nets, images = pair(), held_out_images(NEW)
    target = nets.target.module
    made = pnc.clone(nets.source.module, target, support(20, 0), effort="seconds", **nets.names())
    ensemble = DirectEnsemble(target, nets.source.module, list(range(5)))
    target_logits = logits_of(target, images.images)
    found, theirs = (
        measure_logits(logits_of(net, images.images), images.labels, target_logits)
        for net in (pnc.attach(target, made), ensemble)
    )
    assert found.average_accuracy > theirs.average_accuracy
    assert found.conditional_kl <= 1e-6


def test_without_base_samples_adapters_are_used_only_for_a_bound():
    nets, given = pair(), support(20, 0)
    task = pnc.prepare_task(nets.source.module, nets.target.module, given, classes=NEW, **nets.names())
    found = pnc.scan(task)
    assert found.choose().names == ("input", "input")
    assert found.choose(max_macs=0.9).macs_share <= 0.9


def test_clones_that_read_different_features_can_be_attached_together(clones, tmp_path):
    target, images = pair().target.module, images_as_float(held_out_images(NEW).images)[:50]
    without, with_base = clones[0], clones[5]
    assert without.target_features != with_base.target_features
    net = pnc.attach(target, without, with_base)
    alone = [pnc.attach(target, one) for one in (without, with_base)]
    with torch.no_grad():
        logits = net(images)
        assert torch.equal(logits[:, :5], target(images))
        assert torch.equal(logits[:, 5:8], alone[0](images)[:, 5:])
        assert torch.equal(logits[:, 8:], alone[1](images)[:, 5:])
        assert (
            net.fused()(images) - logits
        ).abs().max() <= 1e-5 * logits.abs().max()  # folded layers round differently
        with net.disabled():
            assert torch.equal(net(images), target(images))
    pnc.save(without, tmp_path / "clone.safetensors")
    again = pnc.load(tmp_path / "clone.safetensors", source=pair().source.module)
    assert again.target_features == without.target_features
    with torch.no_grad():
        assert torch.equal(pnc.attach(target, again)(images), alone[0](images))


def test_refinement_works_without_base_samples_too():
    nets = pair()
    given = support(10, 0)
    refined = pnc.clone(nets.source.module, nets.target.module, given, **nets.names(), refine=True)
    assert refined.recipe["refine"]["gain"] >= 0
