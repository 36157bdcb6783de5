"""The worked example on real photographs: a ResNet-20 that knows five CIFAR-10 classes gets the other five.

    python examples/cifar10.py --data parquet:PATH --out results

PATH is a folder with train.parquet and test.parquet in the image layout of Hugging Face `datasets`; `hf:cifar10` works
where the hub can be reached. The networks are trained once (about eight minutes each on one core that has bfloat16)
and kept in `--runs`; a stopped run goes on where it was.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from pnc.bench import main_job
from pnc.bench.results import Claim, at_least, at_most, table, write_results
from pnc.data import ImageSet, class_subset, draw_support, relabel
from pnc.models import LoadedModel
from pnc.pretraining import Recipe, pretrain
from pnc.readers import load_data

N_NEW, N_BASE = 100, 20
COLUMNS = ("method", "base_accuracy", "new_accuracy", "average_accuracy", "conditional_kl", "leak", "seconds", "bytes")


def main() -> None:
    """Train or load both networks, compare, write the results."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    train, test = load_data(options.data, "train"), load_data(options.data, "test")
    half = len(train.classes) // 2
    base, new = train.classes[:half], train.classes[half:]
    target = network(train, test, base, options.runs / "cifar10_target.safetensors")
    source = network(train, test, new, options.runs / "cifar10_source.safetensors")
    job = main_job.Job(
        source=source,
        target=target,
        support=draw_support(train, new, base, N_NEW, N_BASE, torch.Generator().manual_seed(options.seed)),
        test=relabel(test, (*base, *new)),
        flip=True,
        seed=options.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        facts = main_job.run(job, list(main_job.RIVALS), Path(folder))
    facts["networks"] = {"target": target.facts["test_accuracy"], "source": source.facts["test_accuracy"]}
    facts["support"] = f"{N_NEW}/{N_BASE}, with mirror images, seed {options.seed}"
    command = f"python examples/cifar10.py --data parquet:PATH --seed {options.seed} --threads {options.threads}"
    write_results(options.out, "cifar10", command, facts, claims(facts), markdown(facts))
    print(f"wrote {options.out / 'cifar10.json'} and {options.out / 'cifar10.md'}")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="parquet:PATH or hf:NAME")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for cifar10.json and cifar10.md")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder where the networks are kept")
    parser.add_argument("--seed", type=int, default=0, help="of the support and the clone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for torch")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def network(train: ImageSet, test: ImageSet, classes: tuple[str, ...], out: Path) -> LoadedModel:
    """A ResNet-20 on some classes: ten epochs, one cycle; loaded if it is there."""
    return pretrain(
        "zoo:resnet20",
        class_subset(train, classes),
        class_subset(test, classes),
        Recipe(precision="bfloat16"),
        out,
        progress=lambda report: print(f"{out.name}: {report}", file=sys.stderr),
    )


def claims(facts: dict) -> list[Claim]:
    """What was asked for, beside what was measured."""
    rows = {row["method"]: row for row in facts["rows"]}
    clone, ensemble = rows["clone"], rows["direct ensemble"]
    found = [
        at_least("average accuracy of the clone, closed form alone", 0.74, clone["average_accuracy"]),
        at_least(
            "average accuracy above the direct ensemble's", 0, clone["average_accuracy"] - ensemble["average_accuracy"]
        ),
        at_most("conditional KL", 1e-6, clone["conditional_kl"]),
        at_most("seconds of the whole clone job", 40, clone["seconds"]),
        at_least("accuracy of the target on its own classes", 0.88, facts["networks"]["target"]),
        at_least("accuracy of the source on its own classes", 0.93, facts["networks"]["source"]),
    ]
    return found + [Claim(name.replace("_", " "), "true", value, value) for name, value in facts["verified"].items()]


def markdown(facts: dict) -> str:
    """The rows as a table, with what they stand on."""
    rows = [[row[column] for column in COLUMNS] for row in facts["rows"]]
    made, networks = facts["clone"], facts["networks"]
    return "\n".join(
        [
            f"CIFAR-10 (JPEG): ResNet-20 target on the first five classes ({networks['target']:.3f} on its own), "
            f"ResNet-20 source on the others ({networks['source']:.3f}); support {facts['support']}; "
            "10,000 test images.",
            "",
            table(COLUMNS, rows),
            "",
            f"The clone leaves the target at `{made['position']['target_cut']}`, enters the source at "
            f"`{made['position']['source_cut']}`, adds {made['added_macs_share']:.0%} of the source's MACs, and is a "
            f"file of {made['file_bytes']:,} bytes.",
        ]
    )


if __name__ == "__main__":
    main()
