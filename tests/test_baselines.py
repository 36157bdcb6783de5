from types import ModuleType
from typing import Any

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor, nn

from digits import BASE, NEW, held_out_images, pair, support
from pnc.baselines import ensemble, finetuning, lda
from pnc.bench.main_job import RIVALS, predict
from pnc.errors import InputError
from pnc.integrity import differences, snapshot
from pnc.metrics import evaluate
from pnc.task import CloneTask, prepare_task

rivals = pytest.mark.parametrize("rival", RIVALS.values(), ids=list(RIVALS))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetuning, "MIN_STEPS", 20)
    monkeypatch.setattr(finetuning, "LEARNING_RATES", (0.003, 0.01))


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


@rivals
def test_it_tells_old_and_new_digits_apart(rival: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetuning, "MIN_STEPS", 100)
    test, target = held_out_images(), pair().target.module
    found = evaluate(predict(rival.fit(task()), test.images), test.labels, predict(target, test.images))
    assert found.base_accuracy > 0.6
    assert found.new_accuracy > 0.6


@rivals
@pytest.mark.parametrize("training", [False, True])
def test_networks_and_global_random_state_stay(rival: ModuleType, training: bool) -> None:
    given = task()
    models = [given.source.model, given.target.model]
    for model in models:
        model.train(training)
    try:
        before, state = [snapshot(model) for model in models], torch.get_rng_state()
        predict(rival.fit(given), held_out_images().images[:10])
        assert torch.equal(torch.get_rng_state(), state)
        assert [differences(*both) for both in zip(models, before, strict=True)] == [[], []]
    finally:
        for model in models:
            model.eval()


@rivals
def test_the_same_task_gives_the_same_logits(rival: ModuleType) -> None:
    images = held_out_images().images[:20]
    first, second = (predict(rival.fit(task(seed=1)), images) for _ in range(2))
    assert first.shape == (20, 10)
    assert torch.equal(first, second)


@pytest.mark.parametrize("rival", [lda, finetuning])
def test_a_support_without_base_samples_is_refused_where_they_are_needed(rival: ModuleType) -> None:
    with pytest.raises(InputError, match="needs samples of the base classes; the support has none"):
        rival.fit(task(n_base=0))


@pytest.mark.parametrize("rival", [ensemble, finetuning])
def test_one_image_of_each_class_is_enough(rival: ModuleType) -> None:
    assert predict(rival.fit(task(1, 1)), held_out_images().images[:5]).isfinite().all()


def test_discriminants_need_two_images_of_every_class() -> None:
    with pytest.raises(InputError, match="needs two samples of every class"):
        lda.fit(task(2, 1))
    assert predict(lda.fit(task(2, 2)), held_out_images().images[:5]).isfinite().all()


def test_the_ensemble_is_both_networks_side_by_side() -> None:
    images, nets = held_out_images().images[:20], pair()
    found = predict(ensemble.fit(task(n_base=0, classes=("8", "6"))), images)
    assert torch.equal(found[:, :5], predict(nets.target.module, images))
    assert torch.equal(found[:, 5:], predict(nets.source.module, images)[:, [3, 1]])


def test_discriminants_are_those_of_scikit_learn_on_the_targets_features() -> None:
    given, images = task(), held_out_images().images
    caught: list[Tensor] = []
    handle = given.target.model.get_submodule("classifier").register_forward_pre_hook(
        lambda module, inputs: caught.append(inputs[0])
    )
    try:
        predict(given.target.model, given.samples.images, batch_size=1000)
        predict(given.target.model, images, batch_size=1000)
    finally:
        handle.remove()
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[0.1] * 10)
    model.fit(caught[0].double().numpy(), given.samples.labels.numpy())
    expected = torch.from_numpy(model.predict(caught[1].double().numpy()))
    agree = predict(lda.fit(given), images).argmax(1) == expected
    assert agree.double().mean() > 0.995  # features in float32 and float64 may decide a tie differently


def test_the_widened_classifier_begins_as_the_targets() -> None:
    given, images = task(), held_out_images().images
    wide = predict(finetuning.extend_classifier(given, torch.Generator().manual_seed(0)), images)
    assert wide.shape[1] == 10
    # a wider matrix product rounds differently
    torch.testing.assert_close(wide[:, :5], predict(given.target.model, images), rtol=1e-4, atol=1e-4)


def test_settings_are_judged_on_images_that_were_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given = task(flip=True)
    trained: list[Tensor] = []
    tune = finetuning._tune
    monkeypatch.setattr(
        finetuning, "_tune", lambda task, rows, setting: trained.append(rows) or tune(task, rows, setting)
    )
    finetuning.fit(given)
    *searched, final = trained
    assert len(searched) == 4
    assert final.all()
    for rows in searched:
        groups, labels = given.samples.groups, given.samples.labels
        assert not set(groups[rows].tolist()) & set(groups[~rows].tolist()), (
            "a mirror image of a held-out one is no other"
        )
        assert set(labels[rows].tolist()) == set(labels[~rows].tolist()) == set(range(10))


def test_where_nothing_can_be_held_out_the_default_setting_is_taken() -> None:
    assert finetuning.choose_setting(task(1, 1)) == finetuning.DEFAULT
    assert finetuning.choose_setting(task(20, 1)) == finetuning.DEFAULT


class Convolutional(nn.Module):
    """Its classifier is a 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 6, 3)
        self.classifier = nn.Conv2d(6, len(BASE), 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.body(images).relu().mean((2, 3), keepdim=True)).flatten(1)


def test_a_classifier_that_cannot_be_widened_is_named() -> None:
    with pytest.raises(InputError, match="needs a linear classifier to widen; the target's is Conv2d"):
        finetuning.fit(task(target=Convolutional()))
