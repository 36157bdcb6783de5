import multiprocessing
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pnc.bench.result_files import Cells
from pnc.data.image_set import ImageSet, class_subset, relabel, select
from pnc.data.readers import load_data
from pnc.foundation.errors import ClassNameError, InputError
from pnc.foundation.network_state import differences, take_snapshot
from pnc.foundation.tensor_files import read_tensors
from pnc.models.model_specs import load_model
from pnc.models.pretraining import EpochReport, Recipe, augment, one_cycle, pretrain, recipe_for

SPEC = "zoo:cnn?width=0.25"
RECIPE = Recipe(epochs=3, batch_size=32, crop_padding=1, flip=False, threads=1)


@pytest.fixture(scope="module")
def sets() -> tuple[ImageSet, ImageSet]:
    train, test = (class_subset(load_data("digits", split), ["0", "1", "2"]) for split in ("train", "test"))
    return train, test


@pytest.fixture(scope="module")
def trained(sets: tuple[ImageSet, ImageSet], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nets") / "a.safetensors"
    pretrain(SPEC, *sets, RECIPE, path)
    return path


class Stop(Exception):
    pass


def stop_after(epoch: int) -> Any:
    def progress(report: EpochReport) -> None:
        if report.epoch == epoch:
            raise Stop

    return progress


def test_a_network_learns(sets: tuple[ImageSet, ImageSet], trained: Path) -> None:
    model = load_model(str(trained))
    assert model.classes == ("0", "1", "2")
    assert model.input_shape == (1, 8, 8)
    right = model.module(sets[1].images).argmax(1) == sets[1].labels
    assert model.facts["test_accuracy"] == int(right.sum()) / len(right)
    assert model.facts["test_accuracy"] > 0.95
    assert model.facts["recipe"] == RECIPE.facts()
    losses = [epoch["train_loss"] for epoch in model.facts["history"]]
    assert len(losses) == 3 and losses[-1] < losses[0] / 2


def test_the_normalization_is_that_of_the_training_images(sets: tuple[ImageSet, ImageSet], trained: Path) -> None:
    module = load_model(str(trained)).module
    pixels = sets[0].images.double()
    # sums of float32 pixels in float64, rounded to float32
    torch.testing.assert_close(module.get_buffer("normalize.mean").item(), pixels.mean().item(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        module.get_buffer("normalize.std").item(), pixels.std(correction=0).item(), rtol=1e-6, atol=0
    )


def test_reports_come_after_every_epoch(sets: tuple[ImageSet, ImageSet], tmp_path: Path) -> None:
    reports: list[EpochReport] = []
    model = pretrain(SPEC, *sets, RECIPE, tmp_path / "a.safetensors", reports.append)
    assert [(report.epoch, report.epochs) for report in reports] == [(1, 3), (2, 3), (3, 3)]
    assert all(report.seconds > 0 for report in reports)
    assert [
        {"train_loss": report.train_loss, "test_accuracy": report.test_accuracy} for report in reports
    ] == model.facts["history"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_stopped_run_ends_with_the_same_bytes(
    sets: tuple[ImageSet, ImageSet], tmp_path: Path, optimizer: Any, epoch: int
) -> None:
    recipe = replace(RECIPE, optimizer=optimizer, lr=0.1 if optimizer == "sgd" else 0.01, flip=True)
    straight, stopped = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    pretrain(SPEC, *sets, recipe, straight)
    with pytest.raises(Stop):
        pretrain(SPEC, *sets, recipe, stopped, stop_after(epoch))
    assert not stopped.exists()
    reports: list[EpochReport] = []
    pretrain(SPEC, *sets, recipe, stopped, reports.append)
    assert [report.epoch for report in reports] == list(range(epoch + 1, 4))
    assert stopped.read_bytes() == straight.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def train_and_report(path: Path, connection: Any) -> None:
    """Train on digits, keep a row of each epoch, and send its number; runs in a process that is killed."""
    sets = [class_subset(load_data("digits", split), ["0", "1", "2"]) for split in ("train", "test")]
    cells = Cells(path.with_suffix(".jsonl"), {}, ["epoch"])

    def progress(report: EpochReport) -> None:
        cells.add({"epoch": report.epoch, "loss": report.train_loss})
        connection.send(report.epoch)
        if report.epoch == LONG.epochs - 1:
            time.sleep(600)  # it never ends before it is killed

    pretrain(SPEC, *sets, LONG, path, progress)


LONG = replace(RECIPE, epochs=8)


def test_a_run_that_is_killed_goes_on_and_loses_nothing(sets: tuple[ImageSet, ImageSet], tmp_path: Path) -> None:
    straight = pretrain(SPEC, *sets, LONG, tmp_path / "a.safetensors")
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    path = tmp_path / "b.safetensors"
    worker = context.Process(target=train_and_report, args=(path, sender))
    worker.start()
    sender.close()
    try:
        while receiver.recv() < 2:
            pass
    finally:
        worker.kill()  # SIGKILL
        worker.join()
    assert not path.exists()
    rows = Cells(path.with_suffix(".jsonl"), {}, ["epoch"]).rows
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) >= 2
    assert [row["loss"] for row in rows] == [row["train_loss"] for row in straight.facts["history"][: len(rows)]]
    reports: list[EpochReport] = []
    pretrain(SPEC, *sets, LONG, path, reports.append)
    assert reports[0].epoch - len(rows) in (1, 2), "no epoch that was reported is trained again"
    assert path.read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.jsonl", "b.safetensors"]


DROPOUT = """
from torch import nn
def network(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3))
"""


def test_global_randomness_is_seeded_for_the_network_and_put_back(
    sets: tuple[ImageSet, ImageSet], tmp_path: Path
) -> None:
    (tmp_path / "code.py").write_text(DROPOUT)
    spec, paths = f"py:{tmp_path / 'code.py'}:network", [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    pretrain(spec, *sets, RECIPE, paths[0])
    torch.rand(1)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    with pytest.raises(Stop):
        pretrain(spec, *sets, replace(RECIPE, threads=2), paths[1], stop_after(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    model = pretrain(spec, *sets, RECIPE, paths[1])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert not differences(model.module, take_snapshot(load_model(spec, weights=paths[0]).module))


def test_another_seed_gives_another_network(sets: tuple[ImageSet, ImageSet], trained: Path, tmp_path: Path) -> None:
    other = pretrain(SPEC, *sets, replace(RECIPE, seed=1), tmp_path / "a.safetensors")
    assert differences(other.module, take_snapshot(load_model(str(trained)).module))


def test_a_finished_run_is_not_made_again(sets: tuple[ImageSet, ImageSet], trained: Path) -> None:
    before = trained.stat().st_mtime_ns
    for overwrite in (False, True):
        model = pretrain(SPEC, *sets, replace(RECIPE, threads=2), trained, stop_after(1), overwrite=overwrite)
        assert model.facts["recipe"] == RECIPE.facts()
    assert trained.stat().st_mtime_ns == before


def test_another_recipe_or_other_data_need_overwrite(sets: tuple[ImageSet, ImageSet], tmp_path: Path) -> None:
    path, recipe = tmp_path / "a.safetensors", replace(RECIPE, epochs=1)
    pretrain(SPEC, *sets, recipe, path)
    whole = path.read_bytes()
    fewer = select(sets[0], torch.arange(100))
    for other in ((SPEC, *sets, RECIPE), (SPEC, fewer, sets[1], recipe), ("zoo:cnn?width=0.5", *sets, recipe)):
        with pytest.raises(InputError, match="made with another network, data or recipe; choose another path"):
            pretrain(*other, path)
    assert path.read_bytes() == whole
    pretrain(SPEC, fewer, sets[1], recipe, path, overwrite=True)
    assert path.read_bytes() != whole


def test_an_unfinished_run_with_another_recipe_needs_overwrite(
    sets: tuple[ImageSet, ImageSet], trained: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(Stop):
        pretrain(SPEC, *sets, replace(RECIPE, seed=5), path, stop_after(2))
    with pytest.raises(InputError, match=r"a\.safetensors\.partial\.safetensors was made with another"):
        pretrain(SPEC, *sets, RECIPE, path)
    pretrain(SPEC, *sets, RECIPE, path, overwrite=True)
    assert path.read_bytes() == trained.read_bytes()


def test_a_file_that_is_no_network_needs_overwrite(
    sets: tuple[ImageSet, ImageSet], trained: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"something else")
    with pytest.raises(InputError, match="choose another path, or overwrite it"):
        pretrain(SPEC, *sets, RECIPE, path)
    assert path.read_bytes() == b"something else"
    pretrain(SPEC, *sets, RECIPE, path, overwrite=True)
    assert path.read_bytes() == trained.read_bytes()


def test_nothing_is_left_where_nothing_can_be_written(sets: tuple[ImageSet, ImageSet], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        pretrain(SPEC, *sets, RECIPE, tmp_path / "missing" / "a.safetensors", stop_after(1))
    assert not list(tmp_path.iterdir())


def test_the_test_set_is_matched_by_name(sets: tuple[ImageSet, ImageSet], trained: Path, tmp_path: Path) -> None:
    train, test = sets
    path = tmp_path / "a.safetensors"
    pretrain(SPEC, train, relabel(test, ["2", "0", "1"]), RECIPE, path)
    assert path.read_bytes() == trained.read_bytes()


def test_sets_that_do_not_match_are_refused(sets: tuple[ImageSet, ImageSet], tmp_path: Path) -> None:
    train, test = sets
    path = tmp_path / "a.safetensors"
    larger = ImageSet(torch.zeros(len(test), 1, 9, 9), test.labels, test.classes)
    for bad, error, message in (
        ((train, larger), InputError, r"test: images of shape \(1, 9, 9\), but \(1, 8, 8\) in train"),
        ((train, train), InputError, "test: these are the training images"),
        ((relabel(train, ["0", "1", "2", "9"]), test), InputError, "train: no image of 9; use class_subset"),
        ((class_subset(train, ["0", "1"]), test), ClassNameError, "2 missing, but the data has images of it"),
    ):
        with pytest.raises(error, match=message):
            pretrain(SPEC, *bad, RECIPE, path)
    with pytest.raises(InputError, match=r"ends in \.safetensors, got .*a\.pt"):
        pretrain(SPEC, *sets, RECIPE, tmp_path / "a.pt")
    with pytest.raises(InputError, match="device: 'abacus' cannot be used"):
        pretrain(SPEC, *sets, replace(RECIPE, device="abacus"), path)
    assert not list(tmp_path.iterdir())


def test_a_diverging_run_says_so(sets: tuple[ImageSet, ImageSet], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lr: the loss or a weight became infinite in epoch 1 .* with lr 1000.0"):
        pretrain(SPEC, *sets, replace(RECIPE, lr=1000.0), tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, "epochs: expected a number from 1 to 1e+06; got 0"),
        ({"batch_size": 1}, "batch_size: expected a number from 2"),
        ({"lr": 0.0}, "lr: expected"),
        ({"lr": float("nan")}, "lr: expected"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected a number from 0 to 0.999"),
        ({"seed": -1}, "seed: expected"),
        ({"threads": 0}, "threads: expected"),
        ({"optimizer": "lion"}, "optimizer: expected 'sgd' or 'adamw', got 'lion'"),
    ],
)
def test_bad_recipes_are_refused(setting: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Recipe(**setting)


def test_recipes_by_network() -> None:
    assert recipe_for("zoo:resnet20?width=2") == Recipe()
    assert recipe_for("zoo:vit_tiny").optimizer == "adamw"


def test_the_recipe_in_the_file_makes_the_recipe_again(trained: Path) -> None:
    _, facts = read_tensors(trained)
    assert replace(Recipe(**facts["recipe"]), threads=1) == RECIPE


def test_one_cycle_rises_to_the_peak_and_falls_to_nothing() -> None:
    shares = [one_cycle(step, 100) for step in range(100)]
    assert shares[14] == max(shares) == 1
    assert shares[:15] == sorted(shares[:15]) and shares[14:] == sorted(shares[14:], reverse=True)
    assert shares[0] == 1 / 15
    assert shares[-1] == 0
    assert one_cycle(0, 1) == 1


def test_augmentation_shifts_and_mirrors_each_image_by_its_own_draw() -> None:
    images = torch.randint(1, 256, (40, 3, 5, 6), dtype=torch.uint8)
    padded = torch.nn.functional.pad(images, [2] * 4)
    seen = set()
    for index, image in enumerate(augment(images, 2, True, torch.Generator().manual_seed(0))):
        found = [
            (top, left, mirrored)
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            if torch.equal(image.flip(2) if mirrored else image, padded[index, :, top : top + 5, left : left + 6])
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 25  # of 50 ways
    assert {mirrored for _, _, mirrored in seen} == {False, True}


def test_augmentation_can_be_off() -> None:
    images = torch.rand(8, 1, 4, 4)
    assert torch.equal(augment(images, 0, False, torch.Generator()), images)
