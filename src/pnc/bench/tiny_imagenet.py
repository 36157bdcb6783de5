"""A small network gets ten classes of a public ImageNet model; the clone and its rivals on Tiny-ImageNet.

The target is a ResNet-20 for 32x32 pixels that knows 50 classes of Tiny-ImageNet; the source is EfficientNet-Lite0 with
its public ImageNet weights, 1000 classes. Each network sees the 64x64 images of Tiny-ImageNet at its own size.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from pnc.bench import compare, compare_report
from pnc.bench.bench import Rows
from pnc.bench.comparison_methods import choose_methods
from pnc.bench.main_job import CLONE
from pnc.bench.public_network import public_network, resized
from pnc.bench.result_files import Cells, Claim, at_most
from pnc.bench.rivals.rival import Budget
from pnc.bench.setting import Setting
from pnc.composite.batched_logits import logits_of
from pnc.data.image_set import ImageSet, class_subset, images_as_float, relabel
from pnc.data.readers import load_data
from pnc.method.task import Precision, Progress
from pnc.models.model_specs import LoadedModel, load_model
from pnc.models.pretraining import Recipe, pretrain

SPEC = "zoo:resnet20"
RECIPE = Recipe(epochs=30, crop_padding=4, precision="bfloat16")
TARGET_SIZE = 32
N_BASE_CLASSES, N_NEW_CLASSES = 50, 10
BUDGET = Budget()


@dataclass(frozen=True)
class Choice:
    """What is measured.

    Attributes:
        data: Data spec of Tiny-ImageNet.
        n_new: Images of each new class in the support.
        n_base: Images of each base class in it.
        n_classes: How many of the new classes are cloned.
        methods: Names of methods, separated by commas; None for all.
        seeds: Number of supports.
        source_size: Height and width that the source sees.
        runs: Folder where the trained target is kept.
        precision: Of training.
    """

    data: str
    n_new: int
    n_base: int
    n_classes: int = N_NEW_CLASSES
    methods: str | None = None
    seeds: int = 3
    source_size: int = 224
    runs: Path = Path("runs")
    precision: Precision = "float32"


def measure(chosen: Choice, cells: Cells, progress: Progress) -> dict[str, Any]:
    """Train or load the target, measure the cells that are missing; return the facts of all cells."""
    images = load_data(chosen.data, "train"), load_data(chosen.data, "test")
    target = small_target(*images, chosen.runs, progress)
    source = public_network(images[0].input_shape, chosen.source_size)
    new = [name for name in images[0].classes[N_BASE_CLASSES:] if name in source.classes][:N_NEW_CLASSES]
    run = compare.measure(
        Setting(source, target, *images, data="Tiny-ImageNet", n_new=chosen.n_new, n_base=chosen.n_base, flip=True),
        group=", ".join(new[: chosen.n_classes]),
        budget=dataclasses.replace(BUDGET, precision=chosen.precision),
        methods=choose_methods(chosen.methods),
        seeds=range(chosen.seeds),
    )
    run(cells, progress)
    return {
        "new": new,
        "target_accuracy": accuracy(target, class_subset(images[1], target.classes)),
        "source_accuracy": accuracy(source, relabel(class_subset(images[1], new), source.classes)),
        "source_bytes": sum(t.numel() * t.element_size() for t in source.module.state_dict().values()),
        "rows": compare_report.means(cells.rows),
        "made_by": compare_report.made_by(cells.rows),
    }


def small_target(train: ImageSet, test: ImageSet, runs: Path, progress: Progress) -> LoadedModel:
    """Return the target; train it unless its file exists."""
    runs.mkdir(parents=True, exist_ok=True)
    classes, out = train.classes[:N_BASE_CLASSES], runs / "tiny_imagenet_target.safetensors"
    pretrain(
        SPEC,
        shrunk(class_subset(train, classes)),
        shrunk(class_subset(test, classes)),
        RECIPE,
        out,
        progress=lambda epoch: progress("training the target", epoch.epoch, epoch.epochs),
    )
    return resized(load_model(str(out)), train.input_shape)


def shrunk(data: ImageSet) -> ImageSet:
    """Resize images as `pnc.Preprocessed` does for the target."""
    size = (TARGET_SIZE, TARGET_SIZE)
    images = F.interpolate(images_as_float(data.images), size, mode="bilinear", antialias=True)
    return ImageSet(images, data.labels, data.classes)


def accuracy(model: LoadedModel, data: ImageSet) -> float:
    """Share of images whose class has the highest logit of all that the network knows."""
    return float((logits_of(model.module, data.images).argmax(1) == data.labels).double().mean())


def claims(facts: dict[str, Any], rows: Rows) -> list[Claim]:
    """Return the claims of every comparison, and one on the size of the clone's file."""
    sizes = [
        at_most(
            f"{regime.title}: size of the thin file as a share of the source's weights",
            0.02,
            regime.mean(CLONE, "bytes") / facts["source_bytes"],
        )
        for regime in compare_report.regimes(rows)
        if CLONE in regime.methods
    ]
    return [*compare_report.claims(rows), *sizes]


def markdown(facts: dict[str, Any], rows: Rows) -> str:
    """Describe networks and data, then the tables."""
    return "\n\n".join(
        [
            f"EfficientNet-Lite0 (ImageNet, 1000 classes) gives {len(facts['new'])} classes of Tiny-ImageNet "
            f"({', '.join(facts['new'])}) to a ResNet-20 for {TARGET_SIZE}x{TARGET_SIZE} that knows {N_BASE_CLASSES} "
            f"others. Alone, the target has an accuracy of {facts['target_accuracy']:.3f} on its own classes, the "
            f"source of {facts['source_accuracy']:.3f} on the new ones among its 1000.",
            compare_report.markdown(rows),
        ]
    )
