"""Ways to find a position compared: closed form within bounds, density, refinement, the paper's search."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from pnc.bench.bench import Bench, Row, Rows, one_by_one
from pnc.bench.result_files import Claim, over_seeds, table
from pnc.bench.setting import Setting
from pnc.composite.batched_logits import logits_of
from pnc.composite.composite import attach
from pnc.composite.metrics import measure_logits
from pnc.method.pipeline import clone

STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    "closed form": {"effort": "seconds"},
    "closed form, 60% of the MACs": {"max_macs": 0.6, "effort": "seconds"},
    "closed form, 30% of the MACs": {"max_macs": 0.3, "effort": "seconds"},
    "density too, 60% of the MACs": {"max_macs": 0.6},
    "density too, 30% of the MACs": {"max_macs": 0.3},
    "refined, 30% of the MACs": {"max_macs": 0.3, "refine": True},
    "sequential": {"strategy": "sequential"},
}
"""What is measured, as arguments of `clone`."""

KEYS = ("strategy", "seed")
COLUMNS = ("base_accuracy", "new_accuracy", "average_accuracy", "held_out_score", "macs_share", "density", "seconds")


def bench(setting: Setting, seeds: Sequence[int]) -> Bench:
    """Make a clone by each strategy for each seed, and measure it on all test images.

    `seconds` is the time of the whole of `clone`, starting from two loaded networks.
    """
    wanted = [{"strategy": name, "seed": seed} for seed in seeds for name in STRATEGIES]
    measure = one_by_one(wanted, lambda cell: _row(setting, **cell))
    return Bench("positions", KEYS, setting.facts, measure, claims, partial(markdown, setting=setting))


def _row(setting: Setting, strategy: str, seed: int) -> Row:
    source, target, new = setting.source, setting.target, setting.new_classes
    support = setting.draw(new, seed)
    start = time.perf_counter()
    made = clone(source.module, target.module, support, **setting.arguments(new, seed), **STRATEGIES[strategy])
    seconds = time.perf_counter() - start
    test = setting.test_images(new)
    logits = logits_of(attach(target.module, made), test.images)
    facts = measure_logits(logits, test.labels, logits[:, : len(target.classes)])
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


def claims(rows: Rows) -> list[Claim]:
    """Required figures, with what was measured: means over seeds, with half their range."""
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


def _values(rows: Rows, strategy: str, key: str) -> list[float]:
    return [row[key] for row in rows if row["strategy"] == strategy]


def markdown(rows: Rows, setting: Setting) -> str:
    """The means over seeds as a table, then every row."""
    means = [[name, *(fmean(_values(rows, name, column)) for column in COLUMNS)] for name in STRATEGIES]
    keys = ("strategy", "seed", *COLUMNS, "target_cut", "source_cut")
    return "\n".join(
        [
            f"{setting.words}.",
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
