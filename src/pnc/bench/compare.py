"""The comparison: clones and rivals on the same samples, cell by cell, so that a stopped run can continue.

A cell is one method on one support: data, pair of networks, images per class, classes to clone, seed. Its row holds
everything that it depends on and everything measured; `pnc.bench.compare_report` turns rows into tables, claims and
pictures.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pnc.bench.bench import Measure, Row, Rows
from pnc.bench.comparison_methods import METHODS, class_groups
from pnc.bench.main_job import new_bytes
from pnc.bench.result_files import Cells, commit, environment
from pnc.bench.rivals.rival import Budget, Fitted, Rival
from pnc.bench.setting import Setting
from pnc.clones.clone_file import save
from pnc.composite.composite import Composite
from pnc.composite.metrics import auroc, calibration_error, leak, measure_logits, shifted
from pnc.data.image_set import ImageSet, images_as_float
from pnc.foundation.errors import InputError
from pnc.foundation.fingerprints import fingerprint
from pnc.foundation.network_state import differences, evaluating, take_snapshot
from pnc.method.task import Progress, prepare_task
from pnc.models.model_specs import LoadedModel

KEYS = ("data", "target", "source", "support", "flip", "group", "classes", "n_test", "method", "seed")
"""Fields that name a cell."""

SHIFTS = tuple(step / 2 for step in range(-16, 17))
"""Added to the new logits, for the curve of leak against new accuracy."""

_REMOVAL_IMAGES = 512
"""A multiple of all batch sizes: in a smaller batch the same image may round differently."""


def measure(
    setting: Setting,
    group: str,
    budget: Budget,
    methods: Sequence[str],
    seeds: Sequence[int],
    again: Sequence[str] = (),
) -> Measure:
    """Measure every cell that is not there yet.

    Args:
        setting: Networks, images and sizes of the support.
        group: Which classes are cloned, as `class_groups` takes it.
        budget: Of the methods that train.
        methods: Names out of `METHODS`.
        seeds: Of the supports and of all methods.
        again: Methods whose cells are measured again, except those of the current commit, so that a stopped run can
            continue.
    Returns:
        A function that measures the cells; its progress includes the time left.
    """

    def run(cells: Cells, progress: Progress | None) -> Rows:
        names = {"target": network_name(setting.target), "source": network_name(setting.source)}
        wanted = [
            ({**_common(setting, names, group), "classes": ", ".join(classes), "method": method, "seed": seed}, classes)
            for seed in seeds
            for classes in class_groups(group, setting.new_classes, seed)
            for method in methods
        ]
        now = commit()
        made_now = [row for row in cells.rows if row["commit"] == now and not str(now).endswith("+")]
        kept = {_key(row) for row in cells.rows if row["method"] not in again} | {_key(row) for row in made_now}
        missing = [one for one in wanted if _key(one[0]) not in kept]
        runner = Runner(setting, budget)
        where = {"budget": dataclasses.asdict(budget), "environment": environment(), "commit": now}
        for done, (cell, classes) in enumerate(missing):
            if progress is not None:
                left = _time_left([later["method"] for later, _ in missing[done:]], cells.rows)
                progress(f"seed {cell['seed']}, {cell['classes']}: {cell['method']}{left}", done, len(missing))
            start = time.perf_counter()
            facts = runner.measure(METHODS[cell["method"]], classes, cell["seed"])
            cells.add({**cell, **facts, "cell_seconds": time.perf_counter() - start, **where})
        return [cells[cell] for cell, _ in wanted]

    return run


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in KEYS)


def network_name(model: LoadedModel) -> str:
    """The spec of a network and a digest of its weights."""
    return f"{model.spec} {fingerprint(model.module).weights[:8]}"


def _common(setting: Setting, names: Mapping[str, str], group: str) -> dict[str, Any]:
    sizes = {"support": setting.support, "flip": setting.flip, "group": group, "n_test": setting.n_test}
    return {"data": setting.data, **names, **sizes}


def _time_left(methods: Sequence[str], rows: Rows) -> str:
    """Estimate the time for the given cells from the existing ones."""
    known: dict[str, list[float]] = {}
    for row in rows:
        known.setdefault(row["method"], []).append(row["cell_seconds"])
    if not known:
        return ""
    means = {method: fmean(seconds) for method, seconds in known.items()}
    minutes = sum(means.get(method, fmean(means.values())) for method in methods) / 60
    return f", about {minutes:.0f} min left"


class Runner:
    """Runs methods in one setting; computes once what does not depend on the method."""

    def __init__(self, setting: Setting, budget: Budget) -> None:
        self._setting, self._budget = setting, budget
        self._before = take_snapshot(setting.target.module)
        self._tests: dict[tuple[str, ...], tuple[ImageSet, Tensor]] = {}

    def measure(self, rival: Rival, classes: Sequence[str], seed: int) -> dict[str, Any]:
        """Run one method and measure it; if it cannot use the support, the facts hold the reason."""
        setting = self._setting
        if rival.sees_everything:
            setting = dataclasses.replace(setting, n_new=None, n_base=None, flip=False)
        support = setting.draw(classes, seed)
        facts = {"kind": rival.kind, "space": {name: list(values) for name, values in rival.space.items()}}
        start, cpu_start = time.perf_counter(), time.process_time()
        try:
            task = prepare_task(
                setting.source.module, setting.target.module, support, **setting.arguments(classes, seed)
            )
            fitted = rival.fit(task, self._budget)
        except InputError as error:
            return {**facts, "not_applicable": str(error), "verified": {"target_unchanged": self._unchanged()}}
        times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
        return {**facts, **times, **self._figures(fitted, tuple(classes))}

    def _figures(self, fitted: Fitted, classes: tuple[str, ...]) -> dict[str, Any]:
        setting, module = self._setting, fitted.module
        test, target_logits = self._test(classes)
        logits, n_base = setting.logits(module, test.images), target_logits.shape[1]
        found = {
            **dataclasses.asdict(measure_logits(logits, test.labels, target_logits)),
            "calibration_error": calibration_error(logits, test.labels),
            "auroc": auroc(logits, test.labels, n_base),
            "curve": curve(logits, test.labels, n_base),
            "added_macs_share": self._added_macs(module) / max(self._macs(setting.source.module), 1),
            "chosen": dict(fitted.chosen),
            "trials": list(fitted.trials),
        }
        removal = {}
        if isinstance(module, Composite):
            kept = torch.equal(logits[:, :n_base], target_logits)
            clone = module.detach(module.clones[0])
            with TemporaryDirectory() as folder:
                found["bytes"] = save(clone, f"{folder}/clone.safetensors")
            some = test.images[:_REMOVAL_IMAGES]  # both networks in the same batches: other sizes round otherwise
            left, own = setting.logits(module, some), setting.logits(setting.target.module, some)
            removal = {"base_logits_equal": kept, "removed_equal": torch.equal(left, own)}
        else:
            found["bytes"] = new_bytes(module, setting.target.module, setting.source.module)
        return {**found, "verified": {"target_unchanged": self._unchanged(), **removal}}

    def _unchanged(self) -> bool:
        return not differences(self._setting.target.module, self._before)

    def _test(self, classes: tuple[str, ...]) -> tuple[ImageSet, Tensor]:
        """Test images of base classes and of some new ones, and the target's logits for them."""
        if classes not in self._tests:
            test = self._setting.test_images(classes)
            self._tests[classes] = test, self._setting.logits(self._setting.target.module, test.images)
        return self._tests[classes]

    def _added_macs(self, module: nn.Module) -> int:
        return self._macs(module) - self._macs(self._setting.target.module)

    def _macs(self, module: nn.Module) -> int:
        like = next(module.parameters(), torch.empty(0))
        image = images_as_float(self._setting.test.images[:1]).to(like.device, like.dtype)
        with FlopCounterMode(display=False) as counter, evaluating(module):
            module(image)
        return int(counter.get_total_flops()) // 2


def curve(logits: Tensor, labels: Tensor, n_base: int) -> list[list[float]]:
    """For each of `SHIFTS`: the shift, accuracy on base and on new samples, leak; rounded to five digits."""
    is_base, points = labels < n_base, []
    for shift in SHIFTS:
        moved = shifted(logits, n_base, shift)
        correct = (moved.argmax(1) == labels).double()
        values = float(correct[is_base].mean()), float(correct[~is_base].mean()), leak(moved[is_base], n_base)
        points.append([shift, *(round(value, 5) for value in values)])
    return points
