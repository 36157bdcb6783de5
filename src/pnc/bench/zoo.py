"""The ranking of a zoo measured: predicted against real accuracy of clones, over queries and real networks."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import combinations
from statistics import fmean
from typing import Any

import torch

from pnc.bench.bench import Bench, Row, Rows
from pnc.bench.result_files import Cells, Claim, at_least, at_most, table
from pnc.bench.transfer_scores import leep, logme, nearest_mean
from pnc.bench.zoo_networks import CIFAR10, CIFAR100, FASHION, MNIST, Images
from pnc.composite.composite import attach
from pnc.composite.evaluation import evaluate
from pnc.data.image_set import class_subset
from pnc.data.support import Support, draw_support
from pnc.method.held_out import image_outcome
from pnc.method.pipeline import clone
from pnc.method.task import Progress
from pnc.models.model_specs import LoadedModel
from pnc.zoo.model_zoo import Zoo
from pnc.zoo.question import Question, ask
from pnc.zoo.quick_look import Sources, look_of, see
from pnc.zoo.rank import MAX_IMAGES, rank

KEYS = ("query", "part", "source")
LOOK, CLONE, RANK = "look", "clone", "rank"
"""Parts of a query: each source is looked at and scored by rivals; some or all are cloned from; the zoo is ranked."""
SUPPORT = (20, 5)
"""Images of each new class and of each base class."""
MEMORY = 2**30
N_TOP = 3
"""If only some sources are cloned from, these many are the best ones by their look, and the others are drawn."""
TAU, TAU_GAIN, REGRET, HITS, TIME = 0.8, 0.1, 0.01, 0.9, 0.1
"""Required figures: Kendall's tau, its lead over each rival, the accuracy by which the chosen source may be behind the
best one, in what share of the queries, and the time of a ranking as a share of cloning from all sources."""
RIVALS = {
    "logme": "LogME",
    "logme_both": "LogME, both networks' features",
    "leep": "LEEP",
    "nearest_mean": "nearest mean",
    "nearest_mean_both": "nearest mean, both networks' features",
    "own_accuracy": "source's own accuracy",
}


@dataclass(frozen=True)
class Query:
    """A request: the target, by name, and the classes that it lacks, of the same data."""

    target: str
    data: str
    classes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its rows."""
        return f"{self.target.removeprefix('target-')} + {', '.join(self.classes)}"


def _queries(target: str, data: str, *classes: str) -> list[Query]:
    return [Query(target, data, tuple(one.split())) for one in classes]


QUERIES = (
    *_queries(
        *("target-outdoors", CIFAR100, "lion tiger wolf", "bus pickup_truck train", "orchid rose tulip"),
        *("bottle chair clock", "shark whale crab"),
    ),
    *_queries(
        *("target-small", CIFAR100, "bear fox raccoon", "motorcycle bicycle tank", "poppy sunflower palm_tree"),
        *("lamp keyboard couch", "dolphin trout lobster"),
    ),
    *_queries(
        *("target-cifar10", CIFAR10, "dog frog horse", "dog ship truck", "frog horse ship", "frog horse truck"),
        "dog horse ship",
    ),
    *_queries("target-fashion", FASHION, "Sandal Shirt Sneaker", "Sandal Shirt Bag", "Shirt Sneaker Bag"),
    *_queries("target-mnist", MNIST, "5 6 7", "7 8 9"),
)


class _Case:
    """A query with its networks and images, loaded when they are needed."""

    def __init__(self, query: Query, zoo: Zoo, target: LoadedModel, images: Images) -> None:
        self.query, self.zoo, self.target = query, zoo, target
        names = [*target.classes, *query.classes]
        self.test = class_subset(images.test, names)
        self.support: Support = draw_support(images.unseen, query.classes, target.classes, *SUPPORT)

    @cached_property
    def question(self) -> Question:
        """What every source is asked."""
        return ask(
            self.target.module,
            self.support,
            self.query.classes,
            self.target.classes,
            {},
            flip=False,
            seed=0,
            max_images=MAX_IMAGES,
            memory=MEMORY,
        )[0]

    @cached_property
    def sources(self) -> Sources:
        """The sources, recorded for the question."""
        return Sources(self.zoo, self.question)

    def look(self, source: str) -> Row:
        """Look at a source, and score it by all rivals."""
        question, started = self.question, time.process_time()
        network = self.sources.network(source)
        seen = see(question, network)
        found = look_of(source, network, seen, question)
        seconds = time.process_time() - started
        both = torch.cat([question.target_features, seen.features], 1)
        labels, folds = question.labels, question.folds

        def near(features: torch.Tensor) -> float:
            right = nearest_mean(features, labels, folds).double()
            return image_outcome(right, labels, question.groups, question.n_base).average[0]

        return {
            **found.facts(),
            "seconds": seconds,
            "logme": logme(seen.features, labels),
            "logme_both": logme(both, labels),
            "leep": leep(seen.logits.softmax(1), labels),
            "nearest_mean": near(seen.features),
            "nearest_mean_both": near(both),
            "own_accuracy": self.zoo.entry(source).test_accuracy or 0.0,
        }

    def clone(self, source: str, source_classes: Sequence[str]) -> Row:
        """Clone from a source in closed form, and measure the composite on test images."""
        module = self.zoo.load(source, self.question.input_shape).module
        started = time.process_time()
        made = clone(
            module,
            self.target.module,
            self.support,
            classes=self.query.classes,
            source_classes=source_classes,
            base_classes=self.target.classes,
            effort="seconds",
        )
        seconds = time.process_time() - started
        found = evaluate(attach(self.target.module, made), self.test)
        return {
            "base_accuracy": found.base_accuracy,
            "new_accuracy": found.new_accuracy,
            "average_accuracy": found.average_accuracy,
            "seconds": seconds,
        }

    def rank(self) -> Row:
        """Rank the zoo, in this process; also measure what loading all sources takes, which cloning from them needs."""
        started = time.process_time()
        for name in self.zoo.names:
            self.zoo.load(name, self.question.input_shape)
        loading, started = time.process_time() - started, time.process_time()
        ranking = rank(
            self.zoo,
            self.target.module,
            self.support,
            classes=self.query.classes,
            base_classes=self.target.classes,
            workers=1,
        )
        return {
            "order": [one.name for one in ranking.ranked],
            "predicted": [one.predicted for one in ranking.ranked],
            "seconds": time.process_time() - started,
            "loading_seconds": loading,
        }


def bench(
    zoo: Zoo,
    target: Callable[[str], LoadedModel],
    images: Callable[[str], Images],
    n_cloned: int | None = None,
    queries: Sequence[Query] = QUERIES,
) -> Bench:
    """Rank the zoo for every query, and clone from its sources.

    Args:
        zoo: The sources.
        target: The targets, by name.
        images: The images of each data set.
        n_cloned: Clone from only so many sources for each query, and from the chosen one; None for all.
        queries: The requests.
    """

    @lru_cache(maxsize=1)
    def case(query: Query) -> _Case:
        return _Case(query, zoo, target(query.target), images(query.data))

    def measure(cells: Cells, progress: Progress | None) -> Rows:
        n_each = min(n_cloned or len(zoo), len(zoo))
        total, wanted = len(queries) * (len(zoo) + n_each + 1), list[Row]()

        def add(query: Query, part: str, source: str, make: Callable[[], Row]) -> Row:
            cell = {"query": query.name, "part": part, "source": source}
            if progress is not None:
                progress(", ".join(cell.values()), min(len(wanted), total - 1), total)
            if cell not in cells:
                cells.add({**cell, **make()})
            if cells[cell] not in wanted:
                wanted.append(cells[cell])
            return cells[cell]

        def of(query: Query, part: str, *given: Any) -> Row:
            made: Row = getattr(case(query), part)(*given)
            return made

        for number, query in enumerate(queries):
            looks = {name: add(query, LOOK, name, partial(of, query, LOOK, name)) for name in zoo.names}
            ranking = add(query, RANK, "", partial(of, query, RANK))
            for name in [ranking["order"][0], *_drawn(looks, n_each, seed=number)]:
                given = looks[name]["source_classes"]
                add(query, CLONE, name, partial(of, query, CLONE, name, given))
        return wanted

    settings = {"support": "/".join(map(str, SUPPORT)), "seed": 0}
    return Bench("zoo", KEYS, settings, measure, claims, markdown)


def _drawn(looks: Mapping[str, Row], number: int, seed: int) -> list[str]:
    """Sources to clone from: the best by their look, and others drawn at random."""
    best = sorted(looks, key=lambda name: (-looks[name]["probability"], name))
    top, rest = best[:N_TOP], sorted(best[N_TOP:])
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()
    return [*top, *(rest[index] for index in order)][:number]


def kendall(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Kendall's tau-b: the share of pairs in the same order less the share in opposite orders, corrected for ties."""
    signs = [
        ((xs[i] > xs[j]) - (xs[i] < xs[j]), (ys[i] > ys[j]) - (ys[i] < ys[j]))
        for i, j in combinations(range(len(xs)), 2)
    ]
    untied = [sum(bool(one[side]) for one in signs) for side in (0, 1)]
    return sum(x * y for x, y in signs) / max(math.sqrt(untied[0] * untied[1]), 1e-12)


@dataclass(frozen=True)
class Result:
    """What the rows say about one query.

    Attributes:
        query: Its name.
        n_cloned: Number of sources cloned from.
        taus: Kendall's tau with the real average accuracy, over these sources: of "pnc" and of each of `RIVALS`.
        regrets: How far the source that each would choose is behind the best one, in real average accuracy.
        error: Mean absolute difference of predicted and real accuracy.
        time_share: Time of the ranking as a share of cloning from all sources.
        best: The best source.
    """

    query: str
    n_cloned: int
    taus: Mapping[str, float]
    regrets: Mapping[str, float]
    error: float
    time_share: float
    best: str


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
    scores = {"pnc": expected, **{key: {one: looks[one][key] for one in real} for key in RIVALS}}
    chosen = {key: max(real, key=own.__getitem__) for key, own in scores.items()} | {"pnc": ranking["order"][0]}
    best = max(real, key=real.__getitem__)
    cloning = ranking["loading_seconds"] + fmean(row["seconds"] for row in clones.values()) * len(looks)
    return Result(
        query=name,
        n_cloned=len(real),
        taus={key: kendall([own[one] for one in real], [*real.values()]) for key, own in scores.items()},
        regrets={key: real[best] - real[one] for key, one in chosen.items()},
        error=fmean(abs(expected[one] - real[one]) for one in real),
        time_share=ranking["seconds"] / cloning,
        best=best,
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
    ]


def markdown(rows: Rows) -> str:
    """Return the tables: every query, then ours and each rival over all queries."""
    found = results(rows)
    names = {"pnc": "**pnc zoo rank**", **RIVALS}
    clones = [row for row in rows if row["part"] == CLONE]
    looks = [row for row in rows if row["part"] == LOOK]
    over_all = [
        (
            names[key],
            fmean(one.taus[key] for one in found),
            min(one.taus[key] for one in found),
            fmean(one.regrets[key] for one in found),
            max(one.regrets[key] for one in found),
            f"{sum(one.regrets[key] <= REGRET + 1e-9 for one in found)} of {len(found)}",
        )
        for key in names
    ]
    each = [
        (one.query, one.n_cloned, one.best, one.taus["pnc"], max(one.taus[key] for key in RIVALS), one.regrets["pnc"],
         one.error, one.time_share)
        for one in found
    ]  # fmt: skip
    return "\n\n".join(
        [
            f"{len({row['source'] for row in looks})} trained sources, {len(found)} queries of "
            f"{SUPPORT[0]} images of each new and {SUPPORT[1]} of each base class, {len(clones)} clones "
            '(`effort="seconds"`) measured on test images. tau: Kendall\'s, between the order and the real average '
            "accuracy of the clones. regret: how far the chosen source is behind the best one.",
            table(("order by", "tau", "lowest tau", "regret", "largest regret", "within a point"), over_all),
            table(
                ("query", "clones", "best source", "tau", "best rival's tau", "regret", "mean error", "time share"),
                each,
            ),
            f"A look takes {fmean(row['seconds'] for row in looks):.2f} s of one core, a clone "
            f"{fmean(row['seconds'] for row in clones):.1f} s; seconds are those of the processor, not of the clock. "
            "Sources that do not name the requested classes are cloned from with the outputs that stand for them.",
        ]
    )
