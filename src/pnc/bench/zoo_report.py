"""Tables and claims of the bench of a zoo, from its rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from pnc.bench.bench import Row, Rows
from pnc.bench.result_files import Claim, at_least, at_most, table

LOOK, CLONE, RANK, KILLED = "look", "clone", "rank", "killed"
"""Parts of a query: each source is looked at and scored by rivals; some or all are cloned from; the zoo is ranked, for
the first query also by several workers, one of which is killed."""
SUPPORT = (20, 5)
"""Images of each new class and of each base class."""
TAU, TAU_GAIN, REGRET, HITS, TIME = 0.8, 0.1, 0.01, 0.9, 0.1
"""Required figures: Kendall's tau, its lead over each rival, the accuracy by which the chosen source may be behind the
best one, in what share of the queries, and the time of a ranking as a share of cloning from all sources."""
CLEAR = 0.02
"""Real accuracies that differ by less can hardly be told apart on some hundred test images."""
RIVALS = {
    "logme": "LogME",
    "logme_both": "LogME, both networks' features",
    "leep": "LEEP",
    "nearest_mean": "nearest mean",
    "nearest_mean_both": "nearest mean, both networks' features",
    "own_accuracy": "source's own accuracy",
}
FRESH = "fresh_accuracy"
"""Accuracy of the clones themselves on as many other images as the support has: no rival, since it takes all clones
and twice the images."""
N_CHOSEN_ON = 10
"""How predictions are made was chosen on the first queries, those of CIFAR-100."""


def kendall(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Kendall's tau-b: the share of pairs in the same order less the share in opposite orders, corrected for ties."""
    signs = [
        ((xs[i] > xs[j]) - (xs[i] < xs[j]), (ys[i] > ys[j]) - (ys[i] < ys[j]))
        for i, j in combinations(range(len(xs)), 2)
    ]
    untied = [sum(bool(one[side]) for one in signs) for side in (0, 1)]
    return sum(x * y for x, y in signs) / max(math.sqrt(untied[0] * untied[1]), 1e-12)


def clear_order(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The share of pairs in the same order less the share in opposite orders, where `ys` differ by `CLEAR` or more."""
    pairs = [(xs[i] - xs[j], ys[i] - ys[j]) for i, j in combinations(range(len(xs)), 2)]
    signs = [(x * y > 0) - (x * y < 0) for x, y in pairs if abs(y) >= CLEAR]
    return sum(signs) / max(len(signs), 1)


@dataclass(frozen=True)
class Result:
    """What the rows say about one query.

    Attributes:
        query: Its name.
        n_cloned: Number of sources cloned from.
        taus: Kendall's tau with the real average accuracy, over these sources: of "pnc", of each of `RIVALS`, and of
            `FRESH`.
        clear: The same over pairs of sources that clearly differ, see `clear_order`.
        regrets: How far the source that each would choose is behind the best one, in real average accuracy.
        error: Mean absolute difference of predicted and real accuracy.
        time_share: Time of the ranking as a share of cloning from all sources.
        best: The best source.
        halves: Kendall's tau between real accuracies on either half of the test images.
    """

    query: str
    n_cloned: int
    taus: Mapping[str, float]
    clear: Mapping[str, float]
    regrets: Mapping[str, float]
    error: float
    time_share: float
    best: str
    halves: float


def results(rows: Rows) -> list[Result]:
    """Summarise the rows of each query."""
    return [
        _result(name, [row for row in rows if row["query"] == name]) for name in dict.fromkeys(r["query"] for r in rows)
    ]


def _result(name: str, rows: Rows) -> Result:
    looks, clones = ({row["source"]: row for row in rows if row["part"] == part} for part in (LOOK, CLONE))
    (ranking,) = (row for row in rows if row["part"] == RANK)
    expected = dict(zip(ranking["order"], ranking["predicted"], strict=True))
    real = {source: row["average_accuracy"] for source, row in clones.items()}
    scores = {
        "pnc": expected,
        **{key: {one: looks[one][key] for one in real} for key in RIVALS},
        FRESH: {one: clones[one][FRESH] for one in real},
    }
    chosen = {key: max(real, key=own.__getitem__) for key, own in scores.items()} | {"pnc": ranking["order"][0]}
    best = max(real, key=real.__getitem__)
    cloning = ranking["loading_seconds"] + ranking["clone_seconds"] * len(looks)
    return Result(
        query=name,
        n_cloned=len(real),
        taus={key: kendall([own[one] for one in real], [*real.values()]) for key, own in scores.items()},
        clear={key: clear_order([own[one] for one in real], [*real.values()]) for key, own in scores.items()},
        regrets={key: real[best] - real[one] for key, one in chosen.items()},
        error=fmean(abs(expected[one] - real[one]) for one in real),
        time_share=ranking["seconds"] / cloning,
        best=best,
        halves=kendall(*zip(*(clones[one]["half_accuracies"] for one in real), strict=True)),
    )


def claims(rows: Rows) -> list[Claim]:
    """Return the required figures."""
    found = results(rows)
    taus = {key: fmean(one.taus[key] for one in found) for key in ("pnc", *RIVALS)}
    n_networks = len({row["source"] for row in rows if row["part"] == LOOK})
    return [
        at_least("trained sources", 30, n_networks),
        at_least("Kendall's tau of predicted and real accuracy, mean over queries", TAU, taus["pnc"]),
        *(at_least(f"its lead over {RIVALS[key]}", TAU_GAIN, taus["pnc"] - taus[key]) for key in RIVALS),
        at_least(
            f"share of {len(found)} queries whose chosen source is within a point of the best",
            HITS,
            fmean(one.regrets["pnc"] <= REGRET + 1e-9 for one in found),
        ),
        at_most(
            "time of a ranking as a share of cloning from all sources in closed form, mean over queries",
            TIME,
            fmean(one.time_share for one in found),
        ),
        *(
            Claim(f"{row['source']}: the ranking is that of one process", "equal", _same(row, rows), _same(row, rows))
            for row in rows
            if row["part"] == KILLED
        ),
    ]


def _same(row: Row, rows: Rows) -> bool:
    """Whether a ranking by several workers, one of them killed, equals that of one process for the same query."""
    (one,) = (other for other in rows if other["part"] == RANK and other["query"] == row["query"])
    return row["killed"] == 1 and (row["order"], row["predicted"]) == (one["order"], one["predicted"])


def markdown(rows: Rows) -> str:
    """Return the tables: ours and each rival over all queries, then every query."""
    found = results(rows)
    names = {"pnc": "**pnc zoo rank**", **RIVALS, FRESH: "the clones themselves, on as many other images"}
    looks, clones = ([row for row in rows if row["part"] == part] for part in (LOOK, CLONE))
    over_all = [
        (
            names[key],
            fmean(one.taus[key] for one in found),
            *(fmean(one.taus[key] for one in part) for part in (found[:N_CHOSEN_ON], found[N_CHOSEN_ON:]) if part),
            fmean(one.clear[key] for one in found),
            fmean(one.regrets[key] for one in found),
            max(one.regrets[key] for one in found),
            f"{sum(one.regrets[key] <= REGRET + 1e-9 for one in found)} of {len(found)}",
        )
        for key in names
    ]
    each = [
        (one.query, one.n_cloned, one.best, one.taus["pnc"], max(one.taus[key] for key in RIVALS), one.halves,
         one.regrets["pnc"], one.error, one.time_share)
        for one in found
    ]  # fmt: skip
    head = (
        f"{len({row['source'] for row in looks})} trained sources; {len(found)} queries with {SUPPORT[0]} images of "
        f"each new and {SUPPORT[1]} of each base class; {len(clones)} clones in closed form, measured on images that "
        "no network has seen. tau: Kendall's, of the order with the real average accuracy of the clones, mean over "
        f"queries; the first {N_CHOSEN_ON}, of CIFAR-100, are those on which the way of predicting was chosen. clear: "
        f"the same over pairs of sources whose real accuracies differ by {CLEAR:g} or more. regret: how far the chosen "
        "source is behind the best one. The last row is no rival: it takes all clones, and another support to try them "
        "on."
    )
    parts = ("tau, first queries", "tau, others")[: 1 + (len(found) > N_CHOSEN_ON)]
    columns = ("order by", "tau", *parts, "clear", "regret", "largest regret", "within a point")
    own = ("query", "clones", "best source", "tau", "best rival's", "halves", "regret", "mean error", "time share")
    foot = (
        f"A look takes {fmean(row['seconds'] for row in looks):.2f} s of one core, a ranking "
        f"{fmean(row['seconds'] for row in rows if row['part'] == RANK):.1f} s, a clone "
        f"{fmean(row['seconds'] for row in clones):.1f} s; seconds are the processor's, not the clock's; for "
        "the time share, clones from every eighth source were timed just after the ranking. Where not all "
        "sources were cloned from, those with the best looks were, and others drawn at random; the best one is the "
        "best of these. Sources that do not name the requested classes are cloned from with the outputs that stand for "
        "them. halves: tau between the real accuracies on either half of the test images, which says how far these can "
        "be trusted. mean error: of the predicted accuracy."
    )
    return "\n\n".join([head, table(columns, over_all), table(own, each), foot])
