"""`pnc.evaluate` and `pnc.predict`, which return what the commands show."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import pnc
from digits import BASE, NEW, held_out_images, pair, support, write_images
from pnc.composite.batched_logits import logits_of
from pnc.composite.metrics import measure_logits
from pnc.data.image_set import class_subset


def clone(classes: tuple[str, ...], name: str) -> pnc.Clone:
    nets = pair()
    data = support(classes=classes)
    return pnc.clone(nets.source.module, nets.target.module, data, classes=classes, name=name, **nets.names())


@pytest.fixture(scope="module")
def clones() -> tuple[pnc.Clone, pnc.Clone]:
    return clone(NEW[:2], "low"), clone(NEW[2:], "high")


@pytest.fixture
def net(clones: tuple[pnc.Clone, pnc.Clone]) -> pnc.Composite:
    return pnc.attach(pair().target.module, *clones)


def test_the_measures_are_those_of_the_logits(net: pnc.Composite) -> None:
    test = held_out_images()
    found = pnc.evaluate(net, test)
    measured = measure_logits(logits_of(net, test.images), test.labels, logits_of(net.target, test.images))
    assert {key: getattr(found, key) for key in vars(measured)} == vars(measured)
    assert (found.clones, found.classes, found.n_images) == (("low", "high"), (*BASE, *NEW), len(test))
    assert found.base_logits_equal and found.classes_without_images == ()


def test_labelled_images_may_come_in_any_form(net: pnc.Composite) -> None:
    test = held_out_images()
    expected = pnc.evaluate(net, test)
    names = [test.classes[label] for label in test.labels]
    assert pnc.evaluate(net, (test.images, names)) == expected
    assert pnc.evaluate(net, DataLoader(TensorDataset(test.images, test.labels), batch_size=50)) == expected


def test_images_of_unknown_classes_are_left_out_where_the_data_names_them(net: pnc.Composite) -> None:
    net.detach("high")
    test = held_out_images()
    found = pnc.evaluate(net, test)
    known = pnc.evaluate(net, class_subset(test, (*BASE, *NEW[:2])))
    assert found == dataclasses.replace(known, n_ignored=len(test) - known.n_images)
    assert known.n_images < len(test) and known.n_ignored == 0
    few = pnc.evaluate(net, class_subset(test, ("1", "3", "5")))
    assert few.classes_without_images == ("0", "2", "4", "6")
    names = [test.classes[label] for label in test.labels]
    with pytest.raises(pnc.ClassNameError, match="'7'"):
        pnc.evaluate(net, (test.images, names))


def test_it_prints_on_one_screen_and_names_clones_that_are_not_calibrated(net: pnc.Composite) -> None:
    found = pnc.evaluate(net, held_out_images())
    assert found.uncalibrated == ("low", "high")
    lines = str(found).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert f"new accuracy            {found.new_accuracy:.4g}" in lines
    assert "base logits equal       yes" in lines
    assert "Not calibrated: low, high." in " ".join(lines)
    pnc.calibrate(net, support())
    calibrated = pnc.evaluate(net, held_out_images())
    assert calibrated.uncalibrated == () and "calibrated" not in str(calibrated).replace("uncalibrated", "")
    with net.only("low"):
        assert pnc.evaluate(net, held_out_images()).uncalibrated == ()


def test_one_clone_alone_needs_no_calibration(clones: tuple[pnc.Clone, pnc.Clone]) -> None:
    found = pnc.evaluate(pnc.attach(pair().target.module, clones[0]), held_out_images())
    assert found.uncalibrated == () and "Not calibrated" not in str(found)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.leak = 0.0  # type: ignore[misc]


def test_what_cannot_be_measured_is_refused(net: pnc.Composite) -> None:
    test = held_out_images()
    with pytest.raises(pnc.InputError, match="images of base and of new classes are needed"):
        pnc.evaluate(net, class_subset(test, NEW))
    with pytest.raises(pnc.InputError, match="net: expected a composite, as returned by pnc.attach; got"):
        pnc.evaluate(net.target, test)  # type: ignore[arg-type]
    with net.disabled(), pytest.raises(pnc.InputError, match="net: no clone is enabled"):
        pnc.evaluate(net, test)


def test_predictions_name_classes_probabilities_and_who_answered(net: pnc.Composite, tmp_path: Path) -> None:
    folder = write_images(tmp_path, "test", (*BASE, *NEW), 2) / "test"
    found = pnc.predict(net, folder)
    assert [one.image for one in found] == [str(path) for path in sorted(folder.rglob("*.png"))]
    files = sorted(folder.rglob("*.png"))
    images = torch.stack([torch.from_numpy(np.array(Image.open(file)))[None].float() / 255 for file in files])
    expected = logits_of(net, images).softmax(1)
    for one, row in zip(found, expected, strict=True):
        assert one.probabilities == dict(sorted(zip(net.classes, row.tolist(), strict=True), key=lambda p: -p[1]))
        assert one.label == net.classes[int(row.argmax())] and one.probability == row.max()
        assert one.clone == (None if one.label in BASE else "low" if one.label in NEW[:2] else "high")
    assert sum(one.label == Path(str(one.image)).parent.name for one in found) >= 17
    assert found[0].top(2) == dict(list(found[0].probabilities.items())[:2])
    assert str(found[0]).startswith(f"{found[0].image}: {found[0].label} ({found[0].probability:.2f}), ")


def test_a_set_of_clones_that_changes_meanwhile_does_not_change_the_answers(
    clones: tuple[pnc.Clone, pnc.Clone],
) -> None:
    net, test = pnc.attach(pair().target.module, *clones), held_out_images()
    answers, report = pnc.predict(net, test.images), pnc.evaluate(net, test)

    def change(what: str, done: int, total: int) -> None:
        if done == 64 and "low" in net.clones:
            net.detach("low")

    assert pnc.predict(net, test.images, progress=change) == answers
    net.attach(clones[0])
    net.detach("high")
    net.attach(clones[1])
    assert pnc.evaluate(net, test, progress=change) == report
    assert net.clones == ("high",)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5])
def test_batch_sizes_are_checked(net: pnc.Composite, batch_size: Any) -> None:
    test = held_out_images()
    with pytest.raises(pnc.InputError, match="batch_size: expected a whole number, at least 1"):
        pnc.predict(net, test.images, batch_size=batch_size)
    with pytest.raises(pnc.InputError, match="batch_size: expected a whole number, at least 1"):
        pnc.evaluate(net, test, batch_size=batch_size)


def test_files_pillow_images_arrays_and_tensors_are_answered_alike(net: pnc.Composite, tmp_path: Path) -> None:
    file = write_images(tmp_path, "test", ("7",), 1) / "test" / "7" / "0.png"
    array = np.array(Image.open(file))
    kinds: list[Any] = [file, str(file), Image.open(file), array, torch.from_numpy(array)[None]]
    answers = [pnc.predict(net, kind)[0].probabilities for kind in kinds]
    assert all(one == answers[0] for one in answers)
    together = pnc.predict(net, kinds, batch_size=1)
    assert [one.probabilities for one in together] == answers
    assert [one.image for one in together] == [str(file)] * 3 + [None] * 2


def test_renamed_clones_and_the_targets_own_normalization(clones: tuple[pnc.Clone, pnc.Clone], tmp_path: Path) -> None:
    net = pnc.attach(pair().target.module, clones[1].renamed("numbers", {"7": "seven"}))
    folder = write_images(tmp_path, "test", ("7",), 20) / "test" / "7"
    assert ("seven", "numbers") in {(one.label, one.clone) for one in pnc.predict(net, folder)}
    file = folder / "0.png"
    (found,) = pnc.predict(net, file)
    images = torch.from_numpy(np.array(Image.open(file)))[None, None].float() / 255
    (other,) = pnc.predict(net, file, normalization=pnc.Normalization(0.5, 2.0))
    assert other.probabilities == pnc.predict(net, (images - 0.5) / 2)[0].probabilities != found.probabilities
    with pytest.raises(pnc.InputError, match="net: expected a composite"):
        pnc.predict(net.target, file)  # type: ignore[arg-type]
