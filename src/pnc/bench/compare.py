"""The comparison: clones and their rivals on the same samples, cell by cell; a stopped run goes on where it was.

A cell is one method on one support: data, pair of networks, images per class, classes to clone, seed. Its row holds all
that it depends on and all that was measured; `pnc.bench.compare_report` makes tables, claims and pictures of the rows.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pnc.bench.comparison_methods import METHODS, class_groups
from pnc.bench.main_job import new_bytes
from pnc.bench.result_files import Cells, commit, environment
from pnc.bench.rivals.rival import Budget, Fitted, Rival
from pnc.clones.clone_file import save
from pnc.composite.composite import Composite
from pnc.composite.metrics import calibration_error, evaluate, leak, shifted
from pnc.composite.prediction import predict
from pnc.data.image_set import ImageSet, class_subset, images_as_float, relabel
from pnc.data.support import draw_support
from pnc.foundation.errors import InputError
from pnc.foundation.fingerprints import fingerprint
from pnc.foundation.network_state import differences, evaluating, take_snapshot
from pnc.method.task import Progress, prepare_task
from pnc.models.model_specs import LoadedModel

KEYS = ("data", "target", "source", "support", "flip", "group", "classes", "n_test", "method", "seed")
"""What names a cell."""

SHIFTS = tuple(step / 2 for step in range(-16, 17))
"""Added to the new logits, for the curve of leak against new accuracy."""

_REMOVAL_IMAGES = 500


@dataclass(frozen=True)
class ComparisonSetting:
    """What the cells of one run share.

    Attributes:
        source: Knows the new classes.
        target: Shall get them.
        train: Images that supports are drawn from.
        test: Images to measure on.
        data: What results call the images.
        n_new: Support images per new class; None for all.
        n_base: Per base class.
        flip: Mirror images may be used, by all methods.
        group: As `class_groups` takes it.
        budget: Of the methods that train.
        n_test: Test images per class, where not all are used; a label of `test`, which holds these already.
    """

    source: LoadedModel
    target: LoadedModel
    train: ImageSet
    test: ImageSet
    data: str
    n_new: int | None
    n_base: int | None
    flip: bool
    group: str
    budget: Budget
    n_test: int | None = None

    @property
    def new_classes(self) -> tuple[str, ...]:
        """All that the source knows and the target lacks."""
        return tuple(name for name in self.source.classes if name not in self.target.classes)

    @property
    def support(self) -> str:
        """Images per new / per base class."""
        return "/".join("all" if number is None else str(number) for number in (self.n_new, self.n_base))


def run(
    setting: ComparisonSetting,
    methods: Sequence[str],
    seeds: Sequence[int],
    cells: Cells,
    again: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Make every cell that is not there yet.

    Args:
        setting: Networks, images and regime.
        methods: Names out of `METHODS`.
        seeds: Of the supports and of all methods.
        cells: Where rows are kept; keys: `KEYS`.
        again: Methods whose cells are made anew though they are there, unless this very commit made them: so a stopped
            run goes on here too.
        progress: Called with what is being done and how long the rest takes, the cells done, and the cells in all.
    Returns:
        The rows of the run, made now or before.
    """
    names = {"target": network_name(setting.target), "source": network_name(setting.source)}
    wanted = [
        (_cell(setting, names, classes, method, seed), classes)
        for seed in seeds
        for classes in class_groups(setting.group, setting.new_classes, seed)
        for method in methods
    ]
    now = commit()
    made_now = [row for row in cells.rows if row["commit"] == now and not str(now).endswith("+")]
    kept = {_key(row) for row in cells.rows if row["method"] not in again} | {_key(row) for row in made_now}
    missing = [one for one in wanted if _key(one[0]) not in kept]
    arena = _Arena(setting)
    for done, (cell, classes) in enumerate(missing):
        if progress is not None:
            left = _time_left([later["method"] for later, _ in missing[done:]], cells.rows)
            progress(f"seed {cell['seed']}, {cell['classes']}: {cell['method']}{left}", done, len(missing))
        start = time.perf_counter()
        facts = arena.measure(METHODS[cell["method"]], classes, cell["seed"])
        cells.add({**cell, **facts, "cell_seconds": time.perf_counter() - start, **_where(setting)})
    made = {_key(row): row for row in cells.rows}
    return [made[_key(cell)] for cell, _ in wanted]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in KEYS)


def network_name(model: LoadedModel) -> str:
    """The spec of a network and a digest of its weights."""
    return f"{model.spec} {fingerprint(model.module).weights[:8]}"


def _cell(
    setting: ComparisonSetting, names: Mapping[str, str], classes: Sequence[str], method: str, seed: int
) -> dict[str, Any]:
    return {
        "data": setting.data,
        **names,
        "support": setting.support,
        "flip": setting.flip,
        "group": setting.group,
        "classes": ", ".join(classes),
        "n_test": setting.n_test,
        "method": method,
        "seed": seed,
    }


def _where(setting: ComparisonSetting) -> dict[str, Any]:
    return {"budget": dataclasses.asdict(setting.budget), "environment": environment(), "commit": commit()}


def _time_left(methods: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """How long the given cells will take, going by those that are there."""
    known: dict[str, list[float]] = {}
    for row in rows:
        known.setdefault(row["method"], []).append(row["cell_seconds"])
    if not known:
        return ""
    means = {method: fmean(seconds) for method, seconds in known.items()}
    minutes = sum(means.get(method, fmean(means.values())) for method in methods) / 60
    return f", about {minutes:.0f} min left"


class _Arena:
    """Runs methods in one setting; what does not depend on the method is computed once."""

    def __init__(self, setting: ComparisonSetting) -> None:
        self._setting = setting
        self._before = take_snapshot(setting.target.module)
        self._tests: dict[tuple[str, ...], tuple[ImageSet, Tensor]] = {}

    def measure(self, rival: Rival, classes: Sequence[str], seed: int) -> dict[str, Any]:
        """Make one method and measure it; the facts of a method that cannot use the support say why."""
        setting = self._setting
        base, everything = setting.target.classes, rival.sees_everything
        n_new, n_base = (None, None) if everything else (setting.n_new, setting.n_base)
        generator = torch.Generator().manual_seed(seed)
        support = draw_support(setting.train, classes, base, n_new, n_base, generator)
        facts = {"kind": rival.kind, "space": {name: list(values) for name, values in rival.space.items()}}
        start, cpu_start = time.perf_counter(), time.process_time()
        try:
            task = prepare_task(
                setting.source.module,
                setting.target.module,
                support,
                classes=classes,
                source_classes=setting.source.classes,
                base_classes=base,
                flip=setting.flip and not everything,
                seed=seed,
            )
            fitted = rival.fit(task, setting.budget)
        except InputError as error:
            return {**facts, "not_applicable": str(error), "verified": {"target_unchanged": self._unchanged()}}
        times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
        return {**facts, **times, **self._figures(fitted, tuple(classes))}

    def _figures(self, fitted: Fitted, classes: tuple[str, ...]) -> dict[str, Any]:
        setting, module = self._setting, fitted.module
        test, target_logits = self._test(classes)
        logits, n_base = predict(module, test.images), target_logits.shape[1]
        found = {
            **dataclasses.asdict(evaluate(logits, test.labels, target_logits)),
            "calibration_error": calibration_error(logits, test.labels),
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
            some = predict(module, test.images[:_REMOVAL_IMAGES])
            removal = {"base_logits_equal": kept, "removed_equal": torch.equal(some, target_logits[:_REMOVAL_IMAGES])}
        else:
            found["bytes"] = new_bytes(module, setting.target.module, setting.source.module)
        return {**found, "verified": {"target_unchanged": self._unchanged(), **removal}}

    def _unchanged(self) -> bool:
        return not differences(self._setting.target.module, self._before)

    def _test(self, classes: tuple[str, ...]) -> tuple[ImageSet, Tensor]:
        """Test images of base classes and of some new ones, and the target's logits of them."""
        if classes not in self._tests:
            names = [*self._setting.target.classes, *classes]
            test = relabel(class_subset(self._setting.test, names), names)
            self._tests[classes] = test, predict(self._setting.target.module, test.images)
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
