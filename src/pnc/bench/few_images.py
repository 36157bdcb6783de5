"""Clones of very few images compared with ensembles of both whole networks, over many supports."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

from pnc.bench.bench import Bench, Row, Rows, one_by_one
from pnc.bench.result_files import Claim, at_least, table
from pnc.bench.rivals import ensemble, tempered
from pnc.bench.rivals.rival import Budget
from pnc.bench.setting import Setting
from pnc.composite.batched_logits import logits_of
from pnc.composite.composite import attach
from pnc.composite.metrics import measure_logits
from pnc.method.pipeline import fit
from pnc.method.positions import scan
from pnc.method.task import prepare_task

KEYS = ("data", "n_images", "seed")
N_IMAGES = (1, 2, 5)
"""Images per class, for new and base classes alike."""
METHODS = ("clone", "direct ensemble", "calibrated ensemble")
ALLOWED = 0.01
"""Accuracy by which the mean of the clones may be below that of an ensemble."""


def bench(settings: Mapping[str, Setting], seeds: Sequence[int], facts: Mapping[str, Any]) -> Bench:
    """Make clones and ensembles from the same few images, and measure them on all test images.

    Args:
        settings: Networks and images by name of the images; their numbers of images are ignored.
        seeds: Of the supports.
        facts: What rows depend on, as JSON values.
    """
    wanted = [
        {"data": data, "n_images": n_images, "seed": seed}
        for seed in seeds
        for data in settings
        for n_images in N_IMAGES
    ]
    measure = one_by_one(wanted, lambda cell: _row(settings[cell["data"]], cell["n_images"], cell["seed"]))
    return Bench("few", KEYS, facts, measure, claims, markdown)


def _row(setting: Setting, n_images: int, seed: int) -> Row:
    source, target, new = setting.source, setting.target, setting.new_classes
    support = replace(setting, n_new=n_images, n_base=n_images).draw(new, seed)
    task = prepare_task(source.module, target.module, support, **setting.arguments(new, seed))
    found = scan(task)
    made = fit(task, found.adapter(found.choose()))
    networks = {
        METHODS[0]: attach(target.module, made),
        METHODS[1]: ensemble.fit(task, Budget()).module,
        METHODS[2]: tempered.fit(task, Budget()).module,
    }
    test = setting.test_images(new)
    base_logits = logits_of(target.module, test.images)
    accuracies = {}
    for name, net in networks.items():
        facts = asdict(measure_logits(logits_of(net, test.images), test.labels, base_logits))
        accuracies[name] = {key: facts[key] for key in ("base_accuracy", "new_accuracy", "average_accuracy")}
    cuts = {"target_cut": made.target_cut.name, "source_cut": made.source_cut.name}
    return {"n_test": len(test), "accuracies": accuracies, **cuts, "held_out": made.held_out.is_held_out}


def means(rows: Rows, data: str, n_images: int) -> dict[str, float]:
    """Average accuracy over the seeds, by method."""
    chosen = [row["accuracies"] for row in rows if (row["data"], row["n_images"]) == (data, n_images)]
    return {name: fmean(one[name]["average_accuracy"] for one in chosen) for name in METHODS}


def claims(rows: Rows) -> list[Claim]:
    """Required: never more than a point below either ensemble, in the mean over supports."""
    found = []
    for data, n_images in dict.fromkeys((row["data"], row["n_images"]) for row in rows):
        mean = means(rows, data, n_images)
        for rival in METHODS[1:]:
            above = mean[METHODS[0]] - mean[rival]
            found.append(at_least(f"{data}, {n_images}/{n_images}: clone above the {rival}", -ALLOWED, above))
    return found


def markdown(rows: Rows) -> str:
    """The means over seeds as a table, the worst seed, and every row."""
    cells = dict.fromkeys((row["data"], row["n_images"]) for row in rows)
    lines, every = [], []
    for data, n_images in cells:
        of_cell = [row["accuracies"] for row in rows if (row["data"], row["n_images"]) == (data, n_images)]
        worst = [min(one[name]["average_accuracy"] for one in of_cell) for name in METHODS]
        lines.append([data, f"{n_images}/{n_images}", *means(rows, data, n_images).values(), *worst])
    for row in rows:
        own = [row["accuracies"][name]["average_accuracy"] for name in METHODS]
        every.append([*(row[key] for key in KEYS), *own, row["target_cut"], row["source_cut"]])
    return "\n".join(
        [
            f"Average accuracy of old and new classes; {len({row['seed'] for row in rows})} supports each; images per "
            "new/base class:",
            "",
            table(("data", "support", *METHODS, *(f"worst {name}" for name in METHODS)), lines),
            "",
            "Every row:",
            "",
            table((*KEYS, *METHODS, "target cut", "source cut"), every),
        ]
    )
