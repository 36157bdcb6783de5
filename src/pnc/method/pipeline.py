"""The whole job: two networks and a few labelled images in, a clone out."""

import copy
import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from pnc.clones.adapter import Adapter
from pnc.clones.clone import Clone, check_name
from pnc.data.image_store import MEMORY
from pnc.foundation.argument_checks import check_flag
from pnc.foundation.errors import InputError
from pnc.foundation.fingerprints import fingerprint
from pnc.foundation.network_state import undisturbed
from pnc.foundation.process_team import ALONE, Team
from pnc.foundation.resumable_steps import NO_STEPS, Steps, check_steps_path
from pnc.foundation.tensor_bits import value_digests
from pnc.foundation.tensor_files import canonical_json
from pnc.method.adapter_fitting import CrossFitted
from pnc.method.assembly import assembled, n_images
from pnc.method.base_drop_bound import check_promise, least_priority
from pnc.method.density_choice import Candidate, joint_front, smallest_good
from pnc.method.gradients import check_gradient, check_whole_source, uses_gradient, without_gradient
from pnc.method.held_out import (
    Outcome,
    base_drop_facts,
    fit_head,
    judge,
    outcome_of,
    outcome_of_part,
    run_parts,
    source_body,
)
from pnc.method.localization.localizer import localize
from pnc.method.paper_search import search
from pnc.method.part_tuning import tune_part, what_to_tune
from pnc.method.positions import scan
from pnc.method.refinement import refined
from pnc.method.settings import (
    Bounds,
    Effort,
    Method,
    Prefer,
    Removal,
    Strategy,
    Tune,
    check_effort,
    check_strategy,
)
from pnc.method.source_part import SourcePart
from pnc.method.task import CloneTask, Precision, Progress, check_task, prepare_task
from pnc.method.usefulness import check_enough, usefulness

_log = logging.getLogger(__name__)


@undisturbed()
def clone(
    source: nn.Module,
    target: nn.Module,
    support: Any,
    *,
    classes: Sequence[str] | None = None,
    source_classes: Sequence[str],
    base_classes: Sequence[str],
    background: Any = None,
    name: str | None = None,
    density: float | Literal["auto"] = "auto",
    method: Method | None = None,
    tune: Tune | None = None,
    prefer: Prefer = "balanced",
    effort: Effort = "minutes",
    round_to: int = 1,
    max_macs: float | None = None,
    max_bytes: int | None = None,
    max_base_drop: float | None = None,
    strategy: Strategy = "scan",
    refine: bool = False,
    flip: bool = False,
    seed: int = 0,
    batch_size: int = 128,
    memory: int = MEMORY,
    team: Team = ALONE,
    precision: Precision = "float32",
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> Clone:
    """Clone classes of the source for the target; both networks are left unchanged.

    Scans positions in closed form, cuts out the part of the source that is worth its cost, tunes it on views of the
    support, and fits the head.

    Args:
        source: Classifier that knows the classes, (B, C, H, W) to (B, K).
        target: Classifier that will receive them.
        support: A few labelled images that both networks can process: a pair (images, labels), a Dataset, a DataLoader
            or an ImageSet. Labels are class names, or ids that count the base classes first, then the new ones. Samples
            of base classes are optional; even of some base classes only, they help separate new classes from old ones.
        source_classes: Names of the source's outputs, in order.
        base_classes: Names of the target's outputs, in order.
        classes: Names of the classes to clone; None clones all of the source's that the target lacks. The support must
            have images of these and of base classes only.
        background: Unlabelled images that the target is used on, with few or no new classes among them: a tensor
            (N, C, H, W) or an ImageSet. They serve as base samples, labelled with the target's predictions.
        flip: Use the mirror image of each sample too: good for photographs, wrong for digits.
        density: Share of the prunable multiply-accumulates of the source's part to keep, in (0, 1]. "auto" chooses it
            together with the position, as `prefer` says; with `effort="seconds"` it means 1.
        prefer: Accuracy that an automatic density may give up for lower cost: "accuracy" none, "balanced" about half a
            point, "small" about two.
        effort: "minutes", or "seconds" for closed form only, without training by gradient.
        max_macs: Bound on the added MACs as a share of the source's.
        max_base_drop: Bound on the accuracy that base images may lose, in (0, 1), such as 0.02: the new logits are
            lowered until held-out base images keep it, which takes 1 / max_base_drop - 1 of them, 49 for 0.02. None
            counts base and new images as equally likely.

    Other Parameters:
        name: Name of the clone; None makes one from its classes.
        method: How channels are chosen below density 1: "gates", learned by gradient; the one-shot scores "taylor",
            "magnitude" and "random"; or "local-surrogate", the paper's rule as we read it. None means "taylor", or
            "gates" if only norms are tuned.
        tune: What is tuned below density 1, by distillation from the source: the part's "weights", "low-rank" changes
            of them (a third of the file), only the scales and shifts of BatchNorm "norms", or "none". None means the
            weights, or what fits `max_bytes`. At density 1 the part is tuned only if this is given, and only behind a
            fitted adapter.
        round_to: Below density 1, keep channels in multiples of this number, which may keep less than `density` allows:
            on many processors 9 to 16 channels take as long as 16.
        max_bytes: Bound on the size of the thin file.
        strategy: How the position is found. "sequential" is the paper's search by gradient, for comparison; it supports
            no bounds and takes minutes.
        refine: Tune the adapter by gradient, and keep the result if held-out images gain; takes minutes.
        seed: Seed of every random choice; the same inputs and seed give the same clone.
        batch_size: Images that go through a network at a time.
        memory: Bytes of the support that may be held at a time, without those of a batch. Images from a Dataset or a
            DataLoader beyond half of it go to a temporary file; see docs/scale.md.
        team: The processes that make the clone together, each called with the same arguments; from `pnc.joined`.
        precision: Precision in which both networks run while the clone is made: "bfloat16" is faster on GPUs. Sums and
            solutions are float32 or more, and so is the composite.
        resume: File, .safetensors, that stores the results of long steps (localization, tuning, refinement) while the
            call runs: the same call, made again after the process was killed, continues from them and returns the same
            clone. A file of other arguments is replaced. The scan and the sequential strategy are repeated.
        progress: Called with the name of the work, the steps done, and the number of steps.
    Raises:
        InputError, ClassNameError, RecordingError: as in `prepare_task`; InputError also if no position is within the
            bounds, `density` is out of range, or `resume` is another kind of file.
        FileFormatError: `resume` is damaged.

    >>> made = pnc.clone(source, target, support, effort="seconds", **names)
    >>> made.classes
    ('cat', 'dog')
    >>> pnc.attach(target, made).classes
    ('ant', 'bee', 'cat', 'dog')
    """
    removal, bounds = Removal(density, method, round_to, tune), Bounds(max_macs, max_bytes, max_base_drop)
    check_flag(refine, "refine")
    check_strategy(strategy, bounds, refine)
    removal = check_effort(effort, prefer, removal, refine, strategy)
    _check_others(name, resume, progress)
    task = prepare_task(
        source,
        target,
        support,
        classes=classes,
        source_classes=source_classes,
        base_classes=base_classes,
        background=background,
        flip=flip,
        seed=seed,
        batch_size=batch_size,
        memory=memory,
        team=team,
        precision=precision,
    )
    with closing(task):
        if max_base_drop is not None:
            check_promise(max_base_drop, n_images(task, base=True))
        check_enough(task, removal.density, strategy)
        usefulness(task)  # warns before the work
        removal = without_gradient(task, removal)
        check_whole_source(task, uses_gradient(removal, refine, strategy == "sequential"))
        if strategy == "sequential":
            return fit_sequential(
                task,
                density=removal.fixed_density,
                method=method or "gates",
                round_to=round_to,
                name=name,
                progress=progress,
            )
        steps = NO_STEPS
        if resume is not None:
            cost = {"max_macs": max_macs, "max_bytes": max_bytes}
            settings = {**vars(removal), **cost}
            steps = Steps(Path(resume), _identity(task, settings), team)
        _log.info("scanning positions")
        found = scan(task, progress=progress)
        fit_one = partial(
            fit_and_judge,
            task,
            max_bytes=max_bytes,
            max_base_drop=max_base_drop,
            refine=refine,
            name=name,
            steps=steps,
            progress=progress,
        )
        if removal.density == "auto":
            front = joint_front(task, found, max_macs, max_bytes)

            def make(one: Candidate) -> tuple[Clone, Outcome]:
                return fit_one(found.adapter(one.position), replace(removal, density=one.density))

            chosen = smallest_good(front, prefer, make)
        else:
            chosen, _ = fit_one(found.adapter(found.choose(max_macs, max_bytes)), removal)
        steps.finish()
        _log.info("%s: held-out score %.3f", chosen.name, chosen.recipe["score"])
        return chosen


def _check_others(name: str | None, resume: str | Path | None, progress: Progress | None) -> None:
    """Check the arguments that are used only after the work."""
    check_name(name)
    if resume is not None:
        check_steps_path(resume)
    if progress is not None and not callable(progress):
        raise InputError(f"progress: expected a function of (what, done, total) or None; got {type(progress).__name__}")


@undisturbed()
def fit(
    task: CloneTask,
    fitted: CrossFitted,
    *,
    density: float = 1.0,
    method: Method | None = None,
    tune: Tune | None = None,
    round_to: int = 1,
    max_bytes: int | None = None,
    max_base_drop: float | None = None,
    refine: bool = False,
    name: str | None = None,
    steps: Steps = NO_STEPS,
    progress: Progress | None = None,
) -> Clone:
    """Make a clone at one position: localize, tune, fit the head; the steps of `clone` after the scan.

    Args:
        task: From `prepare_task`.
        fitted: The adapters of a position, from `scan`: `found.adapter(found.choose())`.
        density: As in `clone`.
        method: As in `clone`.
        tune: As in `clone`.
        round_to: As in `clone`.
        max_bytes: As in `clone`.
        max_base_drop: As in `clone`.
        refine: As in `clone`.
        name: As in `clone`.
        steps: Stores the results of long steps, so that a stopped job can continue.
        progress: As in `clone`.
    Raises:
        InputError: an argument is out of range, or `fitted` is not from a scan.

    >>> task = pnc.prepare_task(source, target, support, classes=["cat", "dog"], **names)
    >>> found = pnc.scan(task)
    >>> pnc.fit(task, found.adapter(found.choose()), name="pets").name
    'pets'
    """
    removal = Removal(density, method, round_to, tune)
    Bounds(None, max_bytes, max_base_drop)
    check_flag(refine, "refine")
    check_effort("minutes", "balanced", removal, refine, "scan")
    _check_others(name, None, progress)
    check_task(task)
    check_enough(task, removal.density, "scan")
    if not isinstance(fitted, CrossFitted):
        raise InputError(f"fitted: expected adapters, found.adapter(position) of a scan; got {type(fitted).__name__}")
    if max_base_drop is not None:
        check_promise(max_base_drop, n_images(task, base=True))
    usefulness(task)
    removal = without_gradient(task, replace(removal, density=removal.fixed_density))
    check_gradient(task, fitted.adapter.source_cut, uses_gradient(removal, refine))
    return fit_and_judge(
        task, fitted, removal, max_bytes, max_base_drop, refine=refine, name=name, steps=steps, progress=progress
    )[0]


def fit_and_judge(
    task: CloneTask,
    fitted: CrossFitted,
    removal: Removal,
    max_bytes: int | None,
    max_base_drop: float | None,
    *,
    refine: bool,
    name: str | None,
    steps: Steps,
    progress: Progress | None,
) -> tuple[Clone, Outcome]:
    """As `fit`, with checked arguments; also return the held-out result of each image of the support."""
    density, tune, norms = removal.fixed_density, removal.tune, removal.tune == "norms"
    method = removal.method or ("gates" if norms else "taylor")
    steps = steps.at(f"{fitted.adapter.target_cut.name} > {fitted.adapter.source_cut.name} at {density}")
    where = fitted.adapter.target_cut.name, fitted.adapter.source_cut.name
    _log.info("making a clone from %s to %s at density %s", *where, density)
    part = localize(
        task, fitted.adapter, density, method, norms=norms, round_to=removal.round_to, steps=steps, progress=progress
    )
    facts: dict[str, Any] = {"adapter_error": fitted.error, "method": None if part.masks is None else method}
    scored = closed = fitted
    if refine:
        found = refined(task, fitted, part.module, steps, progress)
        fitted = scored = found.fitted
        facts["refine"] = {"gain": found.gain, "steps": found.n_steps}
    elif is_tuned := what_to_tune(task, fitted.adapter, part, tune, max_bytes):
        done = tune_part(task, fitted, part, is_tuned, steps, progress)
        part, fitted, scored = done.part, done.fitted, done.scored
        facts["tune"] = is_tuned
    elif norms and part.masks is not None:
        facts["tune"] = "norms"
    seen = task.within(16 * (task.source.head.features.n_channels + task.target.head.features.n_channels), share=0.5)
    known = closed.samples if len(seen.samples.labels) == len(task.samples.labels) else None
    if known is not None and part.masks is None and fitted is closed:
        samples = known
    else:
        (samples,) = run_parts(seen, [(fitted, part.module)], progress)
    judged, others = judge(samples), []
    if part.held_out is not None:
        whole = closed, source_body(task, fitted.adapter.source_cut)
        behind = run_parts(seen, [(scored, part.held_out), *([whole] if known is None else [])], progress)
        others = [judge(one) for one in (behind[0], known or behind[1])]
    if max_base_drop is not None:
        nats = least_priority(judged.logits, samples.labels, seen.samples.groups, task.n_base, max_base_drop)
        judged, *others = (one.lowered(nats) for one in (judged, *others))
        facts |= {"base_priority": nats, "max_base_drop": max_base_drop}
    outcome, gain_error = outcome_of(judged.correct, seen), 0.0
    if others:
        outcome, gain_error = outcome_of_part(judged, others[0], others[1], seen)
    head = fit_head(task, samples, judged)
    facts |= base_drop_facts(samples, judged, seen)
    adapter = copy.deepcopy(fitted.adapter)
    return assembled(task, adapter, part, head, outcome, gain_error, name, facts), outcome


@undisturbed()
def fit_sequential(
    task: CloneTask,
    *,
    density: float = 1.0,
    method: Method = "gates",
    round_to: int = 1,
    name: str | None = None,
    progress: Progress | None = None,
) -> Clone:
    """Make a clone with the paper's search: `strategy="sequential"` of `clone`.

    Args:
        task: From `prepare_task`.
        density: As in `clone`.
        method: As in `clone`.
        round_to: As in `clone`.
        name: As in `clone`.
        progress: As in `clone`.
    Raises:
        InputError: an argument is out of range.
    """
    removal = Removal(density, method, round_to)
    density = removal.fixed_density
    _check_others(name, None, progress)
    check_task(task)
    usefulness(task)
    check_whole_source(task, uses_gradient(removal, refine=False, sequential=True))

    def part_of(adapter: Adapter) -> SourcePart:
        return localize(task, adapter, density, method, norms=method == "gates", hold_out=False, round_to=round_to)

    found = search(task, part_of, progress)
    facts = {
        "learning_rate": found.learning_rate,
        "method": None if found.part.masks is None else method,
        "strategy": "sequential",
    }
    return assembled(task, found.adapter, found.part, found.head, found.outcome, 0.0, name, facts)


def _identity(task: CloneTask, settings: Mapping[str, Any]) -> str:
    """Hash (hex) of everything that the results of long steps depend on, except their position."""
    samples = task.samples
    images = (value_digests([samples.images[rows]]) for _, rows in samples.rows(1000))
    networks = [[*one.classes, fingerprint(one.model).weights] for one in (task.source, task.target)]
    own = value_digests([samples.labels, samples.groups, samples.folds])
    setting = [task.new_classes, task.seed, task.batch_size, task.memory, task.team.size, task.precision, settings]
    facts = [networks, [*images], own, setting]
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()
