"""Every rival on the digits: it learns, changes no network, refuses unsuitable supports, computes what it claims."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import rel_entr, softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor, nn

from digits import BASE, NEW, held_out_images, pair, support
from pnc.bench.comparison_methods import BOUNDED, METHODS
from pnc.bench.rivals import (
    derpp,
    ensemble,
    ewc,
    finetuning,
    icarl,
    joint_training,
    lda,
    linear_probe,
    lora,
    lwf,
    nearest_mean,
    stacked_features,
    tempered,
    tuning,
)
from pnc.bench.rivals.frozen_features import features_of
from pnc.bench.rivals.linear_probe import regression
from pnc.bench.rivals.rival import Budget, Fitted, Rival
from pnc.bench.rivals.tuning import Data, Hyperparameters, TuningMethod, extend_classifier, grid, tune
from pnc.composite.batched_logits import logits_of
from pnc.composite.composite import Composite
from pnc.composite.metrics import measure_logits
from pnc.foundation.errors import InputError
from pnc.foundation.network_state import differences, take_snapshot
from pnc.foundation.tensor_bits import same_bits
from pnc.graph.cut_points import INPUT
from pnc.method.head_fitting import balanced_weights
from pnc.method.task import CloneTask, prepare_task

SHORT = Budget(first_steps=1, second_steps=4, last_steps=80, n_second=1, batch_size=20)
SHORTEST = Budget(first_steps=1, second_steps=2, last_steps=3, n_second=1, batch_size=20)
TUNING = [name for name, rival in METHODS.items() if rival.kind == "tuning"]
WITHOUT_REPLAY = ["fine-tuning", "fine-tuning (last stage)", "fine-tuning (head)"]
NEED_BASE = {
    **dict.fromkeys((rival.name for rival in stacked_features.RIVALS), "stacked features of both networks"),
    "ensemble with temperatures": "an ensemble with temperatures",
    "LDA on target features": "LDA on the target's features",
    "LDA on source features": "LDA on the source's features",
    "linear probe": "a linear probe of the target's features",
    "linear probe of source features": "a linear probe of the source's features",
    "nearest mean": "the nearest mean of the target's features",
    "fine-tuning with replay": "fine-tuning with replay",
    "fine-tuning with replay (last stage)": "fine-tuning with replay",
    "fine-tuning with replay (head)": "fine-tuning with replay",
    "DER++": r"DER\+\+",
    "iCaRL": "iCaRL",
    "joint training on everything": "joint training",
}

_APART = ("sequential search of the paper", "joint training on everything", BOUNDED)  # have tests of their own
every_rival = pytest.mark.parametrize("name", [name for name in METHODS if name not in _APART])


def task(n_new: int = 20, n_base: int = 5, **settings: Any) -> CloneTask:
    nets, classes = pair(), settings.pop("classes", NEW)
    return prepare_task(
        nets.source.module,
        settings.pop("target", nets.target.module),
        support(n_new, n_base, tuple(sorted(classes))),
        classes=classes,
        **nets.names(),
        **settings,
    )


@cache
def fitted(name: str) -> tuple[Fitted, list[list[str]], bool]:
    """A rival fitted on networks in training mode, changes in them, and whether the global random state is the same."""
    given = task()
    models = [given.source.model, given.target.model]
    for model in models:
        model.train()
    try:
        before, state = [take_snapshot(model) for model in models], torch.get_rng_state()
        made = METHODS[name].fit(given, SHORT)
        logits_of(made.module, held_out_images().images[:10])
        changed = [differences(*both) for both in zip(models, before, strict=True)]
        return made, changed, torch.equal(torch.get_rng_state(), state)
    finally:
        for model in models:
            model.eval()


# ------------------------------------------------------------------------------------------------------ every rival


@every_rival
def test_it_tells_old_and_new_digits_apart(name: str) -> None:
    test, target = held_out_images(), pair().target.module
    found = measure_logits(logits_of(fitted(name)[0].module, test.images), test.labels, logits_of(target, test.images))
    if name in WITHOUT_REPLAY:  # they gain new classes at the price of the old ones, or neither
        assert found.average_accuracy > 0.3
    else:
        assert found.base_accuracy > 0.6
        assert found.new_accuracy > 0.6


@every_rival
def test_networks_and_global_random_state_stay(name: str) -> None:
    _, changed, same_state = fitted(name)
    assert changed == [[], []]
    assert same_state


@pytest.mark.parametrize("name", ["linear probe", "fine-tuning with replay", "EWC", "iCaRL", "LoRA"])
def test_the_same_task_gives_the_same_logits(name: str) -> None:
    images = held_out_images().images[:20]
    first, second = (logits_of(METHODS[name].fit(task(seed=1), SHORTEST).module, images) for _ in range(2))
    assert first.shape == (20, 10)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", NEED_BASE)
def test_a_support_without_base_samples_is_refused_where_they_are_needed(name: str) -> None:
    with pytest.raises(InputError, match=f"^{NEED_BASE[name]} needs samples of the base classes; the support has none"):
        METHODS[name].fit(task(n_base=0), SHORTEST)


@every_rival
def test_others_do_without(name: str) -> None:
    if name not in NEED_BASE:
        made = METHODS[name].fit(task(n_base=0), SHORTEST)
        assert logits_of(made.module, held_out_images().images[:5]).shape == (5, 10)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].kind in ("ensemble", "tuning")])
def test_one_image_of_each_class_is_enough(name: str) -> None:
    made = METHODS[name].fit(task(1, 1), SHORTEST)
    assert logits_of(made.module, held_out_images().images[:5]).isfinite().all()
    assert not made.trials, "nothing can be held out"


@pytest.mark.parametrize("name", TUNING)
def test_all_that_tune_have_the_same_budget_and_name_what_they_chose(name: str) -> None:
    made = fitted(name)[0]
    assert len(made.trials) == 12 + SHORT.n_second + 1
    assert set(METHODS[name].space) | {"steps", "train_norm"} == set(made.chosen)
    assert all(made.chosen[key] in values for key, values in METHODS[name].space.items())
    long_enough = [row for row in made.trials if row["steps"] >= SHORT.second_steps]
    best = max(long_enough, key=lambda row: row["held_out_score"])
    assert dict(made.chosen) == {key: value for key, value in best.items() if not key.startswith("held_out")}
    assert best["held_out_score"] == -best["held_out_loss"]


# ------------------------------------------------------------------------------------------------------ ensembles


def test_the_ensemble_is_both_networks_side_by_side() -> None:
    images, nets = held_out_images().images[:20], pair()
    found = logits_of(ensemble.fit(task(n_base=0, classes=("8", "6")), SHORT).module, images)
    assert torch.equal(found[:, :5], logits_of(nets.target.module, images))
    assert torch.equal(found[:, 5:], logits_of(nets.source.module, images)[:, [3, 1]])


def test_temperatures_undo_a_scale_and_an_offset() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 6, generator=generator, dtype=torch.float64) * 2
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()
    changed = torch.cat([logits[:, :3] * 4, logits[:, 3:] / 2 - 1], 1)
    (base, new), offset = tempered.fit_scales(changed, labels, 3)
    assert base == pytest.approx(0.25, rel=0.1)  # sampling error of 4000 labels
    assert new == pytest.approx(2, rel=0.1)
    assert offset == pytest.approx(2, abs=0.2)


def test_temperatures_lower_the_loss_on_the_support() -> None:
    given = task()
    logits = logits_of(ensemble.fit(given, SHORT).module, given.samples.images[:])
    better = logits_of(tempered.fit(given, SHORT).module, given.samples.images[:])
    weight = 1 / given.samples.labels.bincount().float()
    raw, fit = (F.cross_entropy(one, given.samples.labels, weight=weight) for one in (logits, better))
    assert fit < raw


# ------------------------------------------------------------------------------------------------------ frozen features


def test_discriminants_are_those_of_scikit_learn_on_the_targets_features() -> None:
    given, images = task(), held_out_images().images
    caught: list[Tensor] = []
    handle = given.target.model.get_submodule("classifier").register_forward_pre_hook(
        lambda module, inputs: caught.append(inputs[0])
    )
    try:
        logits_of(given.target.model, given.samples.images[:], batch_size=1000)
        logits_of(given.target.model, images, batch_size=1000)
    finally:
        handle.remove()
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[0.1] * 10)
    model.fit(caught[0].double().numpy(), given.samples.labels.numpy())
    expected = torch.from_numpy(model.predict(caught[1].double().numpy()))
    agree = logits_of(METHODS["LDA on target features"].fit(given, SHORT).module, images).argmax(1) == expected
    assert agree.double().mean() > 0.995  # features in float32 and float64 may decide a tie differently


def test_discriminants_need_two_images_of_every_class() -> None:
    lda = METHODS["LDA on target features"]
    with pytest.raises(InputError, match="needs two samples of every class"):
        lda.fit(task(2, 1), SHORT)
    assert logits_of(lda.fit(task(2, 2), SHORT).module, held_out_images().images[:5]).isfinite().all()


def test_the_probe_is_where_the_loss_has_no_slope() -> None:
    given = task()
    rows, labels = features_of(given).double(), given.samples.labels
    rows = (rows - rows.mean(0)) / rows.std(0).clamp_min(1e-6)
    weight, bias = (tensor.requires_grad_() for tensor in regression(rows, labels, balanced_weights(labels, 5), 0.01))
    loss = F.cross_entropy(rows @ weight.T + bias, labels, weight=1 / labels.bincount().double())
    slopes = torch.autograd.grad(loss + 0.01 / 2 * weight.square().sum(), [weight, bias])
    assert all(slope.abs().max() < 1e-3 for slope in slopes)  # where scikit-learn stops


def test_the_probe_knows_two_classes() -> None:
    rows = torch.tensor([[0.0], [1.0], [2.0], [3.0]], dtype=torch.float64)
    weight, bias = regression(rows, torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.float64), 0.001)
    assert (rows @ weight.T + bias).argmax(1).tolist() == [0, 0, 1, 1]


def test_stacking_keeps_the_targets_logits_and_beats_the_plain_ensemble() -> None:
    given, test = task(), held_out_images()
    kept, free = (METHODS[rival.name].fit(given, SHORT) for rival in stacked_features.RIVALS)
    logits, base = logits_of(kept.module, test.images), logits_of(given.target.model, test.images)
    assert torch.equal(logits[:, :5], base)
    found = {
        name: measure_logits(logits_of(module, test.images), test.labels, base)
        for name, module in (
            ("kept", kept.module),
            ("free", free.module),
            ("plain", ensemble.fit(given, SHORT).module),
        )
    }
    assert found["kept"].conditional_kl == 0 < found["free"].conditional_kl
    assert found["kept"].average_accuracy > found["plain"].average_accuracy
    assert found["free"].average_accuracy > found["plain"].average_accuracy


def test_calibrated_rivals_weigh_base_and_new_alike() -> None:
    """With four base classes and one new class, no rival may learn that new images are rare."""
    given = task(classes=("7",))
    images, labels = given.samples.images[:], given.samples.labels
    for rival in (tempered.RIVAL, lda.ON_SOURCE, linear_probe.ON_SOURCE, *stacked_features.RIVALS):
        chance = logits_of(rival.fit(given, SHORT).module, images).softmax(1)[:, 5]
        balanced = torch.stack([chance[labels < 5].mean(), chance[labels == 5].mean()]).mean()
        assert 0.4 < balanced < 0.6, (
            rival.name
        )  # half of the weight is new, and the mean of a fit is that of its labels


def test_nearest_means_are_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    features, means = torch.rand(30, 8, generator=generator), torch.rand(4, 8, generator=generator)
    found = nearest_mean.NearestMean(means, 3.0)(features)
    distances = torch.cdist(F.normalize(features, dim=1), means).square()
    torch.testing.assert_close(found.softmax(1), (-3.0 * distances).softmax(1))


# ------------------------------------------------------------------------------------------------------ the search


def test_settings_are_judged_on_images_that_were_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given, trained = task(flip=True), []
    train = tuning._Trainer.train

    def caught(self: Any, setting: Hyperparameters, rows: Tensor) -> nn.Module:
        trained.append(rows)
        return train(self, setting, rows)

    monkeypatch.setattr(tuning._Trainer, "train", caught)
    finetuning.WITH_REPLAY.fit(given, SHORTEST)
    *searched, final = trained
    assert len(searched) == 14
    assert final.all()
    for rows in searched:
        groups, labels = given.samples.groups, given.samples.labels
        assert not set(groups[rows].tolist()) & set(groups[~rows].tolist()), "a mirror image is no other image"
        assert set(labels[rows].tolist()) == set(labels[~rows].tolist()) == set(range(10))


def test_without_replay_no_base_sample_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Data] = []
    monkeypatch.setattr(tuning._Trainer, "_descend", lambda self, model, setting, data, generator: seen.append(data))
    METHODS["fine-tuning"].fit(task(), SHORTEST)
    assert seen and not any(data.is_base.any() for data in seen)
    seen.clear()
    finetuning.WITH_REPLAY.fit(task(), SHORTEST)
    assert all(data.is_base.any() for data in seen)


def test_a_setting_that_diverges_is_not_chosen() -> None:
    made = tune(task(), TuningMethod(grid((1e6, 0.01))), replace(SHORTEST, n_second=2))
    assert made.chosen["learning_rate"] == 0.01


def test_larger_supports_get_more_steps_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tuning._Trainer(task(), TuningMethod(grid((0.01,))), SHORT)  # 125 images
    assert trainer.steps(100) == 100
    monkeypatch.setattr(tuning, "ROWS", 50)
    assert trainer.steps(100) == 250
    monkeypatch.setattr(tuning, "ROWS", 5)
    assert trainer.steps(100) == 400


@pytest.mark.parametrize(("name", "share"), [("last stage", 2 / 3), ("head", 0.01)])
def test_what_lies_before_the_scope_is_the_targets_own(name: str, share: float) -> None:
    target = pair().target.module
    made = fitted(f"fine-tuning with replay ({name})")[0].module
    own = {parameter.data_ptr() for parameter in target.parameters()}
    frozen, trained = made
    assert {parameter.data_ptr() for parameter in frozen.parameters()} <= own
    assert not {parameter.data_ptr() for parameter in trained.parameters()} & own
    n_trained = sum(parameter.numel() for parameter in trained.parameters())
    assert 0 < n_trained <= share * 1.5 * sum(parameter.numel() for parameter in target.parameters())


def test_the_widened_classifier_begins_as_the_targets() -> None:
    given, images = task(), held_out_images().images
    wide = logits_of(extend_classifier(given, None, torch.Generator().manual_seed(0)), images)
    assert wide.shape[1] == 10
    # a wider matrix product rounds differently
    torch.testing.assert_close(wide[:, :5], logits_of(given.target.model, images), rtol=1e-4, atol=1e-4)


class Convolutional(nn.Module):
    """Its classifier is a 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 6, 3)
        self.classifier = nn.Conv2d(6, len(BASE), 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.body(images).relu().mean((2, 3), keepdim=True)).flatten(1)


def test_a_classifier_that_cannot_be_widened_is_named() -> None:
    with pytest.raises(InputError, match="needs a linear classifier to extend; the target's is Conv2d"):
        finetuning.WITH_REPLAY.fit(task(target=Convolutional()), SHORT)


def test_half_precision_learns_as_well() -> None:
    test, target = held_out_images(), pair().target.module
    made = finetuning.WITH_REPLAY.fit(task(), replace(SHORT, precision="bfloat16")).module
    assert next(made.parameters()).dtype == torch.float32
    found = measure_logits(logits_of(made, test.images), test.labels, logits_of(target, test.images))
    assert found.average_accuracy > 0.8


# ------------------------------------------------------------------------------------------------------ loss terms


def batch() -> tuple[Tensor, Data]:
    generator = torch.Generator().manual_seed(0)
    logits, told = (torch.randn(6, n, generator=generator) for n in (5, 3))
    return logits, Data(torch.zeros(6, 1), torch.tensor([0, 1, 2, 3, 4, 4]), told)


def test_distillation_is_the_softened_divergence_from_the_target() -> None:
    logits, data = batch()
    told, found = (softmax(one.double().numpy() / 2, 1) for one in (data.base_logits, logits[:, :3]))
    expected = 0.7 * 4 * rel_entr(told, found).sum(1).mean()
    assert float(lwf.distillation(nn.Identity(), logits, data, 0.7)) == pytest.approx(expected, rel=1e-5)
    same = torch.cat([data.base_logits + 1, logits[:, 3:]], 1)  # softmax knows no constant
    assert float(lwf.distillation(nn.Identity(), same, data, 1.0)) == pytest.approx(0, abs=1e-6)


def test_the_memory_holds_logits_of_base_samples_only() -> None:
    logits, data = batch()
    expected = 0.5 * np.square(logits[:3, :3].numpy() - data.base_logits[:3].numpy()).mean()
    assert float(derpp.remembered_logits(nn.Identity(), logits, data, 0.5)) == pytest.approx(expected, rel=1e-5)


def test_importance_is_relative_and_a_strong_penalty_keeps_parameters() -> None:
    given, target = task(), pair().target.module
    importance = ewc.fisher_information(given)
    assert set(importance) == {name for name, _ in target.named_parameters()}
    values = torch.cat([one.flatten() for one in importance.values()])
    assert values.min() >= 0 and values.max() <= ewc.LARGEST
    assert 0.3 < float(values.mean()) <= 1
    moved = []
    for strength in (0.0, 0.1):
        settings = [Hyperparameters(0.01, strength=strength)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ewc, "grid", lambda *_, settings=settings, **__: settings)
            made = ewc.fit(given, replace(SHORTEST, last_steps=30)).module
        distance = [
            (importance[name] * (parameter[: len(importance[name])] - before.detach()).square()).sum()
            for (name, parameter), before in zip(made.named_parameters(), target.parameters(), strict=True)
        ]
        moved.append(float(torch.stack(distance).sum()))
    assert moved[1] < 0.7 * moved[0]


def test_without_base_samples_importance_is_measured_on_new_ones() -> None:
    values = ewc.fisher_information(task(n_base=0))
    assert sum(float(one.sum()) for one in values.values()) > 0


def test_herding_follows_the_mean() -> None:
    features = torch.rand(40, 5, generator=torch.Generator().manual_seed(0))
    chosen, mean = icarl.herded(features, 10), features.mean(0)
    assert torch.equal(chosen[0], features[(features - mean).square().sum(1).argmin()])
    assert len(chosen.unique(dim=0)) == 10
    random = features[:10].mean(0)
    assert (chosen.mean(0) - mean).norm() < 0.3 * (random - mean).norm()
    assert len(icarl.herded(features, 100)) == 40


def test_adapters_begin_as_nothing_and_leave_all_other_weights() -> None:
    made, target = fitted("LoRA")[0].module, pair().target.module
    adapters = {name: module for name, module in made.named_modules() if isinstance(module, lora.LowRank)}
    assert len(adapters) == 4
    for name, module in adapters.items():
        assert same_bits(module.layer.weight, target.get_submodule(name).weight.data)
        assert module.up.weight.abs().sum() > 0, "it was trained"
    tensors = dict(made.named_buffers())
    assert all(same_bits(value, tensors[name]) for name, value in target.named_buffers() if "running" in name)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, 2, 1, padding_mode="reflect"), nn.Linear(4, 6)])
def test_an_adapter_has_the_shape_of_its_layer(layer: nn.Module) -> None:
    tensor = torch.rand(2, 4, 8, 8) if isinstance(layer, nn.Conv2d) else torch.rand(2, 4)
    adapter = lora.LowRank(layer, 2, torch.Generator().manual_seed(0))
    assert torch.equal(adapter(tensor), layer(tensor))
    with torch.no_grad():
        adapter.up.weight.fill_(1.0)
    changed = adapter(tensor) - layer(tensor)
    assert torch.linalg.matrix_rank(changed.transpose(0, 1).flatten(1), atol=1e-4) == 1  # all outputs add the same


# ------------------------------------------------------------------------------------------------------ others


def test_joint_training_asks_for_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint_training, "EPOCHS", 10)
    test, target = held_out_images(), pair().target.module
    made = joint_training.fit(task(80, 80), Budget())
    found = measure_logits(logits_of(made.module, test.images), test.labels, logits_of(target, test.images))
    assert found.average_accuracy > 0.95
    assert joint_training.RIVAL.sees_everything and joint_training.RIVAL.kind == "bound"
    assert made.chosen["steps"] == 125  # 10 epochs of 800 images in batches of 64


def test_clones_without_a_search_stand_where_they_say() -> None:
    whole, last = (METHODS[name].fit(task(), SHORT) for name in ("whole source as clone", "clone at the last position"))
    assert isinstance(whole.module, Composite)
    assert whole.chosen == {"target_cut": INPUT, "source_cut": INPUT}
    assert INPUT not in last.chosen.values()


def test_the_sequential_reference_is_a_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    from pnc.method import paper_search

    monkeypatch.setattr(paper_search, "N_STEPS", 5)
    monkeypatch.setattr(paper_search, "LEARNING_RATES", (0.01,))
    rival: Rival = METHODS["sequential search of the paper"]
    assert isinstance(rival.fit(task(), SHORT).module, Composite)
