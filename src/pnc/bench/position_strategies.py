"""Ways to find a position, side by side: closed form within bounds, density, refinement, the paper's search."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from pnc.bench.result_files import Cells, Claim, over_seeds, table
from pnc.composite.composite import attach
from pnc.composite.metrics import evaluate
from pnc.composite.prediction import predict
from pnc.data.image_set import ImageSet, class_subset, relabel
from pnc.data.support import draw_support
from pnc.method.pipeline import clone
from pnc.method.task import Progress
from pnc.models.model_specs import LoadedModel

STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    "closed form": {"effort": "seconds"},
    "closed form, 60% of the MACs": {"max_macs": 0.6, "effort": "seconds"},
    "closed form, 30% of the MACs": {"max_macs": 0.3, "effort": "seconds"},
    "density too, 60% of the MACs": {"max_macs": 0.6},
    "density too, 30% of the MACs": {"max_macs": 0.3},
    "refined, 30% of the MACs": {"max_macs": 0.3, "refine": True},
    "sequential": {"strategy": "sequential"},
}
"""What is measured, as settings of `clone`."""

COLUMNS = ("base_accuracy", "new_accuracy", "average_accuracy", "held_out_score", "macs_share", "density", "seconds")


@dataclass(frozen=True)
class Setting:
    """What all strategies share.

    Attributes:
        source: Knows the new classes.
        target: Shall get them.
        train: Images that supports are drawn from.
        test: Images to measure on.
        n_new: Support images per new class.
        n_base: Per base class.
        flip: As in `clone`.
    """

    source: LoadedModel
    target: LoadedModel
    train: ImageSet
    test: ImageSet
    n_new: int
    n_base: int
    flip: bool

    @property
    def device(self) -> torch.device:
        """Where both networks are."""
        return next(self.target.module.parameters()).device


def run(setting: Setting, seeds: Sequence[int], cells: Cells, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Make a clone by each strategy for each seed, and measure it on all test images.

    Args:
        setting: Networks and images.
        seeds: Of the support and of the clone.
        cells: Rows that are there already are not made again; keys: strategy and seed.
        progress: Called with what is being done, the rows done, and the rows in all.
    Returns:
        The rows, seed by seed. `seconds` is the time of the whole of `clone`, from two loaded networks on.
    """
    wanted = [(name, seed) for seed in seeds for name in STRATEGIES]
    for done, (strategy, seed) in enumerate(wanted):
        if progress is not None:
            progress(f"seed {seed}: {strategy}", done, len(wanted))
        cell = {"strategy": strategy, "seed": seed}
        if cell not in cells:
            cells.add({**cell, **_row(setting, strategy, seed)})
    made = {(row["strategy"], row["seed"]): row for row in cells.rows}
    return [made[cell] for cell in wanted]


def _row(setting: Setting, strategy: str, seed: int) -> dict[str, Any]:
    source, target = setting.source, setting.target
    new = [name for name in source.classes if name not in target.classes]
    generator = torch.Generator().manual_seed(seed)
    support = draw_support(setting.train, new, target.classes, setting.n_new, setting.n_base, generator)
    start = time.perf_counter()
    made = clone(
        source.module,
        target.module,
        support,
        classes=new,
        source_classes=source.classes,
        base_classes=target.classes,
        flip=setting.flip,
        seed=seed,
        **STRATEGIES[strategy],
    )
    seconds = time.perf_counter() - start
    names = [*target.classes, *new]
    test = relabel(class_subset(setting.test, names), names)
    logits = predict(attach(target.module, made), test.images)
    facts = evaluate(logits, test.labels, logits[:, : len(target.classes)])
    return {
        **dataclasses.asdict(facts),
        "held_out_score": made.recipe["score"],
        "macs_share": made.recipe["macs_share"],
        "density": made.recipe["density"],
        "added_params": made.n_params,
        "seconds": seconds,
        "target_cut": made.target_cut.name,
        "source_cut": made.source_cut.name,
        "refine": made.recipe.get("refine"),
        "learning_rate": made.recipe.get("learning_rate"),
    }


def claims(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """What was asked for, beside what was measured: means over seeds, with half their range."""
    accuracy = {name: _values(rows, name, "average_accuracy") for name in STRATEGIES}
    shares = {name: _values(rows, name, "macs_share") for name in STRATEGIES}
    seconds = {name: _values(rows, name, "seconds") for name in STRATEGIES}
    free, _, plain, medium, cheap, fine, reference = STRATEGIES
    above = [a - b for a, b in zip(accuracy[free], accuracy[reference], strict=True)]
    faster = [b / a for a, b in zip(seconds[free], seconds[reference], strict=True)]
    gains = [a - b for a, b in zip(accuracy[fine], accuracy[plain], strict=True)]
    return [
        over_seeds("average accuracy at the free choice", ">=", 0.755, accuracy[free]),
        over_seeds("average accuracy with added MACs <= 60% of the source's", ">=", 0.745, accuracy[medium]),
        over_seeds("added MACs under the bound of 60%", "<=", 0.6, shares[medium]),
        over_seeds("average accuracy with added MACs <= 30% of the source's", ">=", 0.72, accuracy[cheap]),
        over_seeds("added MACs under the bound of 30%", "<=", 0.3, shares[cheap]),
        over_seeds("closed form above the sequential reference", ">=", 0.02, above),
        over_seeds("closed form faster than the sequential reference, times", ">=", 10, faster),
        over_seeds("what refinement gains on test images, at 30% of the MACs", ">=", 0, gains),
    ]


def _values(rows: Sequence[Mapping[str, Any]], strategy: str, key: str) -> list[float]:
    return [row[key] for row in rows if row["strategy"] == strategy]


def markdown(rows: Sequence[Mapping[str, Any]], setting: Setting, data: str) -> str:
    """The means over seeds as a table, then every row; `data` is the name of the images."""
    flips = ", with mirror images" if setting.flip else ""
    means = [[name, *(fmean(_values(rows, name, column)) for column in COLUMNS)] for name in STRATEGIES]
    keys = ("strategy", "seed", *COLUMNS, "target_cut", "source_cut")
    return "\n".join(
        [
            f"{data}; support of {setting.n_new}/{setting.n_base} images per new/base class{flips}.",
            "",
            "Means over the seeds:",
            "",
            table(("strategy", *COLUMNS), means),
            "",
            "Every row:",
            "",
            table(keys, [[row[key] for key in keys] for row in rows]),
            "",
            "`seconds`: from two loaded networks and the support to the clone. "
            "`macs_share`: added multiply-accumulates as a share of the source's.",
        ]
    )
