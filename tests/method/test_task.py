import copy

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from digits import BASE, NEW, pair, support
from pnc.data.image_set import class_subset
from pnc.data.readers import load_data
from pnc.foundation.errors import ClassNameError, InputError, RecordingError
from pnc.method.task import prepare_task


def prepare(**changes):
    nets = pair()
    given = {
        "source": nets.source.module,
        "target": nets.target.module,
        "support": support(),
        "classes": NEW,
        **nets.names(),
        **changes,
    }
    return prepare_task(given.pop("source"), given.pop("target"), given.pop("support"), **given)


def test_labels_are_places_among_base_then_new_classes_whatever_the_order_of_the_support():
    found = prepare(classes=("8", "6"), support=support(classes=("6", "8")))
    given = support(classes=("6", "8"))
    names = [given.names[label] for label in given.labels]
    assert [(*BASE, "8", "6")[label] for label in found.samples.labels] == [names[g] for g in found.samples.groups]
    assert torch.equal(found.samples.images[:], given.images[found.samples.groups])
    assert found.new_classes == ("8", "6")
    assert found.source_ids == [3, 1]
    assert found.n_base == 5
    assert found.has_base


def test_all_classes_that_the_target_lacks_are_the_default():
    assert prepare(classes=None).new_classes == NEW
    renamed = prepare(classes=None, source_classes=("0", "6", "7", "8", "9"), support=support(classes=NEW[1:]))
    assert renamed.new_classes == NEW[1:]


def test_flipped_copies_share_the_group_of_their_original():
    plain, both = prepare(), prepare(flip=True)
    order = plain.samples.groups.argsort()
    images, labels = plain.samples.images[order], plain.samples.labels[order]
    for group in (0, 17, 124):
        rows = both.samples.groups == group
        assert torch.equal(both.samples.images[rows], torch.stack([images[group], images[group].flip(2)]))
        assert both.samples.labels[rows].tolist() == [int(labels[group])] * 2


def test_folds_are_stratified_ascending_and_keep_copies_together():
    samples = prepare(flip=True).samples
    assert samples.n_folds == 5
    assert (samples.folds.diff() >= 0).all()
    for label in samples.labels.unique():
        shares = samples.folds[samples.labels == label].bincount()
        assert shares.max() == shares.min()
    assert all(len(samples.folds[samples.groups == group].unique()) == 1 for group in samples.groups.unique())
    seen = [(fold, len(images)) for fold, images in samples.batches(32)]
    assert [fold for fold, _ in seen] == sorted(fold for fold, _ in seen)
    assert sum(size for _, size in seen) == len(samples.images)
    assert prepare(support=support(n_new=3, n_base=3)).samples.n_folds == 3
    assert prepare(support=support(n_new=1, n_base=3)).samples.n_folds == 1
    assert prepare(support=support(n_new=20, n_base=1)).samples.n_folds == 5  # one base image in each


def test_ids_number_the_base_classes_then_the_new_ones():
    given = support()
    names = (*BASE, *NEW)
    ids = torch.tensor([names.index(given.names[label]) for label in given.labels])
    loader = DataLoader(TensorDataset(given.images, ids), batch_size=7)
    for data in ((given.images, ids), loader, (given.images, [names[i] for i in ids])):
        assert torch.equal(prepare(support=data).samples.labels, prepare().samples.labels)


def test_a_support_without_base_samples_is_one():
    found = prepare(support=support(n_base=0))
    assert not found.has_base
    assert set(found.samples.labels.tolist()) == set(range(5, 10))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"source": lambda: pair().target.module}, InputError, "same object"),
        ({"classes": ("5", "11")}, ClassNameError, "no class '11'.*5, 6, 7, 8, 9"),
        ({"classes": ("5", "5")}, ClassNameError, "twice"),
        ({"classes": ()}, ClassNameError, "at least one"),
        ({"classes": ("4",), "source_classes": ("4", "6", "7", "8", "9")}, ClassNameError, "already knows 4"),
        ({"classes": None, "source_classes": BASE}, ClassNameError, "knows every class"),
        ({"source_classes": ("5", "6")}, ClassNameError, "5 outputs but 2 class names|no class"),
        ({"base_classes": ("0", "1")}, ClassNameError, "2, 3, 4"),
        ({"support": lambda: support(classes=("5",))}, InputError, "no sample of 6, 7, 8, 9"),
        ({"classes": ("5",)}, ClassNameError, "6, 7, 8, 9"),
        ({"batch_size": 0}, InputError, "batch_size"),
        ({"batch_size": 2.5}, InputError, "batch_size: expected a whole number, at least 1; got 2.5"),
        ({"seed": 1.5}, InputError, "seed: expected a whole number"),
        ({"seed": 2**64}, InputError, "seed: expected a whole number"),
        ({"base_classes": ("0", "1", "2", "3", "a\u00a0b")}, ClassNameError, "not printable text"),
        (
            {"target": lambda: copy.deepcopy(pair().target.module).half()},
            InputError,
            "target has parameters in float16",
        ),
        (
            {"source": lambda: copy.deepcopy(pair().source.module).double()},
            InputError,
            "source has parameters in float64",
        ),
        ({"support": "photos"}, InputError, "support"),
        ({"source": "resnet"}, InputError, "source: expected a torch.nn.Module, got str"),
    ],
)
def test_wrong_arguments_are_refused(changes, error, words):
    made = {name: value() if callable(value) else value for name, value in changes.items()}
    with pytest.raises(error, match=words):
        prepare(**made)


def test_some_base_classes_are_enough():
    given = support()
    kept = (given.labels >= 5) | (given.labels == given.names.index("3"))
    task = prepare(support=(given.images[kept], [given.names[label] for label in given.labels[kept]]))
    assert task.has_base
    for fold in range(task.samples.n_folds):
        rest = task.samples.labels[task.samples.folds != fold]
        assert set(rest.tolist()) == {3, 5, 6, 7, 8, 9}


def test_background_images_become_what_the_target_sees_in_them():
    given = support(n_base=0)
    unlabelled = class_subset(load_data("digits"), BASE).images[:100]
    task = prepare(support=(given.images, [given.names[label] for label in given.labels]), background=unlabelled)
    assert int(task.background.sum()) == len(unlabelled)
    assert len(task.samples.labels) == len(given.labels) + len(unlabelled)
    base = task.samples.labels < 5
    with torch.no_grad():
        seen = pair().target.module(task.samples.images[base]).argmax(1)
    assert torch.equal(task.samples.labels[base], seen)


@pytest.mark.parametrize(
    ("background", "words"),
    [
        (torch.rand(3, 3, 8, 8), r"background: expected images \(1, 8, 8\)"),
        (torch.rand(0, 1, 8, 8), "background: expected a non-empty tensor"),
        ("photos", r"background: expected a non-empty tensor \(N, C, H, W\), got str"),
        (torch.full((2, 1, 8, 8), float("nan")), "background: 2 of 2 hold NaN"),
    ],
)
def test_a_wrong_background_is_refused(background, words):
    with pytest.raises(InputError, match=words):
        prepare(background=background)


def test_images_that_a_network_cannot_process_are_refused_with_its_name():
    given = support()
    colour = (given.images.repeat(1, 3, 1, 1), [given.names[label] for label in given.labels])
    with pytest.raises(RecordingError, match=r"source on images \(3, 8, 8\)"):
        prepare(support=colour)


def test_nan_in_the_support_is_refused():
    given = support()
    images = given.images.clone()
    images[3, 0, 2, 2] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        prepare(support=(images, [given.names[label] for label in given.labels]))


def test_a_network_that_gives_nan_is_refused():
    source = copy.deepcopy(pair().source.module)
    next(source.parameters()).data[0] = float("nan")
    with pytest.raises(InputError, match="source gives NaN"):
        prepare(source=source)


def test_a_wrong_number_of_names_is_refused_before_anything_is_recorded(monkeypatch):
    monkeypatch.setattr("pnc.method.task.record", lambda *_: pytest.fail("recorded"))
    with pytest.raises(ClassNameError, match="source_classes has 6 names, the source gives 5 logits"):
        prepare(source_classes=(*NEW, "more"))
    with pytest.raises(ClassNameError, match="base_classes has 4 names, the target gives 5 logits"):
        prepare(base_classes=BASE[:4], support=support(n_base=0))
