"""One backbone, two networks: a fine-tuned copy of a public network gains classes from that network itself."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean

import torch
from torch import nn

from pnc.bench import compare
from pnc.bench.bench import Bench, Row, Rows, one_by_one
from pnc.bench.comparison_methods import METHODS as COMPARED
from pnc.bench.result_files import Cells, Claim, over_seeds, table
from pnc.bench.rivals import lora, lwf, stacked_features
from pnc.bench.rivals.clone_variants import LAST, WHOLE
from pnc.bench.rivals.rival import Budget, Fitted, Rival
from pnc.bench.rivals.tuning import first_trained
from pnc.bench.setting import Setting
from pnc.composite.composite import attach
from pnc.data.image_set import class_subset, relabel
from pnc.foundation.errors import InputError
from pnc.graph.cut_points import LOGITS, extract
from pnc.method.pipeline import clone
from pnc.method.settings import Effort
from pnc.method.task import CloneTask, Progress, prepare_task
from pnc.models.model_specs import LoadedModel

KEYS = ("tuned", "support", "method", "seed")
BUDGET = Budget(10, 30, 90, n_second=2, batch_size=32)
CLONE, SECONDS = "clone", 'clone (effort="seconds")'
MOST_MACS = {"head": 0.02, "last third": 0.4}
"""Multiply-accumulates that a clone may add, as a share of the source's."""
WORDS = {
    "head": "The new head alone was trained",
    "last third": "The last third of the multiply-accumulates was trained",
    "all": "All layers were trained, at a low rate",
}
UNUSED = ("space", "trials", "curve")
FIGURES = ("base_accuracy", "new_accuracy", "average_accuracy", "auroc", "leak", "added_macs_share", "bytes", "seconds")


def _cloned(task: CloneTask, budget: Budget, effort: Effort) -> Fitted:
    """The clone as `pnc.clone` makes it."""
    samples = task.samples
    made = clone(
        task.source.model,
        task.target.model,
        (samples.images[: len(samples.labels)], samples.labels),
        classes=task.new_classes,
        source_classes=task.source.classes,
        base_classes=task.target.classes,
        effort=effort,
        seed=task.seed,
        batch_size=task.batch_size,
    )
    facts = {key: made.recipe[key] for key in ("score", "density", "tune") if key in made.recipe}
    place = {"target_cut": made.target_cut.name, "source_cut": made.source_cut.name}
    return Fitted(attach(task.target.model, made), {**place, **facts})


def on_last_stage(rival: Rival) -> Rival:
    """The same rival on the target's last third: what comes before stays as it is and runs once on the support."""

    def fit(task: CloneTask, budget: Budget) -> Fitted:
        cut = first_trained(task, "last stage")
        assert cut is not None
        trunk, tail = (extract(task.target.recording, *ends) for ends in ((None, [cut]), (cut, [LOGITS])))
        samples = task.samples
        with torch.no_grad():
            batches = samples.images[: len(samples.labels)].split(task.batch_size)
            tensors = torch.cat([trunk(batch) for batch in batches])
        other = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(cut.n_channels, len(task.source.classes))
        )
        stage = prepare_task(
            other.requires_grad_(False),  # a task needs a source, which rivals that tune do not read
            tail,
            (tensors, samples.labels),
            classes=task.new_classes,
            source_classes=task.source.classes,
            base_classes=task.target.classes,
            seed=task.seed,
            batch_size=task.batch_size,
        )
        fitted = rival.fit(stage, budget)
        return Fitted(nn.Sequential(trunk, fitted.module).eval(), fitted.chosen, fitted.trials)

    return Rival(f"{rival.name} (last stage)", rival.kind, fit, rival.space)


METHODS: Mapping[str, Rival] = {
    rival.name: rival
    for rival in (
        Rival(CLONE, "clone", partial(_cloned, effort="minutes")),
        Rival(SECONDS, "clone", partial(_cloned, effort="seconds")),
        *(COMPARED[name] for name in (WHOLE, LAST, "direct ensemble", "ensemble with temperatures")),
        *stacked_features.RIVALS,
        *(COMPARED[name] for name in ("linear probe", "linear probe of source features")),
        *(COMPARED[f"fine-tuning with replay ({scope})"] for scope in ("last stage", "head")),
        on_last_stage(lwf.RIVAL),
        on_last_stage(lora.RIVAL),
    )
}
STACKED = tuple(rival.name for rival in stacked_features.RIVALS)


def bench(
    networks: Callable[[str, Progress | None], Setting],
    ways: Sequence[str],
    support: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    facts: Row,
) -> Bench:
    """Compare clones and rivals for each way in which the target was fine-tuned.

    Args:
        networks: Makes networks and images for one way; called once, and only if a row is missing.
        ways: Names of these ways.
        support: Images per new and per base class, as in the settings.
        methods: Names out of `METHODS`.
        seeds: Of the supports.
        facts: What rows depend on, as JSON values.
    """
    wanted = [
        {"tuned": tuned, "support": support, "method": method, "seed": seed}
        for seed in seeds
        for tuned in ways
        for method in methods
    ]
    cases: dict[str, _Case] = {}

    def measure(cells: Cells, progress: Progress | None) -> Rows:
        def make(cell: Row) -> Row:
            tuned = cell["tuned"]
            if tuned not in cases:
                cases[tuned] = _Case(networks(tuned, progress))
            return cases[tuned].row(cell["method"], cell["seed"])

        one_by_one(wanted, make)(cells, progress)
        return cells.rows  # of all supports that were measured so far

    return Bench("backbone", KEYS, facts, measure, claims, markdown)


class _Case:
    """One target: the accuracies of both networks alone, and what methods share."""

    def __init__(self, setting: Setting) -> None:
        self._new = tuple(name for name in setting.train.classes if name not in setting.target.classes)
        self._runner = compare.Runner(setting, BUDGET)
        self._alone = {
            "target_alone": _accuracy(setting, setting.target, setting.target.classes),
            "source_alone": _accuracy(setting, setting.source, self._new),
        }

    def row(self, method: str, seed: int) -> Row:
        """Measure one method on one support."""
        found = self._runner.measure(METHODS[method], self._new, seed)
        return {**{key: value for key, value in found.items() if key not in UNUSED}, **self._alone}


def _accuracy(setting: Setting, model: LoadedModel, names: Sequence[str]) -> float:
    """Accuracy of a network alone on some of its classes, among all that it knows."""
    data = relabel(class_subset(setting.test, names), model.classes)
    return float((setting.logits(model.module, data.images).argmax(1) == data.labels).double().mean())


def choose(text: str | None, known: Sequence[str], argument: str) -> list[str]:
    """Read names, separated by commas; None gives all.

    Raises:
        InputError: a name is unknown, or there is none.
    """
    chosen = list(known) if text is None else [part.strip() for part in text.split(",") if part.strip()]
    wrong = next((name for name in chosen if name not in known), None)
    if wrong is not None or not chosen:
        raise InputError(f"{argument}: expected some of {', '.join(known)}; got {wrong or text!r}")
    return list(dict.fromkeys(chosen))


def claims(rows: Rows) -> list[Claim]:
    """What the clone must reach where the target was tuned in part, of the cells that there are."""
    found = []
    for tuned, support in dict.fromkeys((row["tuned"], row["support"]) for row in rows):
        here = [row for row in rows if (row["tuned"], row["support"]) == (tuned, support)]
        name = f"{tuned} tuned, {support}"
        macs = [row["added_macs_share"] for row in here if row["method"] == CLONE]
        if macs and tuned in MOST_MACS:
            found.append(over_seeds(f"{name}: added MACs as a share of the source's", "<=", MOST_MACS[tuned], macs))
        stacked = _best(here, [method for method in STACKED if any(row["method"] == method for row in here)])
        if stacked and (above := _above(here, stacked)):
            found.append(over_seeds(f"{name}: average accuracy above {stacked}", ">=", -0.005, above))
        tuning = _best(here, list(dict.fromkeys(row["method"] for row in here if row["kind"] == "tuning")))
        if tuning and (above := _above(here, tuning)):
            words = f"{name}: average accuracy above {tuning}, the best rival that tunes the target"
            found.append(over_seeds(words, ">=", 0.1, above))
    for promise in ("target_unchanged", "base_logits_equal", "removed_equal"):
        kept = [row["verified"][promise] for row in rows if promise in row["verified"]]
        if kept:
            words = f"{promise.replace('_', ' ')} in each of {len(kept)} cells"
            found.append(Claim(words, "true", all(kept), all(kept)))
    return found


def _best(rows: Rows, methods: Sequence[str]) -> str | None:
    """The method with the highest average accuracy."""
    return max(methods, key=lambda method: _mean(rows, method, "average_accuracy"), default=None)


def _mean(rows: Rows, method: str, figure: str) -> float:
    return fmean(float(row[figure]) for row in rows if row["method"] == method)


def _above(rows: Rows, method: str) -> list[float]:
    """Average accuracy of the clone less that of a method, for each seed that both have."""
    ours, theirs = (
        {row["seed"]: row["average_accuracy"] for row in rows if row["method"] == one} for one in (CLONE, method)
    )
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def markdown(rows: Rows) -> str:
    """A table for each target and support, means over seeds."""
    lines = [
        "The source is EfficientNet-Lite0 with its public ImageNet weights (1,000 classes) at 128x128; the target is a "
        "copy of it with a new head for 50 classes of Tiny-ImageNet, fine-tuned to 80 images of each in one of three "
        "ways. It gains ten other classes. No support image was used to tune a target. Means over seeds. auroc: how "
        "well the log-odds of new against old classes tell new images from old ones. added_macs_share: beyond the "
        "target's, as a share of the source's. (last stage): the last third of the target is trained."
    ]
    for tuned, support in dict.fromkeys((row["tuned"], row["support"]) for row in rows):
        here = [row for row in rows if (row["tuned"], row["support"]) == (tuned, support)]
        methods = sorted({row["method"] for row in here}, key=lambda one: -_mean(here, one, "average_accuracy"))
        shown = [
            [
                method,
                sum(row["method"] == method for row in here),
                *(_mean(here, method, figure) for figure in FIGURES),
                _place(next(row for row in here if row["method"] == method)),
            ]
            for method in methods
        ]
        lines += [
            f"## Tuned: {tuned}; support {support}",
            f"{WORDS[tuned]}. Alone, the target classifies {here[0]['target_alone']:.3f} of the test images of its "
            f"classes correctly, the source {here[0]['source_alone']:.3f} of the new ones among its 1,000 classes.",
            table(("method", "seeds", *FIGURES, "position"), shown),
        ]
    return "\n\n".join(lines)


def _place(row: Row) -> str:
    chosen = row["chosen"]
    if "source_cut" not in chosen:
        return "-"
    density = chosen.get("density", 1.0)
    return f"{chosen['target_cut']} > {chosen['source_cut']}" + (f" at {density:.2f}" if density < 1 else "")
