"""The examples, and the benches on photographs, run on small data."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

import pnc
from digits import held_out_images, network, pair
from pnc.bench import backbone_networks, cifar10, main_job, tiny_imagenet
from pnc.bench.rivals.rival import Budget
from pnc.cli import app
from pnc.cli.bench_commands import bench
from pnc.foundation.errors import InputError
from pnc.models.model_specs import save_model
from pnc.models.pretraining import Recipe

ROOT = Path(__file__).parents[2]
FASHION_MNIST = os.environ.get("FASHION_MNIST")


def module_of(example: str) -> ModuleType:
    """The module examples/NAME.py."""
    spec = importlib.util.spec_from_file_location(example, ROOT / "examples" / f"{example}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(words: str) -> None:
    """Run a `pnc bench` command."""
    assert CliRunner().invoke(bench, words.split(), catch_exceptions=False).exit_code == 0


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks and few steps of fine-tuning in the bench of CIFAR-10."""
    monkeypatch.setattr(cifar10, "SPEC", "zoo:cnn?width=0.25")
    monkeypatch.setattr(cifar10, "RECIPE", Recipe(epochs=2, batch_size=64, crop_padding=1, flip=False))
    monkeypatch.setattr(main_job, "BUDGET", Budget(1, 1, 2, 1))


def save_pair(folder: Path) -> None:
    save_model(pair().target, folder / "cifar10_target.safetensors", {})
    save_model(pair().source, folder / "cifar10_source.safetensors", {})


@pytest.mark.usefixtures("small")
def test_the_bench_of_cifar10_writes_rows_and_claims(tmp_path: Path) -> None:
    save_pair(tmp_path)
    networks = " ".join(f"--{role} {tmp_path}/cifar10_{role}.safetensors" for role in ("target", "source"))
    run(f"cifar10 --data digits {networks} --out {tmp_path}/out --data-name Digits")
    facts = json.loads((tmp_path / "out" / "cifar10.json").read_text())
    methods = ["target alone", "direct ensemble", "LDA on target features", "fine-tuning with replay", "clone"]
    assert [row["method"] for row in facts["rows"]] == methods
    found = {claim["claim"]: claim for claim in facts["claims"]}
    clone = facts["rows"][-1]
    assert found["average accuracy of the clone, closed form alone"]["value"] == clone["average_accuracy"] > 0.74
    assert found["conditional KL"]["holds"]
    assert found["seconds to load both networks, scan and fit"]["value"] > clone["seconds"]
    assert all(found[name.replace("_", " ")]["holds"] for name in facts["verified"])
    assert facts["networks"]["target"] > 0.9
    text = (tmp_path / "out" / "cifar10.md").read_text()
    assert "Digits, 445 test images" in text and "| clone | " in text
    assert "`pnc bench cifar10 --data Digits --seed 0 --threads 1`" in text
    assert str(tmp_path) not in text + json.dumps(facts)


@pytest.mark.usefixtures("small")
def test_the_bench_of_cifar10_trains_once(tmp_path: Path) -> None:
    words = f"cifar10 --data digits --out {tmp_path}/out --runs {tmp_path}/runs"
    run(words)
    files = sorted((tmp_path / "runs").iterdir())
    assert [path.name for path in files] == ["cifar10_source.safetensors", "cifar10_target.safetensors"]
    before = [path.stat().st_mtime_ns for path in files]
    run(words)
    assert [path.stat().st_mtime_ns for path in files] == before


def test_the_benches_on_photographs_refuse_bad_input(tmp_path: Path) -> None:
    for words, text in (
        (f"cifar10 --data parquet:no --out {tmp_path}", "there is no file or folder no"),
        (f"tiny-imagenet --data parquet:no --support 20/0 --out {tmp_path}", "images of new and of base classes"),
    ):
        with pytest.raises(InputError, match=text):
            CliRunner().invoke(bench, words.split(), catch_exceptions=False)


def test_the_cifar_example_reads_as_a_tutorial_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pair(tmp_path)
    module_of("cifar10").main("digits", tmp_path)
    text = capsys.readouterr().out
    assert "all equal, bit for bit" in text and "with priority 1 nat: old 0.9" in text
    assert (tmp_path / "cifar10.safetensors").is_file()


def test_the_tiny_imagenet_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pair(tmp_path)
    example = module_of("tiny_imagenet")
    monkeypatch.setattr(example, "public_network", lambda shape, size: pair().source)
    example.main("digits", tmp_path / "cifar10_target.safetensors", 3)
    text = capsys.readouterr().out
    assert "new classes           5, 6, 7" in text and "of the source's weights" in text and "average accuracy" in text


@pytest.mark.parametrize("example", ["cifar10", "tiny_imagenet"])
def test_the_examples_are_short(example: str) -> None:
    assert len((ROOT / "examples" / f"{example}.py").read_text().splitlines()) <= 60


def readme_block(heading: str, language: str) -> str:
    text = (ROOT / "README.md").read_text()
    found = re.search(rf"^## {heading}\n(?:.*\n)*?```{language}\n((?:.*\n)*?)```", text, re.MULTILINE)
    assert found is not None, f"README.md has no {language} block under {heading!r}"
    return found[1]


def test_the_commands_of_the_readme_run(torchvision: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, model in (("mine", pair().target), ("other", pair().source)):
        save_model(model, tmp_path / f"{name}.safetensors", {})
    lines = readme_block("On the command line", "sh").splitlines()
    assert [line.split()[:2] for line in lines] == [["pnc", name] for name in ("clone", "eval", "report", "export")]
    for line in lines:
        small = line.replace("folder:photos", "digits").replace("timm:resnet18", "other.safetensors")
        monkeypatch.setattr(sys, "argv", small.split())
        with pytest.raises(SystemExit) as stopped:
            app.main()
        assert not stopped.value.code, line


def test_the_bench_of_tiny_imagenet_goes_on_over_seeds_and_counts_its_claims(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    example = tiny_imagenet
    monkeypatch.setattr(example, "BUDGET", Budget(1, 1, 2, 1))
    monkeypatch.setattr(example, "SPEC", "zoo:cnn?width=0.25")
    monkeypatch.setattr(example, "RECIPE", Recipe(epochs=2, batch_size=64, crop_padding=1, flip=False))
    monkeypatch.setattr(example, "TARGET_SIZE", 6)
    monkeypatch.setattr(example, "N_BASE_CLASSES", 5)
    monkeypatch.setattr(example, "N_NEW_CLASSES", 3)
    monkeypatch.setattr(example, "public_network", lambda shape, size: pair().source)
    words = ["tiny-imagenet", "--data", "digits", "--support", "8/4", "--out", str(tmp_path), "--runs", str(tmp_path)]
    words += ["--methods", "clone,fine-tuning with replay,direct ensemble"]
    CliRunner().invoke(bench, [*words, "--seeds", "1"], catch_exceptions=False)
    first = (tmp_path / "tiny_imagenet.jsonl").read_text()
    CliRunner().invoke(bench, [*words, "--seeds", "2"], catch_exceptions=False)
    everything = (tmp_path / "tiny_imagenet.jsonl").read_text()
    assert everything.startswith(first), "cells that are there are not made again"
    rows = [json.loads(line) for line in everything.splitlines() if "method" in json.loads(line)]
    assert [row["seed"] for row in rows] == [0, 0, 0, 1, 1, 1]
    facts = json.loads((tmp_path / "tiny_imagenet.json").read_text())
    assert facts["new"] == ["5", "6", "7"] and facts["source_accuracy"] > 0.9
    averages = {
        method: sum(row["average_accuracy"] for row in rows if row["method"] == method) / 2
        for method in ("clone", "fine-tuning with replay")
    }
    title = f"Tiny-ImageNet, 8/4, 5 and 2 others, zoo:cnn?width=0.25 from {pair().source.spec}"
    found = {claim["claim"]: claim for claim in facts["claims"]}
    gain = found[f"{title}: average accuracy above fine-tuning with replay, the best tuning rival"]
    assert gain["value"] == pytest.approx(averages["clone"] - averages["fine-tuning with replay"])
    sizes = [row["bytes"] for row in rows if row["method"] == "clone"]
    share = found[f"{title}: size of the thin file as a share of the source's weights"]
    assert share["value"] == pytest.approx(sum(sizes) / 2 / facts["source_bytes"])
    assert found["target unchanged in each of 6 cells"]["holds"] and found["removal exact in each of 2 cells"]["holds"]
    assert "seeds 0, 1" in (tmp_path / "tiny_imagenet.md").read_text()


def test_the_targets_small_images_are_those_that_preprocessing_makes() -> None:
    example = tiny_imagenet
    data = held_out_images()
    seen: list[torch.Tensor] = []

    class Watching(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return images.flatten(1)

    pnc.Preprocessed(Watching(), (1, example.TARGET_SIZE, example.TARGET_SIZE))(data.images)
    assert torch.equal(example.shrunk(data).images, seen[0])


@pytest.mark.slow
@pytest.mark.parametrize("data", ["digits", "fashion_mnist"])
def test_the_serving_example_gets_classes_and_loses_them_again(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--classes", "8", "--images", "40"]
    if data == "fashion_mnist":
        if FASHION_MNIST is None:
            pytest.skip("set FASHION_MNIST to a folder with its train.parquet and test.parquet")
        words = ["--data", f"parquet:{FASHION_MNIST}", "--images", "40"]
    module_of("serving").main(words)
    shown = capsys.readouterr().out
    found = re.findall(r"(old|new) classes: ([\d.]+)% of 40 images", shown)
    old, new = ([float(share) for what, share in found if what == kind] for kind in ("old", "new"))
    assert old[0] == old[2] > 80 and new[0] == new[2] == 0 and new[1] > 80 and old[1] > 80
    assert len(re.findall(r"meanwhile it answered for [1-9]\d* images", shown)) == 2
    assert "the same throughout, bit for bit" in shown


def test_the_example_of_one_backbone_adds_only_what_differs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = module_of("one_backbone")
    for name, value in (("N_BASE", 5), ("N_NEW", 3), ("N_TUNED", 20)):
        monkeypatch.setattr(backbone_networks, name, value)
    monkeypatch.setattr(example, "public_network", lambda shape: network(tuple("0123456789")))
    example.main(["--data", "digits", "--tuned", "head", "--runs", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "base accuracy" in shown and "all equal, bit for bit" in shown
    clone = pnc.load(tmp_path / "new-classes.safetensors", source=network(tuple("0123456789")).module)
    assert clone.recipe["macs_share"] < 0.02 and clone.classes == ("5", "6", "7")
