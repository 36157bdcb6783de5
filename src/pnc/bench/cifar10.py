"""The main job on CIFAR-10: a ResNet-20 that knows five classes gets the other five; rivals on the same samples."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pnc.bench import main_job
from pnc.bench.result_files import Claim, at_least, at_most, table
from pnc.composite.batched_logits import logits_of
from pnc.data.image_set import ImageSet, class_subset, relabel
from pnc.data.readers import load_data
from pnc.data.support import draw_support
from pnc.method.task import Progress
from pnc.models.model_specs import LoadedModel, load_model
from pnc.models.pretraining import Recipe, pretrain

SPEC = "zoo:resnet20"
RECIPE = Recipe(precision="bfloat16")
N_NEW, N_BASE = 100, 20
COLUMNS = ("method", "base_accuracy", "new_accuracy", "average_accuracy", "conditional_kl", "leak", "seconds", "bytes")


@dataclass(frozen=True)
class Choice:
    """What is measured.

    Attributes:
        data: Data spec.
        data_name: Name of the data in the results.
        target: File of the trained target; None trains it.
        source: File of the trained source, likewise.
        runs: Folder where trained networks are kept.
        seed: Of the support and the clone.
    """

    data: str
    data_name: str = "CIFAR-10 (JPEG)"
    target: Path | None = None
    source: Path | None = None
    runs: Path = Path("runs")
    seed: int = 0


def measure(chosen: Choice, progress: Progress) -> dict[str, Any]:
    """Run the clone and its rivals; return the facts of `main_job.run`, with data, networks and support."""
    train, test = load_data(chosen.data, "train"), load_data(chosen.data, "test")
    half = len(train.classes) // 2
    halves = {"target": train.classes[:half], "source": train.classes[half:]}
    files = {
        role: getattr(chosen, role) or _trained(role, train, test, halves[role], chosen.runs, progress)
        for role in halves
    }
    start = time.perf_counter()
    target, source = (load_model(str(files[role])) for role in ("target", "source"))
    load_seconds = time.perf_counter() - start
    base, new = target.classes, [name for name in source.classes if name not in target.classes]
    job = main_job.Job(
        source=source,
        target=target,
        support=draw_support(train, new, base, N_NEW, N_BASE, torch.Generator().manual_seed(chosen.seed)),
        test=relabel(class_subset(test, [*base, *new]), [*base, *new]),
        flip=True,
        seed=chosen.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        facts = main_job.run(job, list(main_job.RIVALS), Path(folder), progress=progress)
    return {
        "data": f"{chosen.data_name}, {len(job.test):,} test images",
        "networks": {role: own_accuracy(model, test) for role, model in (("target", target), ("source", source))},
        "support": f"{N_NEW}/{N_BASE} images per new/base class, with mirror images, seed {chosen.seed}",
        "load_seconds": load_seconds,
        **facts,
    }


def _trained(
    role: str, train: ImageSet, test: ImageSet, classes: Sequence[str], runs: Path, progress: Progress
) -> Path:
    """Train a network on some classes, unless its file exists; return the file."""
    runs.mkdir(parents=True, exist_ok=True)
    out = runs / f"cifar10_{role}.safetensors"
    pretrain(
        SPEC,
        class_subset(train, classes),
        class_subset(test, classes),
        RECIPE,
        out,
        progress=lambda epoch: progress(f"training the {role}", epoch.epoch, epoch.epochs),
    )
    return out


def own_accuracy(model: LoadedModel, test: ImageSet) -> float:
    """Accuracy of a network on test images of its own classes, among these classes."""
    own = class_subset(test, model.classes)
    return float((logits_of(model.module, own.images).argmax(1) == own.labels).double().mean())


def claims(facts: dict[str, Any]) -> list[Claim]:
    """Compare the measured values with the expected ones."""
    rows = {row["method"]: row for row in facts["rows"]}
    clone, ensemble = rows[main_job.CLONE], rows["direct ensemble"]
    gain = clone["average_accuracy"] - ensemble["average_accuracy"]
    found = [
        at_least("average accuracy of the clone, closed form alone", 0.74, clone["average_accuracy"]),
        at_least("average accuracy above the direct ensemble's", 0, gain),
        at_most("conditional KL", 1e-6, clone["conditional_kl"]),
        at_most("seconds to load both networks, scan and fit", 40, facts["load_seconds"] + clone["seconds"]),
        at_least("accuracy of the target on its own classes", 0.88, facts["networks"]["target"]),
        at_least("accuracy of the source on its own classes", 0.93, facts["networks"]["source"]),
    ]
    return found + [Claim(name.replace("_", " "), "true", value, value) for name, value in facts["verified"].items()]


def markdown(facts: dict[str, Any]) -> str:
    """Format the rows as a table, with data, networks and support."""
    made, networks = facts["clone"], facts["networks"]
    return "\n".join(
        [
            f"{facts['data']}. On their own classes the target has an accuracy of {networks['target']:.3f}, the source "
            f"of {networks['source']:.3f}. Support: {facts['support']}.",
            "",
            table(COLUMNS, [[row[column] for column in COLUMNS] for row in facts["rows"]]),
            "",
            "`seconds`: time to make it from both networks and the support. `bytes`: what must be sent to somebody who "
            "has both networks.",
            f"The clone leaves the target at `{made['position']['target_cut']}`, enters the source at "
            f"`{made['position']['source_cut']}`, and adds {made['added_macs_share']:.0%} of the source's "
            "multiply-accumulates.",
        ]
    )
