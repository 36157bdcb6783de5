"""Clones and rivals on corrupted images: noise, blur and low contrast, at three severities."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from torch import nn

from pnc.bench.bench import Bench, Row, Rows, one_by_one
from pnc.bench.comparison_methods import METHODS
from pnc.bench.main_job import CLONE
from pnc.bench.result_files import Claim, over_seeds, table
from pnc.bench.rivals import ensemble
from pnc.bench.rivals.rival import Budget
from pnc.bench.setting import Setting
from pnc.composite.metrics import auroc, measure_logits
from pnc.data.corruptions import STRENGTHS, corrupted
from pnc.data.image_set import images_as_float
from pnc.method.task import prepare_task

KEYS = ("corruption", "severity", "method", "seed")
CLEAN = "none"
ENSEMBLE = ensemble.RIVAL.name
USUAL = (
    *(CLONE, ENSEMBLE, "ensemble with temperatures", "stacked features of both networks"),
    *("linear probe", "fine-tuning with replay (head)"),
)
FIGURES = ("base", "new", "average", "auroc", "leak")


def bench(setting: Setting, methods: Sequence[str], seeds: Sequence[int]) -> Bench:
    """Fit every method on clean images for each seed, and measure it on corrupted test images.

    Args:
        setting: Networks, images, sizes of the support.
        methods: Names out of `METHODS` of the comparison.
        seeds: Of supports and methods.
    """
    kinds = [(CLEAN, 0), *((kind, severity) for kind in STRENGTHS for severity in (1, 2, 3))]
    wanted = [
        {"corruption": kind, "severity": severity, "method": method, "seed": seed}
        for seed in seeds
        for method in methods
        for kind, severity in kinds
    ]
    fitted: dict[tuple[str, int], nn.Module] = {}

    def make(cell: Row) -> Row:
        key = cell["method"], cell["seed"]
        if key not in fitted:
            fitted.clear()
            fitted[key] = _fitted(setting, *key)
        return _figures(setting, fitted[key], cell["corruption"], cell["severity"])

    return Bench("corruptions", KEYS, setting.facts, one_by_one(wanted, make), claims, markdown)


def _fitted(setting: Setting, method: str, seed: int) -> nn.Module:
    new = setting.new_classes
    support = setting.draw(new, seed)
    task = prepare_task(setting.source.module, setting.target.module, support, **setting.arguments(new, seed))
    return METHODS[method].fit(task, Budget()).module


def _figures(setting: Setting, module: nn.Module, kind: str, severity: int) -> Mapping[str, float]:
    test = setting.test_images(setting.new_classes)
    images = images_as_float(test.images)
    images = images if kind == CLEAN else corrupted(images, kind, severity)
    logits, own = setting.logits(module, images), setting.logits(setting.target.module, images)
    facts = measure_logits(logits, test.labels, own)
    return {
        "base": facts.base_accuracy,
        "new": facts.new_accuracy,
        "average": facts.average_accuracy,
        "auroc": auroc(logits, test.labels, own.shape[1]),
        "leak": facts.leak,
    }


def claims(rows: Rows) -> list[Claim]:
    """The clone must not be less robust than both whole networks side by side."""
    found = []
    for kind, severity in dict.fromkeys((row["corruption"], row["severity"]) for row in rows):
        ours, theirs = (
            {
                row["seed"]: row["average"]
                for row in rows
                if (row["corruption"], row["severity"], row["method"]) == (kind, severity, method)
            }
            for method in (CLONE, ENSEMBLE)
        )
        above = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        if above:
            name = "clean images" if kind == CLEAN else f"{kind}, severity {severity}"
            found.append(over_seeds(f"{name}: average accuracy above the {ENSEMBLE}", ">=", 0.0, above))
    return found


def markdown(rows: Rows) -> str:
    """A table for each corruption, means over seeds."""
    lines = [
        "Test images are corrupted, the support is not. Noise, blur and contrast as in Hendrycks and Dietterich (ICLR "
        "2019), severities 1, 3 and 5 of theirs as 1, 2 and 3. leak: mean probability of new classes on base images. "
        "auroc: how well the log-odds of new against base tell new images from base ones. Means over seeds."
    ]
    shown = []
    for kind, severity, method in dict.fromkeys((row["corruption"], row["severity"], row["method"]) for row in rows):
        here = [row for row in rows if (row["corruption"], row["severity"], row["method"]) == (kind, severity, method)]
        shown.append([kind, severity, method, *(fmean(row[figure] for row in here) for figure in FIGURES), len(here)])
    shown.sort(key=lambda row: ([CLEAN, *STRENGTHS].index(str(row[0])), row[1], -float(row[5])))
    return "\n\n".join([*lines, table(("corruption", "severity", "method", *FIGURES, "seeds"), shown)])
