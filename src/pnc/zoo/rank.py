"""Which source of a zoo to clone from: a quick look at all, and a scan of the few that remain."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from pnc.data.image_set import ImageSet
from pnc.data.image_store import MEMORY
from pnc.data.support import Support, as_support
from pnc.foundation.argument_checks import check_flag, check_whole
from pnc.foundation.errors import InputError, PNCError
from pnc.foundation.file_writing import checked_path
from pnc.foundation.network_state import undisturbed
from pnc.method.positions import scan
from pnc.method.task import Progress, prepare_task
from pnc.method.task_classes import task_classes
from pnc.zoo.known_looks import KnownLooks
from pnc.zoo.looker import Looker, write_question
from pnc.zoo.model_zoo import Zoo
from pnc.zoo.output_names import check_names
from pnc.zoo.processes import ProcessWorker
from pnc.zoo.question import Question, ask
from pnc.zoo.quick_look import Look, look_from
from pnc.zoo.ranking import Ranked, Ranking, predicted
from pnc.zoo.ray_actors import RayWorker, connected, shared
from pnc.zoo.units import Unit, Worker, shared_out

N_FINALISTS = 1
"""Sources that are scanned: a scan takes as long as several looks."""
SCAN_CUTS = 5
"""Cuts of each network that a scan tries, less than half as many as `pnc.clone`, in half the time: accuracy and cost
change little from one to the next."""
FIRST_IMAGES = 200
"""Least images of the first round, which has all sources; each later one has twice as many for half of them."""
MAX_IMAGES = 2_000
"""More images would not separate sources better."""
SOURCES_PER_WORKER = 8
"""Sources that make it worth while to start a process, which takes seconds."""
SCAN = 0
"""Stands for a scan where looks have a number of images."""


@undisturbed()
def rank(
    zoo: Zoo,
    target: nn.Module,
    support: Any,
    *,
    classes: Sequence[str],
    base_classes: Sequence[str],
    names: Mapping[str, str | Sequence[str]] | None = None,
    finalists: int = N_FINALISTS,
    flip: bool = False,
    seed: int = 0,
    memory: int = MEMORY,
    workers: int | None = None,
    ray_address: str | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> Ranking:
    """Rank the sources of a zoo by the accuracy that a clone from each would have; nothing is changed.

    Every source is run over the support once, and a head on both networks' features is fitted and judged on held-out
    images, in closed form; what all sources did with the same images is then judged together (`predicted`). With many
    images there are several rounds: all sources on some images, the better half on twice as many, and so on. For the
    best few, positions are scanned as `pnc.clone` does, but fewer.

    Sources that do not name a requested class are ranked too: the output that answers most to its images stands for it.

    Args:
        zoo: The sources.
        target: The network that will receive the classes, (B, C, H, W) to (B, K). Sources that take other images than
            it does are wrapped in `Preprocessed`.
        support: Labelled images of the requested classes and, better, of base classes, as for `pnc.clone`.
        classes: The requested classes.
        base_classes: Names of the target's outputs, in order.
        names: What sources call requested classes, where it is something else: {"cat": ["tabby", "kitty"]}. No other
            names are matched.
        finalists: Number of sources that are scanned.
        flip: Use mirror images too, as for `pnc.clone`.
        seed: Seed of the folds.
        memory: Bytes of the support's images that may be held.
        workers: Processes that look at sources. 1 is this process; None takes one for each 8 sources, and no more than
            there are cores.
        ray_address: Use Ray instead, with an actor for each core: the address of a cluster, or "local".
        resume: File, .jsonl, that keeps what was found out about each source. A stopped ranking continues, and one with
            the same target, support and request looks only at sources that are new.
        progress: Called with the name of the work, the steps done, and the number of steps.
    Raises:
        InputError, ClassNameError, RecordingError: as `pnc.prepare_task`; InputError also if Ray cannot be used.
        FileFormatError: an entry or `resume` is damaged.

    >>> zoo = pnc.Zoo("networks", create=True)
    >>> _ = zoo.add("pets", pnc.load_model("zoo:cnn", classes=["cat", "dog", "cow"], input_shape=(1, 8, 8)))
    >>> ranking = pnc.rank(zoo, target, support, classes=["cat", "dog"], base_classes=["ant", "bee"])
    >>> ranking.best.name
    'pets'
    """
    started = time.perf_counter()
    if not isinstance(zoo, Zoo):
        raise InputError(f"zoo: expected a pnc.Zoo, got {type(zoo).__name__}; give pnc.Zoo(folder)")
    check_whole(finalists, "finalists", 0)
    check_flag(flip, "flip")
    check_whole(seed, "seed", 0)
    if workers is not None:
        check_whole(workers, "workers", 1)
    own_names = check_names(names or {}, classes)
    known = task_classes(classes, classes, base_classes)
    images = support if isinstance(support, ImageSet | Support) else as_support(support, known.all)
    question, network = ask(
        target,
        images,
        classes,
        base_classes,
        own_names,
        flip=flip,
        seed=seed,
        max_images=MAX_IMAGES,
        memory=memory,
    )
    path = None if resume is None else checked_path(resume, "resume")
    job = _Job(zoo, question, KnownLooks(path, question.digest()), progress)
    with _lookers(job, workers, ray_address) as look:
        order = _looked_at(job, look, max(finalists, 1))
    scanned = []
    for done, one in enumerate(order[:finalists]):
        if progress is not None:
            progress("scanning the best sources", done, min(finalists, len(order)))
        scan_one = partial(_scanned, job, one.look, target, images, base_classes, flip=flip, seed=seed, memory=memory)
        scanned.append(_with_scan(one, job.known_or(one.name, SCAN, scan_one)))
    return Ranking(
        ranked=(*sorted(scanned, key=_place), *order[len(scanned) :]),
        left_out=job.left_out,
        classes=question.classes,
        target_macs=network.n_macs,
        n_images=question.n_images,
        seconds=time.perf_counter() - started,
    )


Look_at = Callable[[Sequence[Unit]], Iterator[tuple[Unit, dict[str, Any]]]]


@dataclass(frozen=True, eq=False)
class _Job:
    """One ranking: what is asked, what is known, and which sources were left out and why."""

    zoo: Zoo
    question: Question
    known: KnownLooks
    progress: Progress | None
    left_out: dict[str, str] = field(default_factory=dict)

    def key(self, name: str, what: int) -> str:
        """Under which a look is kept: a source of other weights is another source."""
        return f"{name} {self.zoo.entry(name).fingerprint} {'scan' if what == SCAN else what}"

    def known_or(self, name: str, what: int, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return facts that are known, or find them and keep them."""
        key = self.key(name, what)
        facts = self.known.get(key)
        if facts is None:
            facts = find()
            self.known.keep(key, facts)
        return facts


def _looked_at(job: _Job, look: Look_at, n_left: int) -> list[Ranked]:
    """Look at all sources, at the better half of them on more images, and so on; returns them in order."""
    remaining = [name for name in job.zoo.names if _is_readable(job, name)]
    ranked: list[Ranked] = []
    eliminated: list[Ranked] = []
    sizes = _sizes(job.question.n_images, len(remaining), n_left)
    for number, n_images in enumerate(sizes):
        found = _round(job, look, [(name, n_images) for name in remaining])
        ranked = sorted((Ranked(*one) for one in zip(found, predicted(found), strict=True)), key=_place)
        n_kept = len(ranked) if number == len(sizes) - 1 else max(n_left, -(-len(ranked) // 2))
        eliminated = ranked[n_kept:] + eliminated
        ranked = ranked[:n_kept]
        remaining = [one.name for one in ranked]
    return ranked + eliminated


def _sizes(n_images: int, n_sources: int, n_left: int) -> list[int]:
    """Number of images in each round; a single round if there are few images or few sources."""
    sizes = [n_images]
    while sizes[0] >= 2 * FIRST_IMAGES and n_sources >> len(sizes) >= n_left:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def _round(job: _Job, look: Look_at, units: Sequence[Unit]) -> list[Look]:
    """Look at all units that are not known yet; those that are refused are left out."""
    found = {unit: job.known.get(job.key(*unit)) for unit in units}
    lacking = sorted((unit for unit, facts in found.items() if facts is None), key=partial(_architecture, job))
    for unit, facts in look(lacking) if lacking else ():
        found[unit] = facts
        job.known.keep(job.key(*unit), facts)
        if job.progress is not None:
            job.progress("looking at sources", sum(facts is not None for facts in found.values()), len(units))
    job.left_out.update({unit[0]: facts["refused"] for unit, facts in found.items() if facts and "refused" in facts})
    return [look_from(facts) for facts in found.values() if facts and "refused" not in facts]


def _architecture(job: _Job, unit: Unit) -> tuple[str, int, str]:
    """Key to sort by, so that sources of one architecture follow each other: they are recorded once."""
    entry = job.zoo.entry(unit[0])
    return entry.spec, len(entry.classes), entry.name


def _is_readable(job: _Job, name: str) -> bool:
    """Whether an entry can be read; if not, its source is left out."""
    try:
        job.zoo.entry(name)
    except PNCError as error:
        job.left_out[name] = str(error)
        return False
    return True


def _place(one: Ranked) -> tuple[float, float, str]:
    """Key to sort by: the predicted accuracy, then the probability of the right class, then the name."""
    return -one.predicted, -one.look.probability, one.name


@contextmanager
def _lookers(job: _Job, workers: int | None, ray_address: str | None) -> Iterator[Look_at]:
    """Start what looks at sources: this process, several, or actors of Ray; units are the same for all of them."""
    n_sources = len(job.zoo)
    with ExitStack() as stack:
        start: Callable[[], Worker]
        if ray_address is not None:
            n_cores = stack.enter_context(connected(ray_address))
            n_workers, start = workers or n_cores, partial(RayWorker, shared(job.question), job.zoo)
        else:
            n_workers = workers or max(1, min(os.cpu_count() or 1, n_sources // SOURCES_PER_WORKER))
            if n_workers == 1:
                looker = Looker(job.zoo, job.question)
                yield lambda units: ((unit, looker.look(unit)) for unit in units)
                return
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_question(folder / "question.safetensors", job.question)
            start = partial(ProcessWorker, folder / "question.safetensors", job.zoo)
        yield lambda units: shared_out(units, start, n_workers)


def _scanned(
    job: _Job,
    look: Look,
    target: nn.Module,
    support: ImageSet | Support,
    base_classes: Sequence[str],
    *,
    flip: bool,
    seed: int,
    memory: int,
) -> dict[str, Any]:
    """Scan positions as `pnc.clone` does, but fewer; returns the look at the one that it would choose, as facts."""
    source = job.zoo.load(look.name, job.question.input_shape).module.to(job.question.device)
    task = prepare_task(
        source,
        target,
        support,
        classes=job.question.classes,
        source_classes=look.source_classes,
        base_classes=base_classes,
        flip=flip,
        seed=seed,
        memory=memory,
    )
    with closing(task):
        found = scan(task, max_cuts=SCAN_CUTS)
    chosen = found.choose()
    likelihoods = found.outcomes[chosen.names]
    return replace(
        look,
        accuracy=chosen.score,
        standard_error=chosen.standard_error,
        probability=replace(likelihoods, values=likelihoods.values.exp()).average[0],
        log_loss=chosen.log_loss,
        n_macs=chosen.n_macs,
        macs_share=chosen.macs_share,
        n_params=chosen.n_params,
        n_images=chosen.n_images,
        position=chosen.names,
    ).facts()


def _with_scan(one: Ranked, facts: Mapping[str, Any]) -> Ranked:
    """The source after its scan: its predicted accuracy changes as the probability of the right class did."""
    look = look_from(facts)
    return Ranked(look, min(1.0, max(0.0, one.predicted + look.probability - one.look.probability)))
