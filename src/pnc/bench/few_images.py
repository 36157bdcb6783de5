"""What a clone of very few images is worth beside ensembles of both whole networks, over many supports."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch

from pnc.bench.position_strategies import Setting
from pnc.bench.result_files import Cells, Claim, at_least, table
from pnc.bench.rivals import ensemble, tempered
from pnc.bench.rivals.rival import Budget
from pnc.composite.composite import attach
from pnc.composite.metrics import evaluate
from pnc.composite.prediction import predict
from pnc.data.image_set import class_subset, relabel
from pnc.data.support import draw_support
from pnc.method.pipeline import fit
from pnc.method.positions import scan
from pnc.method.task import Progress, prepare_task

KEYS = ("data", "n_images", "seed")
N_IMAGES = (1, 2, 5)
"""Images per class, of new and of base ones alike."""
METHODS = ("clone", "direct ensemble", "calibrated ensemble")
ALLOWED = 0.01
"""Accuracy by which the mean of the clones may lie below the calibrated ensemble's."""


def run(
    settings: Mapping[str, Setting], seeds: Sequence[int], cells: Cells, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Make clones and ensembles from the same few images, and measure them on all test images.

    Args:
        settings: Networks and images by the name of the images; numbers of images are not theirs.
        seeds: Of the supports.
        cells: Rows that are there already are not made again.
        progress: Called with what is being done, the rows done, and the rows in all.
    Returns:
        A row for each data set, number of images and seed; accuracies by method.
    """
    wanted = [(data, n_images, seed) for seed in seeds for data in settings for n_images in N_IMAGES]
    for done, (data, n_images, seed) in enumerate(wanted):
        if progress is not None:
            progress(f"{data}: {n_images} images per class, seed {seed}", done, len(wanted))
        cell = {"data": data, "n_images": n_images, "seed": seed}
        if cell not in cells:
            cells.add({**cell, **_row(settings[data], n_images, seed)})
    made = {tuple(row[key] for key in KEYS): row for row in cells.rows}
    return [made[cell] for cell in wanted]


def _row(setting: Setting, n_images: int, seed: int) -> dict[str, Any]:
    source, target = setting.source, setting.target
    new = [name for name in source.classes if name not in target.classes]
    generator = torch.Generator().manual_seed(seed)
    task = prepare_task(
        source.module,
        target.module,
        draw_support(setting.train, new, target.classes, n_images, n_images, generator),
        classes=new,
        source_classes=source.classes,
        base_classes=target.classes,
        flip=setting.flip,
        seed=seed,
    )
    found = scan(task)
    made = fit(task, found.adapter(found.choose()))
    networks = {
        METHODS[0]: attach(target.module, made),
        METHODS[1]: ensemble.fit(task, Budget()).module,
        METHODS[2]: tempered.fit(task, Budget()).module,
    }
    names = [*target.classes, *new]
    test = relabel(class_subset(setting.test, names), names)
    base_logits = predict(target.module, test.images)
    facts = {
        name: asdict(evaluate(predict(net, test.images), test.labels, base_logits)) for name, net in networks.items()
    }
    keys = ("base_accuracy", "new_accuracy", "average_accuracy")
    accuracies = {name: {key: one[key] for key in keys} for name, one in facts.items()}
    cuts = {"target_cut": made.target_cut.name, "source_cut": made.source_cut.name}
    return {"n_test": len(test), "accuracies": accuracies, **cuts, "held_out": made.held_out.is_held_out}


def means(rows: Sequence[Mapping[str, Any]], data: str, n_images: int) -> dict[str, float]:
    """Average accuracy over the seeds, by method."""
    chosen = [row["accuracies"] for row in rows if (row["data"], row["n_images"]) == (data, n_images)]
    return {name: fmean(one[name]["average_accuracy"] for one in chosen) for name in METHODS}


def claims(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """What was asked for: never more than a point below either ensemble, in the mean over supports."""
    found = []
    for data, n_images in dict.fromkeys((row["data"], row["n_images"]) for row in rows):
        mean = means(rows, data, n_images)
        for rival in METHODS[1:]:
            above = mean[METHODS[0]] - mean[rival]
            found.append(at_least(f"{data}, {n_images}/{n_images}: clone above the {rival}", -ALLOWED, above))
    return found


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
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
