"""Ways to choose channels compared: every method at several densities, relative to the clone at full density."""

import time
from collections.abc import Sequence
from functools import lru_cache, partial
from statistics import fmean
from typing import Any, get_args

import torch
from torch import Tensor

from pnc.bench.bench import Bench, Row, Rows, one_by_one
from pnc.bench.result_files import Claim, over_seeds, table
from pnc.bench.setting import Setting
from pnc.clones.clone import Clone
from pnc.composite.batched_logits import logits_of
from pnc.composite.composite import attach
from pnc.composite.metrics import measure_logits
from pnc.data.image_set import ImageSet, class_subset, images_as_float
from pnc.foundation.network_state import evaluating
from pnc.graph.cut_points import LOGITS, extract
from pnc.method.adapter_fitting import CrossFitted
from pnc.method.pipeline import fit
from pnc.method.positions import scan
from pnc.method.settings import Method
from pnc.method.task import CloneTask, prepare_task

DENSITIES = (0.5, 0.3)
FULL = "full"
METHODS: tuple[str, ...] = get_args(Method)
KEYS = ("classes", "seed", "method", "density")
COLUMNS = ("relative", "average_accuracy", "cloned", "not_cloned", "part_macs_share", "seconds")
"""Averages shown: accuracy as a share of that at full density; accuracy; that of the masked source alone, with its own
head, on classes that were cloned and on its others; MACs of the part as a share of those at full density; time."""


def bench(setting: Setting, groups: Sequence[Sequence[str]], seeds: Sequence[int]) -> Bench:
    """Make clones of each group of classes by each method at each density, and measure them on all test images.

    All methods use the position that the scan chooses. `seconds` is the time after the scan.
    """
    settings = {**setting.facts, "n_test": setting.n_test}
    by_name = {"+".join(group): group for group in groups}
    wanted = [
        dict(zip(KEYS, (name, seed, method, density), strict=True))
        for seed in seeds
        for name in by_name
        for method, density in [(FULL, 1.0), *((m, d) for d in DENSITIES for m in METHODS)]
    ]
    case = lru_cache(maxsize=1)(lambda name, seed: _Case(setting, by_name[name], seed))
    measure = one_by_one(wanted, lambda cell: case(cell["classes"], cell["seed"]).row(cell["method"], cell["density"]))
    with_shares = lambda cells, progress: _with_shares(measure(cells, progress))  # noqa: E731
    return Bench("localize", KEYS, settings, with_shares, claims, partial(markdown, setting=setting))


def _with_shares(rows: Rows) -> Rows:
    """The same rows with `relative` and `part_macs_share`, which compare them with full density."""
    full = {(row["classes"], row["seed"]): row for row in rows if row["method"] == FULL}

    def shares(row: Row, whole: Row) -> Row:
        relative = row["average_accuracy"] / whole["average_accuracy"]
        return {"relative": relative, "part_macs_share": row["part_macs"] / max(1, whole["part_macs"])}

    return [{**row, **shares(row, full[row["classes"], row["seed"]])} for row in rows]


class _Case:
    """One group of classes and one support: the scan's position, and measurements there."""

    def __init__(self, setting: Setting, group: Sequence[str], seed: int) -> None:
        source, target = setting.source, setting.target
        self._task = prepare_task(
            source.module, target.module, setting.draw(group, seed), **setting.arguments(group, seed)
        )
        found = scan(self._task)
        self._fitted: CrossFitted = found.adapter(found.choose())
        self._test = setting.test_images(group)
        self._target_logits = logits_of(target.module, self._test.images)
        self._own_test = class_subset(setting.test, source.classes)

    def row(self, method: str, density: float) -> dict[str, Any]:
        """Make one clone and measure it."""
        start = time.perf_counter()
        tune = "norms" if method == "gates" else "none"
        chosen: Any = {} if method == FULL else {"density": density, "method": method, "tune": tune}
        clone = fit(self._task, self._fitted, **chosen)
        seconds = time.perf_counter() - start
        logits = logits_of(attach(self._task.target.model, clone), self._test.images)
        facts = measure_logits(logits, self._test.labels, self._target_logits)
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
    """Accuracy of the source with its own part replaced by the clone's, over all of the source's classes.

    Args:
        task: Has the source.
        clone: A clone of it.
        images: With the source's classes, in order.
    Returns:
        `cloned`, on images of classes that were cloned, and `not_cloned`, on the others; None without such images.
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


def claims(rows: Rows) -> list[Claim]:
    """Required figures, with what was measured: means over seeds, with half their range."""
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


def _values(rows: Rows, group: str, method: str, density: float, key: str) -> list[Any]:
    chosen = (group, method, density)
    return [row[key] for row in rows if (row["classes"], row["method"], row["density"]) == chosen]


def markdown(rows: Rows, setting: Setting) -> str:
    """A table for each group of classes, means over seeds."""
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        f"{setting.words}; means over {len(seeds)} seeds. relative: average accuracy as a share of the clone's at full "
        "density. cloned, not cloned: accuracy of the source alone, with its part replaced by the smaller one, on its "
        "classes that were cloned and on its others. part MACs: as a share of the part's at full density.",
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
