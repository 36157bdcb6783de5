"""Ways to choose channels, side by side: every method at several densities, against the clone at full density."""

import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, get_args

import torch
from torch import Tensor

from pnc.bench.position_strategies import Setting
from pnc.bench.result_files import Cells, Claim, over_seeds, table
from pnc.clones.clone import Clone
from pnc.composite.composite import attach
from pnc.composite.metrics import evaluate
from pnc.composite.prediction import predict
from pnc.data.image_set import ImageSet, class_subset, images_as_float, relabel
from pnc.data.support import draw_support
from pnc.foundation.network_state import evaluating
from pnc.graph.cut_points import LOGITS, extract
from pnc.method.adapter_fitting import CrossFitted
from pnc.method.localization.localizer import Method
from pnc.method.pipeline import fit
from pnc.method.positions import scan
from pnc.method.task import CloneTask, Progress, prepare_task

DENSITIES = (0.5, 0.3)
FULL = "full"
METHODS: tuple[str, ...] = get_args(Method)
KEYS = ("classes", "seed", "method", "density")
COLUMNS = ("relative", "average_accuracy", "cloned", "not_cloned", "part_macs_share", "seconds")
"""Averages shown: accuracy as a share of that at full density, accuracy; of the masked source alone, with its own head,
on classes that were cloned and on its others; MACs of the part as a share of those at full density; time."""


def run(
    setting: Setting,
    groups: Sequence[Sequence[str]],
    seeds: Sequence[int],
    cells: Cells,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Make clones of each group of classes by each method at each density, and measure them on all test images.

    The position is the scan's choice and the same for all methods.

    Args:
        setting: Networks and images.
        groups: Which of the source's classes are cloned.
        seeds: Of the support and of the clone.
        cells: Rows that are there already are not made again; keys: `KEYS`.
        progress: Called with what is being done, the rows done, and the rows in all.
    Returns:
        The rows, with `relative` and `part_macs_share` added. `seconds` is the time from the scan's result on.
    """
    wanted = [
        ("+".join(group), seed, method, density)
        for seed in seeds
        for group in groups
        for method, density in [(FULL, 1.0), *((m, d) for d in DENSITIES for m in METHODS)]
    ]
    by_name = {"+".join(group): group for group in groups}
    case: _Case | None = None
    for done, (name, seed, method, density) in enumerate(wanted):
        cell = dict(zip(KEYS, wanted[done], strict=True))
        if progress is not None:
            progress(f"{name}, seed {seed}: {method} {density:g}", done, len(wanted))
        if cell not in cells:
            if case is None or case.key != (name, seed):
                case = _Case(setting, by_name[name], seed)
            cells.add({**cell, **case.row(method, density)})
    made = {tuple(row[key] for key in KEYS): row for row in cells.rows}
    rows = [made[cell] for cell in wanted]
    full = {(row["classes"], row["seed"]): row for row in rows if row["method"] == FULL}
    return [{**row, **_shares(row, full[row["classes"], row["seed"]])} for row in rows]


def _shares(row: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, float]:
    return {
        "relative": row["average_accuracy"] / full["average_accuracy"],
        "part_macs_share": row["part_macs"] / max(1, full["part_macs"]),
    }


class _Case:
    """One group of classes and one support: the scan's position, and what is measured there."""

    def __init__(self, setting: Setting, group: Sequence[str], seed: int) -> None:
        self.key = "+".join(group), seed
        source, target = setting.source, setting.target
        generator = torch.Generator().manual_seed(seed)
        support = draw_support(setting.train, group, target.classes, setting.n_new, setting.n_base, generator)
        self._task = prepare_task(
            source.module,
            target.module,
            support,
            classes=group,
            source_classes=source.classes,
            base_classes=target.classes,
            flip=setting.flip,
            seed=seed,
        )
        found = scan(self._task)
        self._fitted: CrossFitted = found.adapter(found.choose())
        names = [*target.classes, *group]
        self._test = relabel(class_subset(setting.test, names), names)
        self._target_logits = predict(target.module, self._test.images)
        self._own_test = class_subset(setting.test, source.classes)

    def row(self, method: str, density: float) -> dict[str, Any]:
        """Make one clone and measure it."""
        start = time.perf_counter()
        tune = "norms" if method == "gates" else "none"
        chosen: Any = {} if method == FULL else {"density": density, "method": method, "tune": tune}
        clone = fit(self._task, self._fitted, **chosen)
        seconds = time.perf_counter() - start
        logits = predict(attach(self._task.target.model, clone), self._test.images)
        facts = evaluate(logits, self._test.labels, self._target_logits)
        n_macs = clone.recipe["macs_share"] * self._task.source.n_macs
        return {
            "average_accuracy": facts.average_accuracy,
            "base_accuracy": facts.base_accuracy,
            "new_accuracy": facts.new_accuracy,
            "held_out_score": clone.recipe["score"],
            **masked_source_accuracy(self._task, clone, self._own_test),
            "part_macs": round(n_macs) - self._fitted.adapter.n_macs,
            "macs_share": clone.recipe["macs_share"],
            "seconds": seconds,
            "target_cut": clone.target_cut.name,
            "source_cut": clone.source_cut.name,
        }


def masked_source_accuracy(task: CloneTask, clone: Clone, images: ImageSet) -> dict[str, float | None]:
    """Accuracy of the source with the clone's part in place of its own, over all of the source's classes.

    Args:
        task: Whose source.
        clone: A clone of it.
        images: With the source's classes, in order.
    Returns:
        `cloned`, on images of classes that were cloned, and `not_cloned`, on the others; None where there are none.
    """
    prefix = extract(task.source.recording, None, [clone.source_cut])
    classifier = extract(task.source.recording, task.source.head.features, [LOGITS])
    body = clone.branch.stitched.body
    with torch.no_grad(), evaluating(task.source.model):
        answers = [classifier(body(prefix(batch))).argmax(1) for batch in images_as_float(images.images).split(250)]
    right = torch.cat(answers) == images.labels
    is_cloned = torch.tensor([name in task.new_classes for name in images.classes])[images.labels]
    return {"cloned": _mean(right[is_cloned]), "not_cloned": _mean(right[~is_cloned])}


def _mean(right: Tensor) -> float | None:
    return float(right.double().mean()) if len(right) else None


def claims(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """What was asked for, beside what was measured: means over seeds, with half their range."""
    found = []
    groups = list(dict.fromkeys(row["classes"] for row in rows))
    for group in groups:
        for density, bound in ((0.5, 0.98), (0.3, 0.95)):
            kept = _values(rows, group, "gates", density, "relative")
            words = f"{group}: share of full accuracy that gates keep at density {density}"
            found.append(over_seeds(words, ">=", bound, kept))
        for rival in METHODS[1:]:
            for density in DENSITIES:
                ours, theirs = (
                    _values(rows, group, method, density, "average_accuracy") for method in ("gates", rival)
                )
                ahead = [a - b for a, b in zip(ours, theirs, strict=True)]
                words = f"{group}: accuracy of gates above {rival} at density {density}"
                found.append(over_seeds(words, ">=", 0.0, ahead))
        for density in DENSITIES:
            others = [v for v in _values(rows, group, "gates", density, "not_cloned") if v is not None]
            if others:
                words = f"{group}: accuracy of the masked source on classes not cloned, gates, density {density}"
                found.append(over_seeds(words, "<=", 0.1, others))
    return found


def _values(rows: Sequence[Mapping[str, Any]], group: str, method: str, density: float, key: str) -> list[Any]:
    chosen = (group, method, density)
    return [row[key] for row in rows if (row["classes"], row["method"], row["density"]) == chosen]


def markdown(rows: Sequence[Mapping[str, Any]], setting: Setting, data: str) -> str:
    """A table for each group of classes, means over seeds; `data` is the name of the images."""
    flips = ", with mirror images" if setting.flip else ""
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        f"{data}, support {setting.n_new} images per new and {setting.n_base} per base class{flips}; means over "
        f"{len(seeds)} seeds. relative: average accuracy as a share of the clone's at full density. cloned, not "
        "cloned: accuracy of the source alone, with the smaller part in place of its own, on its classes that were "
        "cloned and on its others. part MACs: as a share of the part's at full density.",
    ]
    header = ("method", "density", *(column.replace("_", " ") for column in COLUMNS))
    for group in dict.fromkeys(row["classes"] for row in rows):
        shown = []
        for density in (1.0, *DENSITIES):
            for method in (FULL,) if density == 1 else METHODS:
                values = (_values(rows, group, method, density, column) for column in COLUMNS)
                shown.append([method, density, *("-" if None in v else fmean(v) for v in values)])
        lines += ["", f"Cloned: {group}", "", table(header, shown)]
    return "\n".join(lines)
