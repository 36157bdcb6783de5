"""The worked example on real photographs: a ResNet-20 that knows five CIFAR-10 classes gets the other five.

    python examples/cifar10.py --data parquet:PATH --out results

PATH is a folder with train.parquet and test.parquet in the image layout of Hugging Face `datasets`; `hf:cifar10` works
if the hub can be reached. The networks are trained once (about eight minutes each on one core with bfloat16) and kept
in `--runs`; a stopped run continues where it stopped. `--target` and `--source` use existing networks.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pnc.bench import main_job
from pnc.bench.result_files import Claim, at_least, at_most, table, write_results
from pnc.composite.batched_logits import logits_of
from pnc.data.image_set import ImageSet, class_subset, relabel
from pnc.data.readers import load_data
from pnc.data.support import draw_support
from pnc.foundation.errors import PNCError
from pnc.models.model_specs import LoadedModel, load_model
from pnc.models.pretraining import Recipe, pretrain

SPEC = "zoo:resnet20"
RECIPE = Recipe(precision="bfloat16")
N_NEW, N_BASE = 100, 20
COLUMNS = ("method", "base_accuracy", "new_accuracy", "average_accuracy", "conditional_kl", "leak", "seconds", "bytes")


def main(words: Sequence[str] | None = None) -> None:
    """Train or load both networks, compare, write the results."""
    parser = make_parser()
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    try:
        facts = compare(options)
        command = f"python examples/cifar10.py --data parquet:PATH --seed {options.seed} --threads {options.threads}"
        options.out.mkdir(parents=True, exist_ok=True)
        write_results(options.out, "cifar10", command, facts, claims(facts), markdown(facts))
    except PNCError as error:
        parser.error(str(error))
    print(markdown(facts))
    print(f"\nwrote {options.out / 'cifar10.json'} and {options.out / 'cifar10.md'}")


def make_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="parquet:PATH or hf:NAME")
    parser.add_argument("--data-name", default="CIFAR-10 (JPEG)", help="name of the data in the results")
    parser.add_argument("--target", type=Path, help="trained target, .safetensors; by default it is trained here")
    parser.add_argument("--source", type=Path, help="trained source, likewise")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for cifar10.json and cifar10.md")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder where trained networks are kept")
    parser.add_argument("--seed", type=int, default=0, help="seed of the support and the clone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads for torch")
    return parser


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run the clone and its rivals; return the facts of `main_job.run`, with data, networks and support."""
    train, test = load_data(options.data, "train"), load_data(options.data, "test")
    half = len(train.classes) // 2
    halves = {"target": train.classes[:half], "source": train.classes[half:]}
    files = {role: getattr(options, role) or trained(role, train, test, halves[role], options.runs) for role in halves}
    start = time.perf_counter()
    target, source = (load_model(str(files[role])) for role in ("target", "source"))
    load_seconds = time.perf_counter() - start
    base, new = target.classes, [name for name in source.classes if name not in target.classes]
    job = main_job.Job(
        source=source,
        target=target,
        support=draw_support(train, new, base, N_NEW, N_BASE, torch.Generator().manual_seed(options.seed)),
        test=relabel(class_subset(test, [*base, *new]), [*base, *new]),
        flip=True,
        seed=options.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        facts = main_job.run(job, list(main_job.RIVALS), Path(folder), progress=report)
    return {
        "data": f"{options.data_name}, {len(job.test):,} test images",
        "networks": {role: own_accuracy(model, test) for role, model in (("target", target), ("source", source))},
        "support": f"{N_NEW}/{N_BASE} images per new/base class, with mirror images, seed {options.seed}",
        "load_seconds": load_seconds,
        **facts,
    }


def trained(role: str, train: ImageSet, test: ImageSet, classes: Sequence[str], runs: Path) -> Path:
    """Train a network on some classes, unless its file exists; return the file."""
    runs.mkdir(parents=True, exist_ok=True)
    out = runs / f"cifar10_{role}.safetensors"
    pretrain(
        SPEC,
        class_subset(train, classes),
        class_subset(test, classes),
        RECIPE,
        out,
        progress=lambda epoch: report(f"{role}: accuracy {epoch.test_accuracy:.3f}, epoch", epoch.epoch, epoch.epochs),
    )
    return out


def own_accuracy(model: LoadedModel, test: ImageSet) -> float:
    """Accuracy of a network on test images of its own classes, among these classes."""
    own = class_subset(test, model.classes)
    return float((logits_of(model.module, own.images).argmax(1) == own.labels).double().mean())


def report(what: str, done: int, total: int) -> None:
    """Show progress on standard error."""
    print(f"{what} {done}/{total}", file=sys.stderr)


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


if __name__ == "__main__":
    main()
