"""Tables, claims and curves of the comparison, from the rows of `pnc.bench.compare`."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

from pnc.bench.bench import Bench, Row, Rows
from pnc.bench.compare import KEYS
from pnc.bench.comparison_methods import BOUNDED, HALF, METHODS
from pnc.bench.main_job import CLONE
from pnc.bench.result_files import Cells, Claim, at_least, at_most, over_seeds, table
from pnc.foundation.class_names import listed
from pnc.foundation.errors import InputError

FIGURES = (
    "base_accuracy",
    "new_accuracy",
    "average_accuracy",
    "auroc",
    "conditional_kl",
    "leak",
    "locality_kl",
    "base_drop",
    "calibration_error",
    "added_macs_share",
    "bytes",
    "seconds",
    "cpu_seconds",
)
ADDED_LATER = ("auroc",)
"""Figures that old rows lack."""
COLUMNS = ("method", "kind", *FIGURES[:3], "spread", "at best shift", *FIGURES[3:])
ENSEMBLE = "direct ensemble"
STACKED = ("stacked features of both networks", "stacked features (free base logits)")
STACKED_MARGIN = 0.005
"""Average accuracy by which the clone may be below the stacked features of both whole networks."""
HALF_MARGIN = 0.01
"""The same for the clone of half the source."""
HALF_MACS = 0.55
"""Share of the source's multiply-accumulates that it may add: half, the head, and channels that cannot be removed."""
HARD = ("cifar", "tiny")
"""Prefixes of the names of data on which the clone must be ten points better than the best tuning rival."""
WELL_SERVED = 0.93
"""Average accuracy of a rival on easy images above which no margin is required."""

_REGIME = tuple(key for key in KEYS if key not in ("classes", "method", "seed"))


@dataclass(frozen=True, eq=False)
class Regime:
    """All rows of one table: one pair of networks, one data set, one support, one choice of classes."""

    key: tuple[Any, ...]
    rows: tuple[Row, ...]

    @property
    def facts(self) -> dict[str, Any]:
        """The common fields of its rows."""
        return dict(zip(_REGIME, self.key, strict=True))

    @property
    def title(self) -> str:
        """Title for people."""
        facts = self.facts
        networks = " from ".join(str(facts[role]).split()[0] for role in ("target", "source"))
        first, *others = str(facts["group"]).split(", ")
        group = f"{first} and {len(others)} others" if len(others) > 1 else " and ".join([first, *others])
        return f"{facts['data']}, {facts['support']}, {group}, {networks}"

    @property
    def is_heterogeneous(self) -> bool:
        """Whether source and target have different architectures."""
        return str(self.facts["target"]).split()[0] != str(self.facts["source"]).split()[0]

    @property
    def slug(self) -> str:
        """For file names; digests of the networks distinguish pairs of equal architecture."""
        digests = "-".join(str(self.facts[role]).split()[-1] for role in ("target", "source"))
        return re.sub("[^a-z0-9]+", "-", f"{self.title} {digests}".lower()).strip("-")

    @cached_property
    def _used(self) -> dict[str, list[Row]]:
        made: dict[str, list[Row]] = {}
        for row in self.rows:
            if "not_applicable" not in row:
                made.setdefault(row["method"], []).append(row)
        return {name: made[name] for name in METHODS if name in made}

    @property
    def methods(self) -> list[str]:
        """Methods with figures."""
        return list(self._used)

    @property
    def refusals(self) -> dict[str, str]:
        """Reasons why the other methods have none."""
        return {row["method"]: row["not_applicable"] for row in self.rows if "not_applicable" in row}

    def by_seed(self, method: str, figure: str) -> dict[int, float]:
        """A figure of a method for each seed; the mean over groups of classes if there are several."""
        values: dict[int, list[float]] = {}
        for row in self._used[method]:
            values.setdefault(row["seed"], []).append(float(row[figure]))
        return {seed: fmean(values[seed]) for seed in sorted(values)}

    def mean(self, method: str, figure: str) -> float:
        """The mean over seeds."""
        return fmean(self.by_seed(method, figure).values())

    def mean_if_known(self, method: str, figure: str) -> float | None:
        """The mean over seeds of a figure that old rows lack; None if any row lacks it."""
        return self.mean(method, figure) if all(figure in row for row in self._used[method]) else None

    def curve(self, method: str) -> list[list[float]]:
        """The mean curve: shift, accuracy on base and on new samples, leak."""
        curves = [row["curve"] for row in self._used[method]]
        return [[fmean(values) for values in zip(*points, strict=True)] for points in zip(*curves, strict=True)]

    def best_shifted(self, method: str) -> float:
        """Average accuracy at the shift of the new logits that is best on the test images."""
        return max((base + new) / 2 for _, base, new, _ in self.curve(method))

    def best_tuning(self) -> str | None:
        """The method with the highest average accuracy among those that tune parameters of the target."""
        tuning = [name for name in self.methods if METHODS[name].kind == "tuning"]
        return max(tuning, key=lambda name: self.mean(name, "average_accuracy")) if tuning else None

    def figures(self, method: str) -> dict[str, Any]:
        """Means of all figures."""
        averages = list(self.by_seed(method, "average_accuracy").values())
        return {
            "method": method,
            "kind": METHODS[method].kind,
            **{figure: self.mean(method, figure) for figure in FIGURES if figure not in ADDED_LATER},
            **{figure: self.mean_if_known(method, figure) for figure in ADDED_LATER},
            "bytes": round(self.mean(method, "bytes")),
            "spread": (max(averages) - min(averages)) / 2,
            "at best shift": self.best_shifted(method),
            "seeds": len(averages),
        }

    def points(self) -> dict[str, tuple[str, float, float]]:
        """For each method its kind, locality KL and average accuracy."""
        return {
            name: (METHODS[name].kind, self.mean(name, "locality_kl"), self.mean(name, "average_accuracy"))
            for name in self.methods
        }

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """New accuracy and leak over the shifts, of the clone, the ensemble and the best tuning rival."""
        shown = [name for name in (CLONE, ENSEMBLE, self.best_tuning()) if name in self._used]
        return {str(name): [(new, leak) for _, _, new, leak in self.curve(str(name))] for name in shown}


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Read the rows of all .jsonl files in a folder.

    Raises:
        InputError: there are none.
        FileFormatError: a file holds something else.
    """
    rows = [row for path in sorted(folder.glob("*.jsonl")) for row in Cells(path, {}, KEYS).rows]
    if not rows:
        raise InputError(f"folder: {folder} has no rows of `pnc bench compare`; run it with --out {folder} first")
    return rows


def bench(rows: Rows, pictures: Sequence[str] = ()) -> Bench:
    """Report rows of `pnc bench compare`; `pictures` are paths of pictures for the Markdown."""
    facts, text = {"rows": means(rows), "made_by": made_by(rows)}, partial(markdown, pictures=pictures)
    return Bench("compare-report", KEYS, {}, lambda cells, progress: rows, claims, text, lambda rows: facts)


def regimes(rows: Rows) -> list[Regime]:
    """The rows by table, in order of appearance."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in _REGIME), []).append(row)
    return [Regime(key, tuple(some)) for key, some in found.items()]


def means(rows: Rows) -> list[dict[str, Any]]:
    """One row for each method of each regime: means over classes and seeds."""
    return [{**regime.facts, **regime.figures(name)} for regime in regimes(rows) for name in regime.methods]


def made_by(rows: Rows) -> list[str]:
    """Commits, environments and budgets of the rows, each once."""
    return sorted({json.dumps({key: row[key] for key in ("commit", "environment", "budget")}) for row in rows})


# --------------------------------------------------------------------------------------------------------------- claims


def claims(rows: Rows) -> list[Claim]:
    """What the comparison must show, for regimes that have a clone."""
    found, all_regimes = [], regimes(rows)
    for regime in all_regimes:
        if CLONE in regime.methods:
            found += _claims(regime, all_regimes)
    checks = {name: [row["verified"][name] for row in rows if name in row["verified"]] for name in _PROMISES}
    return found + [
        Claim(f"{words} in each of {len(checks[name])} cells", "true", all(checks[name]), all(checks[name]))
        for name, words in _PROMISES.items()
        if checks[name]
    ]


_PROMISES = {
    "target_unchanged": "target unchanged",
    "base_logits_equal": "base logits equal",
    "removed_equal": "removal exact",
}


def _claims(regime: Regime, others: Sequence[Regime]) -> list[Claim]:
    facts, title = regime.facts, regime.title
    found = [at_most(f"{title}: conditional KL", 1e-6, max(regime.by_seed(CLONE, "conditional_kl").values()))]
    rival = regime.best_tuning()
    if rival is not None and _above(regime, rival):
        words = f"{title}: average accuracy above {rival}, the best tuning rival"
        bound = _margin(regime, regime.mean(rival, "average_accuracy"))
        found.append(over_seeds(words, ">=", bound, _above(regime, rival)))
        ratio = regime.mean(CLONE, "locality_kl") / max(regime.mean(rival, "locality_kl"), 1e-12)
        found.append(at_most(f"{title}: locality KL as a share of the best tuning rival's", 0.5, ratio))
    if ENSEMBLE in regime.methods and _above(regime, ENSEMBLE):
        bound = _margin_of_ensemble(regime)
        found.append(
            over_seeds(f"{title}: average accuracy above the {ENSEMBLE}", ">=", bound, _above(regime, ENSEMBLE))
        )
    stacked = max(
        (name for name in STACKED if name in regime.methods),
        key=lambda name: regime.mean(name, "average_accuracy"),
        default=None,
    )
    if stacked is not None and _above(regime, stacked):
        words = f"{title}: average accuracy above {stacked}"
        found.append(over_seeds(words, ">=", -STACKED_MARGIN, _above(regime, stacked)))
    if stacked is not None and HALF in regime.methods and _above(regime, stacked, HALF):
        words = f"{title}: average accuracy of the {HALF} above {stacked}"
        found.append(over_seeds(words, ">=", -HALF_MARGIN, _above(regime, stacked, HALF)))
        share = regime.mean(HALF, "added_macs_share")
        found.append(at_most(f"{title}: added MACs of the {HALF}, as a share of the source's", HALF_MACS, share))
    probes = [name for name in regime.methods if METHODS[name].kind == "features"]
    if regime.is_heterogeneous and probes:
        probe = max(probes, key=lambda name: regime.mean(name, "average_accuracy"))
        words = f"{title}: average accuracy above {probe}, the best probe of one network"
        found.append(over_seeds(words, ">=", 0.03, _above(regime, probe)))
    if facts["group"] == "single" and BOUNDED in regime.methods:
        found.append(at_most(f"{title}: base accuracy lost, {BOUNDED}", 0.02, regime.mean(BOUNDED, "base_drop")))
        words = f"{title}: accuracy on the new class, {BOUNDED}"
        found.append(at_least(words, 0.8, regime.mean(BOUNDED, "new_accuracy")))
    if facts["support"] == "100/0":
        with_base = [o for o in others if {**o.facts, "support": "100/0"} == facts and o.facts["support"] == "100/20"]
        for other in with_base:
            if CLONE in other.methods:
                lost = other.mean(CLONE, "average_accuracy") - regime.mean(CLONE, "average_accuracy")
                found.append(at_most(f"{title}: average accuracy below that at 100/20", 0.05, lost))
    return found


def _above(regime: Regime, other: str, clone: str = CLONE) -> list[float]:
    """Difference of average accuracies between a clone and another method, for each seed that both have."""
    ours, theirs = (regime.by_seed(name, "average_accuracy") for name in (clone, other))
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def _margin(regime: Regime, of_rival: float) -> float:
    """Required margin of the clone over the best tuning rival."""
    facts = regime.facts
    if facts["support"] in ("500/100", "all/all") or facts["group"] == "single":
        return 0.0
    if str(facts["data"]).lower().startswith(HARD):
        return 0.1 if facts["support"] in ("20/5", "100/20", "100/0") else 0.0
    return 0.05 if of_rival < WELL_SERVED else 0.0


def _margin_of_ensemble(regime: Regime) -> float:
    """Required margin of the clone over the direct ensemble."""
    facts = regime.facts
    if facts["group"] != "all":
        return 0.0
    return 0.03 if regime.is_heterogeneous and facts["support"] == "100/20" else 0.0


# ------------------------------------------------------------------------------------------------------------- Markdown


def summary(rows: Rows) -> str:
    """One table for each regime."""
    return "\n\n".join(_table(regime) for regime in regimes(rows))


def markdown(rows: Rows, pictures: Sequence[str] = ()) -> str:
    """Tables of all regimes, chosen settings, and the meaning of the columns."""
    parts = []
    for regime in regimes(rows):
        shown = [
            f"![{regime.title}]({path})" for path in pictures if Path(path).stem.removesuffix("-curves") == regime.slug
        ]
        parts += [f"## {regime.title}", _networks(regime), _table(regime), *shown, _choices(regime)]
    return "\n\n".join([*parts, _LEGEND])


def _networks(regime: Regime) -> str:
    facts = regime.facts
    seeds = sorted({row["seed"] for row in regime.rows})
    test = f"{facts['n_test']} test images per class" if facts["n_test"] else "all test images"
    mirror = ", with mirror images" if facts["flip"] else ""
    return (
        f"Target `{facts['target']}`, source `{facts['source']}`; support of {facts['support']} images per new/base "
        f"class{mirror}; {test}; seeds {listed([str(seed) for seed in seeds])}."
    )


def _table(regime: Regime) -> str:
    names = sorted(regime.methods, key=lambda name: -regime.mean(name, "average_accuracy"))
    figures = [regime.figures(name) for name in names]
    shown = [["-" if facts[column] is None else facts[column] for column in COLUMNS] for facts in figures]
    lines = [table(COLUMNS, shown)]
    lines += ["", *(f"{name}: {why}." for name, why in regime.refusals.items())] if regime.refusals else []
    return "\n".join(lines)


def _choices(regime: Regime) -> str:
    rows = [
        (name, row["classes"], row["seed"], ", ".join(f"{key} {_short(value)}" for key, value in row["chosen"].items()))
        for name in regime.methods
        for row in regime.rows
        if row["method"] == name and row.get("chosen")
    ]
    spaces = {row["method"]: row["space"] for row in regime.rows if row["space"]}
    shown = [
        f"- {name}: " + "; ".join(f"{key} in {', '.join(map(_short, values))}" for key, values in space.items())
        for name, space in spaces.items()
    ]
    return "\n".join(
        [
            "<details><summary>What was chosen, and from what</summary>",
            "",
            table(("method", "classes", "seed", "chosen"), rows),
            "",
            *shown,
            "",
            "</details>",
        ]
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_LEGEND = """`spread`: half the range of the average accuracy over seeds. `at best shift`: the average accuracy with
the constant that, added to all new logits, is best on the test images; the gain is what a method loses by a wrong
balance of base and new. `added_macs_share`: multiply-accumulates in addition to the target's, as a share of the
source's. `auroc`: how well the log-odds of new against base tell new test images from base ones, whatever the shift;
rows that were measured before it was have none. `bytes`: what must be sent to someone who has both networks.
`seconds`: from two loaded networks and the support to the method's network, including its search; `cpu_seconds`: of
the processor, which other programs do not lengthen. `calibration_error`: expected, 15 bins, over all test images.
`kind`: `tuning` trains parameters of the target, `features` a classifier on the frozen features of one network,
`clone` inserts a part of the source, `ensemble` runs both networks, `bound` sees all training images."""
