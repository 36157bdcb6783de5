"""The demonstration: a target learns digits 5-9 from another network, on data that comes with scikit-learn."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pnc.bench import main_job
from pnc.clones.clone_file import load
from pnc.composite.composite import attach
from pnc.data.image_set import class_subset, relabel
from pnc.data.readers import load_data
from pnc.data.support import draw_support
from pnc.method.task import Progress
from pnc.models.pretraining import EpochReport, Recipe, pretrain
from pnc.report.page import check_report, write_report

BASE_CLASSES = tuple("01234")
NEW_CLASSES = tuple("56789")
N_NEW, N_BASE = 20, 5
SPEC = "zoo:cnn?width=0.5"
RECIPE = Recipe(epochs=60, batch_size=64, weight_decay=1e-2, crop_padding=1, flip=False)


def run_demo(
    seed: int = 0,
    recipe: Recipe = RECIPE,
    progress: Progress | None = None,
    trained: Callable[[str, EpochReport], None] | None = None,
    report: Path | None = None,
) -> dict[str, Any]:
    """Train a target on digits 0-4 and a source on 5-9, clone all five new classes, and compare.

    Args:
        seed: Of the networks, the support and the clone.
        recipe: How both networks are trained; its seed is ignored.
        progress: Called with what is being done, the steps done, and the steps in all.
        trained: Called after each epoch with "target" or "source".
        report: Where to write a report on the clone, a page of HTML; None for none. It needs the extra `report`.
    Returns:
        As `pnc.bench.main_job.run`.
    """
    if report is not None:
        check_report()
    train, test = load_data("digits", "train"), load_data("digits", "test")
    recipe = replace(recipe, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        networks = {}
        for role, classes in (("target", BASE_CLASSES), ("source", NEW_CLASSES)):
            networks[role] = pretrain(
                SPEC,
                class_subset(train, classes),
                class_subset(test, classes),
                recipe,
                Path(folder) / f"{role}.safetensors",
                progress=None if trained is None else lambda report, role=role: trained(role, report),  # type: ignore[misc]
            )
        generator = torch.Generator().manual_seed(seed)
        job = main_job.Job(
            source=networks["source"],
            target=networks["target"],
            support=draw_support(train, NEW_CLASSES, BASE_CLASSES, N_NEW, N_BASE, generator),
            test=relabel(test, (*BASE_CLASSES, *NEW_CLASSES)),
            effort="minutes",
            seed=seed,
        )
        facts = main_job.run(job, list(main_job.RIVALS), Path(folder), progress)
        if report is not None:
            file = Path(folder) / "clone.safetensors"
            net = attach(networks["target"].module, load(file, source=networks["source"].module))
            write_report(net, job.test, report, files=[file])
        return facts
