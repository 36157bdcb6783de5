"""The ranking of a zoo measured: predicted against real accuracy of clones, over queries and real networks."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from statistics import fmean
from typing import Any

import torch

from pnc.bench.bench import Bench, Row, Rows
from pnc.bench.killed_workers import PROCESSES, rank_and_kill
from pnc.bench.result_files import Cells
from pnc.bench.transfer_scores import leep, logme, nearest_mean
from pnc.bench.zoo_networks import CIFAR10, CIFAR100, FASHION, MNIST, N_TEST, Images
from pnc.bench.zoo_report import CLONE, KILLED, LOOK, RANK, SUPPORT, claims, markdown
from pnc.clones.clone import Clone
from pnc.composite.composite import attach
from pnc.composite.evaluation import evaluate
from pnc.data.image_set import ImageSet, class_subset, draw_images, select
from pnc.data.support import Support, draw_support
from pnc.method.held_out import image_outcome
from pnc.method.pipeline import clone
from pnc.method.task import Progress
from pnc.models.model_specs import LoadedModel
from pnc.zoo.model_zoo import Zoo
from pnc.zoo.question import Question, ask
from pnc.zoo.quick_look import Sources, look_of, see
from pnc.zoo.rank import MAX_IMAGES, rank
from pnc.zoo.ranking import Ranking

KEYS = ("query", "part", "source")
MEMORY = 2**30
TIMED_EVERY = 8
"""Every how many sources a clone is timed, beside the ranking."""
N_TOP = 3
"""If only some sources are cloned from, these many are the best ones by their look, and the others are drawn."""


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
        self.support: Support = draw_support(images.unseen, query.classes, target.classes, *SUPPORT)
        self.fresh, self.halves = _tested_on(images, query.classes, target.classes)

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
            **found.summary(),
            "seconds": seconds,
            "logme": logme(seen.features, labels),
            "logme_both": logme(both, labels),
            "leep": leep(seen.logits.softmax(1), labels),
            "nearest_mean": near(seen.features),
            "nearest_mean_both": near(both),
            "own_accuracy": self.zoo.entry(source).test_accuracy or 0.0,
        }

    def clone(self, source: str, source_classes: Sequence[str]) -> Row:
        """Clone from a source in closed form, and measure the composite on images that no network has seen."""
        made, seconds = self._cloned(source, source_classes)
        composite = attach(self.target.module, made)
        halves = [evaluate(composite, half) for half in self.halves]
        return {
            "base_accuracy": fmean(half.base_accuracy for half in halves),
            "new_accuracy": fmean(half.new_accuracy for half in halves),
            "average_accuracy": fmean(half.average_accuracy for half in halves),
            "half_accuracies": [half.average_accuracy for half in halves],
            "fresh_accuracy": evaluate(composite, self.fresh).average_accuracy,
            "seconds": seconds,
        }

    def _cloned(self, source: str, source_classes: Sequence[str]) -> tuple[Clone, float]:
        """Clone from a source in closed form; the clone, and the processor's seconds."""
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
        return made, time.process_time() - started

    def rank(self, number: int) -> Row:
        """Rank the zoo, in this process; also time what loading all sources takes, and cloning from some.

        All in the same minute: how fast a processor is depends on what else runs.

        Args:
            number: Of the query: others are timed for each.
        """
        started = time.process_time()
        for name in self.zoo.names:
            self.zoo.load(name, self.question.input_shape)
        loading, started = time.process_time() - started, time.process_time()
        ranking = self.ranking(1)
        seconds = time.process_time() - started
        classes = {one.name: one.source_classes for one in ranking.ranked}
        timed = sorted(classes)[number % min(TIMED_EVERY, len(classes)) :: TIMED_EVERY]
        return {
            "order": [one.name for one in ranking.ranked],
            "predicted": [one.predicted for one in ranking.ranked],
            "seconds": seconds,
            "loading_seconds": loading,
            "clone_seconds": fmean(self._cloned(name, classes[name])[1] for name in timed),
        }

    def ranking(self, workers: int, ray_address: str | None = None) -> Ranking:
        """Rank the zoo."""
        return rank(
            self.zoo,
            self.target.module,
            self.support,
            classes=self.query.classes,
            base_classes=self.target.classes,
            workers=workers,
            ray_address=ray_address,
        )

    def killed(self, way: str) -> Row:
        """Rank the zoo with several workers, one of which is killed."""
        return rank_and_kill(way, self.ranking, victim=self.zoo.names[len(self.zoo) // 2])


def bench(
    zoo: Zoo,
    target: Callable[[str], LoadedModel],
    images: Callable[[str], Images],
    n_cloned: int | None = None,
    ways: Sequence[str] = (PROCESSES,),
    queries: Sequence[Query] = QUERIES,
) -> Bench:
    """Rank the zoo for every query, and clone from its sources.

    Args:
        zoo: The sources.
        target: The targets, by name.
        images: The images of each data set.
        n_cloned: Clone from at least so many sources for each query, and from the chosen one; None for all.
        ways: Kinds of workers of which one is killed.
        queries: The requests.
    """

    @lru_cache(maxsize=1)
    def case(query: Query) -> _Case:
        return _Case(query, zoo, target(query.target), images(query.data))

    def measure(cells: Cells, progress: Progress | None) -> Rows:
        n_each = min(n_cloned or len(zoo), len(zoo))
        total, wanted = len(queries) * (len(zoo) + n_each + 1) + len(ways), list[Row]()

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
            ranking = add(query, RANK, "", partial(of, query, RANK, number))
            for way in ways if number == 0 else ():
                add(query, KILLED, way, partial(of, query, KILLED, way))
            for name in [ranking["order"][0], *_drawn(looks, n_each, seed=number)]:
                given = looks[name]["source_classes"]
                add(query, CLONE, name, partial(of, query, CLONE, name, given))
            others = [row for row in cells.rows if (row["query"], row["part"]) == (query.name, CLONE)]
            wanted += [row for row in others if row not in wanted]  # of an earlier run that drew more
        return wanted

    settings = {"support": "/".join(map(str, SUPPORT)), "seed": 0}

    def facts(rows: Rows) -> Mapping[str, Any]:
        """Without the long lists of class names, which are in the rows on disk."""
        return {**settings, "rows": [{key: row[key] for key in row if key != "source_classes"} for row in rows]}

    return Bench("zoo", KEYS, settings, measure, claims, markdown, facts)


def _tested_on(images: Images, new: Sequence[str], base: Sequence[str]) -> tuple[ImageSet, list[ImageSet]]:
    """Images that neither a network nor the support has: as many as the support, and two equal parts of all others.

    There are few test images of each class, so images that no network was trained on are taken too, if the support
    leaves them. The draw begins with the support.
    """
    n_each = min(N_TEST, *images.unseen.counts().values())
    drawn = draw_images(
        images.unseen, new, base, n_each, n_each, torch.Generator().manual_seed(0)
    )  # begins as supports
    place = torch.arange(len(drawn)) % n_each
    taken = torch.where(drawn.labels < len(base), SUPPORT[1], SUPPORT[0])
    fresh = select(drawn, ((place >= taken) & (place < 2 * taken)).nonzero().flatten())
    rest, test = select(drawn, (place >= 2 * taken).nonzero().flatten()), class_subset(images.test, drawn.classes)
    both = ImageSet(torch.cat([test.images, rest.images]), torch.cat([test.labels, rest.labels]), drawn.classes)
    ordered = [(both.labels == label).nonzero().flatten() for label in range(len(both.classes))]
    return fresh, [select(both, torch.cat([rows[half::2] for rows in ordered])) for half in (0, 1)]


def _drawn(looks: Mapping[str, Row], number: int, seed: int) -> list[str]:
    """Sources to clone from: the best by their look, and others drawn at random."""
    best = sorted(looks, key=lambda name: (-looks[name]["probability"], name))
    top, rest = best[:N_TOP], sorted(best[N_TOP:])
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()
    return [*top, *(rest[index] for index in order)][:number]
