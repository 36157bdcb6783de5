"""Parts beside whole sources: what a clone loses and saves at each density and tuning, and by its own choice."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, cast, get_args

import torch

from pnc.bench.bench import Bench, Row, Rows, one_by_one
from pnc.bench.channel_methods import masked_source_accuracy
from pnc.bench.result_files import Cells, Claim, over_seeds, table
from pnc.bench.setting import Setting
from pnc.clones.clone import Clone
from pnc.clones.clone_file import save
from pnc.composite.batched_logits import logits_of
from pnc.composite.composite import attach
from pnc.composite.metrics import measure_logits
from pnc.data.image_set import class_subset, relabel
from pnc.foundation.errors import InputError
from pnc.foundation.network_state import differences, take_snapshot
from pnc.method.density_choice import TOLERANCES
from pnc.method.pipeline import clone, fit
from pnc.method.positions import scan
from pnc.method.settings import Tune
from pnc.method.task import Progress, prepare_task

KEYS = ("pair", "classes", "support", "form", "seed")
WHOLE, DEFAULT, SECONDS, SMALL = "whole", "default", "seconds", "small"
"""Forms beside those that name density and tuning, such as "0.5 weights": the whole source behind the position that the
scan chooses, `pnc.clone` as it is, in closed form, and where it may lose two points."""
_OF_CLONE: Mapping[str, Mapping[str, Any]] = {DEFAULT: {}, SECONDS: {"effort": "seconds"}, SMALL: {"prefer": "small"}}
FEW = 2
"""Classes up to which a clone is of few."""
UNLIKE = " from "
"""In the names of pairs of different architectures: target from source."""
RESNETS = "CIFAR-10 (JPEG), ResNet-20s"
"""The pair for which bounds on the size of files were asked for."""
COLUMNS = ("base", "new", "average", "score", "macs_share", "density", "bytes", "seconds", "not_cloned")


def bench(pair: str, setting: Setting, classes: Sequence[str], forms: Sequence[str], seeds: Sequence[int]) -> Bench:
    """Measure every form for each seed on all test images.

    Args:
        pair: Name of the two networks in the rows.
        setting: Networks, images, sizes of the support.
        classes: The classes that are cloned.
        forms: From `parse_forms`.
        seeds: Of supports and clones.
    """
    cases: dict[int, _Case] = {}
    fields = {"pair": pair, "classes": "+".join(classes), "support": setting.support}
    wanted = [{**fields, "form": form, "seed": seed} for seed in seeds for form in forms]

    def make(cell: Row) -> Row:
        seed = cell["seed"]
        if seed not in cases:
            cases.clear()
            cases[seed] = _Case(setting, classes, seed)
        return cases[seed].row(cell["form"])

    def measure(cells: Cells, progress: Progress | None) -> Rows:
        one_by_one(wanted, make)(cells, progress)
        return cells.rows  # of all pairs that were measured so far

    return Bench("part", KEYS, {}, measure, claims, markdown)


class _Case:
    """One support: its scan, and the clones that are measured."""

    def __init__(self, setting: Setting, classes: Sequence[str], seed: int) -> None:
        self._setting, self._classes, self._seed = setting, classes, seed
        self._support, self._test = setting.draw(classes, seed), setting.test_images(classes)
        shown = [name for name in setting.source.classes if name in setting.test.classes]
        self._own_test = relabel(class_subset(setting.test, shown), setting.source.classes)
        self._target_logits = logits_of(setting.target.module, self._test.images)
        source, target = setting.source.module, setting.target.module
        self._task = prepare_task(source, target, self._support, **setting.arguments(classes, seed))
        self._found = scan(self._task)

    def row(self, form: str) -> Row:
        """Make one clone, measure it, and check what is promised."""
        target = self._setting.target.module
        before, start = take_snapshot(target), time.perf_counter()
        made = self._clone(form)
        seconds = time.perf_counter() - start
        net = attach(target, made)
        logits = logits_of(net, self._test.images)
        facts = measure_logits(logits, self._test.labels, self._target_logits)
        net.detach(made.name)
        some = self._test.images[:100]
        with TemporaryDirectory() as folder:
            n_bytes = save(made, Path(folder) / "clone")
        return {
            "base": facts.base_accuracy,
            "new": facts.new_accuracy,
            "average": facts.average_accuracy,
            "score": made.recipe["score"],
            "macs_share": made.recipe["macs_share"],
            "density": made.recipe["density"],
            "tune": made.recipe.get("tune"),
            "bytes": n_bytes,
            "seconds": seconds,
            "not_cloned": masked_source_accuracy(self._task, made, self._own_test)["not_cloned"],
            "position": f"{made.target_cut.name} > {made.source_cut.name}",
            "base_logits_equal": torch.equal(logits[:, : self._target_logits.shape[1]], self._target_logits),
            "removed_equal": torch.equal(logits_of(net, some), self._target_logits[: len(some)]),
            "target_unchanged": not differences(target, before),
        }

    def _clone(self, form: str) -> Clone:
        if form in _OF_CLONE:
            source, target = self._setting.source.module, self._setting.target.module
            arguments = self._setting.arguments(self._classes, self._seed)
            return clone(source, target, self._support, **arguments, **_OF_CLONE[form])
        fitted = self._found.adapter(self._found.choose())
        if form == WHOLE:
            return fit(self._task, fitted)
        density, tune = form.split()
        return fit(self._task, fitted, density=float(density), tune=cast(Tune, tune))


def claims(rows: Rows) -> list[Claim]:
    """What was asked for, beside what was measured, of the cells that there are."""
    found = []
    for pair, classes, support in dict.fromkeys((row["pair"], row["classes"], row["support"]) for row in rows):
        here = [row for row in rows if (row["pair"], row["classes"], row["support"]) == (pair, classes, support)]
        whole = {row["seed"]: row for row in here if row["form"] == WHOLE}
        few = classes.count("+") < FEW
        name = f"{pair}, {support}" + (f", {classes}" if few else "")
        for form in dict.fromkeys(row["form"] for row in here):
            pairs = [(row, whole[row["seed"]]) for row in here if row["form"] == form and row["seed"] in whole]
            if form == WHOLE or not pairs:
                continue
            lost = [b["average"] - a["average"] for a, b in pairs]
            dearest = max(a["macs_share"] for a, _ in pairs)
            bound = TOLERANCES["small"] if form == SMALL else allowed_loss(pair, support, few, dearest)
            found.append(over_seeds(f"{name}: {form} loses against the whole source", "<=", bound, lost))
            off = [(a["score"] - a["average"]) - (b["score"] - b["average"]) for a, b in pairs]
            far = abs(fmean(off))
            found.append(
                over_seeds(
                    f"{name}: {form}, how much further the held-out score is from test accuracy", "<=", 0.01, [far]
                )
            )
            others = [a["not_cloned"] for a, _ in pairs if a["not_cloned"] is not None]
            if others and form != SECONDS:
                words = f"{name}: {form}, accuracy of the masked source on classes not cloned"
                found.append(over_seeds(words, "<=", 0.1, others))
    for form, bound in (("0.5 weights", 180_000), ("0.5 low-rank", 60_000)):
        sizes = [row["bytes"] for row in rows if row["form"] == form and row["pair"] == RESNETS]
        if sizes:
            found.append(over_seeds(f"{RESNETS}: bytes of the file, {form}", "<=", bound, [float(max(sizes))]))
    promises = ("base_logits_equal", "removed_equal", "target_unchanged")
    broken = sum(not row[promise] for row in rows for promise in promises)
    found.append(over_seeds("cells in which a promise about the target is broken", "<=", 0, [float(broken)]))
    for form, bound in ((DEFAULT, 90.0), (SECONDS, 12.0)):
        times = [row["seconds"] for row in rows if row["form"] == form and row["pair"].startswith("CIFAR-10")]
        if times:
            found.append(over_seeds(f"CIFAR-10: seconds of the job, {form}", "<=", bound, times))
    return found


def parse_forms(text: str) -> list[str]:
    """Read the forms that are to be made, separated by commas.

    Raises:
        InputError: one of them is none.
    """
    forms = [form.strip() for form in text.split(",")]
    for form in forms:
        density, _, tune = form.partition(" ")
        is_part = tune in get_args(Tune) and density.replace(".", "", 1).isdecimal() and 0 < float(density) <= 1
        if form not in (WHOLE, *_OF_CLONE) and not is_part:
            names = ", ".join((WHOLE, *_OF_CLONE))
            raise InputError(f"forms: expected {names}, or such as '0.5 weights'; got {form!r}")
    return forms


def allowed_loss(pair: str, support: str, few: bool, macs_share: float) -> float:
    """Accuracy that a clone of so many MACs, of few classes or many, may lose against the whole source."""
    if macs_share <= 0.17:
        return 0.025
    if macs_share <= 0.32:
        return 0.005 if few else 0.01
    if pair.startswith("CIFAR-100"):
        return 0.007
    return 0.003 if support == "100/20" and UNLIKE not in pair else 0.01


def markdown(rows: Rows) -> str:
    """A table for each pair, classes and support, means over seeds."""
    lines = [
        "Means over seeds. average: accuracy over base and new classes, on all test images. score: what the clone's "
        "recipe promises. MACs: added, as a share of the source's. bytes: of the thin file. seconds: from two loaded "
        "networks on for `default`, `seconds` and `small` (as `pnc.clone` is called), from the scan's result on for "
        "the others. not cloned: accuracy of the source alone, with the part in place of its own, on its classes that "
        "were not cloned.",
    ]
    header = ("form", "seeds", *(column.replace("_", " ") for column in COLUMNS))
    for pair, classes, support in dict.fromkeys((row["pair"], row["classes"], row["support"]) for row in rows):
        here = [row for row in rows if (row["pair"], row["classes"], row["support"]) == (pair, classes, support)]
        shown = []
        for form in dict.fromkeys(row["form"] for row in here):
            chosen = [row for row in here if row["form"] == form]
            values = ([row[column] for row in chosen] for column in COLUMNS)
            shown.append([form, len(chosen), *("-" if None in v else fmean(v) for v in values)])
        lines += ["", f"{pair}, support {support}, cloned: {classes}", "", table(header, shown)]
    return "\n".join(lines)
