"""The whole job: two networks and a few labelled images in, a clone out."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from pnc.clones.clone import Clone
from pnc.data.image_store import MEMORY
from pnc.foundation.argument_checks import check_flag
from pnc.foundation.errors import InputError
from pnc.foundation.fingerprints import fingerprint
from pnc.foundation.network_state import undisturbed
from pnc.foundation.process_team import ALONE, Team
from pnc.foundation.resumable_steps import NO_STEPS, Steps
from pnc.foundation.tensor_bits import value_digests
from pnc.foundation.tensor_files import canonical_json
from pnc.method.adapter_fitting import CrossFitted
from pnc.method.assembly import n_images
from pnc.method.base_drop_bound import check_promise
from pnc.method.density_choice import Candidate, at_density, joint_front, smallest_good
from pnc.method.gradients import check_gradient, check_whole_source, uses_gradient, without_gradient
from pnc.method.held_out import Outcome
from pnc.method.one_position import Maker, head_images
from pnc.method.paper_search import fit_sequential
from pnc.method.positions import scan
from pnc.method.settings import (
    Bounds,
    Effort,
    Method,
    Prefer,
    Removal,
    Strategy,
    Tune,
    check_effort,
    check_outputs,
    check_strategy,
)
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
        support: A few labelled images that both networks can process: a pair (images, labels), a list of pairs (image,
            label), a Dataset, a DataLoader or an ImageSet. Labels are class names, or ids that count the base classes
            first, then the new ones. Samples of base classes are optional; even of some base classes only, they help
            separate new classes from old ones.
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
            point, "small" about two. With a fixed density or `effort="seconds"` only the default is taken.
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
    check_outputs(name, resume, progress)
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
        removal = _checked(task, removal, max_base_drop, strategy)
        check_whole_source(task, uses_gradient(removal, refine, strategy == "sequential"))
        usefulness(task)  # warns before the work
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
            settings = {**vars(removal), "max_macs": max_macs, "max_bytes": max_bytes}
            steps = Steps(Path(resume), _identity(task, settings), team)
        maker = Maker(task, max_bytes, max_base_drop, refine, name, steps, progress)
        try:
            chosen = _scan_and_choose(maker, removal, prefer, max_macs)
        except InputError:
            steps.finish()  # with these arguments no later run continues
            raise
        steps.finish()
        _log.info("%s: held-out score %.3f", chosen.name, chosen.recipe["score"])
        return chosen


def _checked(task: CloneTask, removal: Removal, max_base_drop: float | None, strategy: Strategy = "scan") -> Removal:
    """Refuse what this task has too few images for; without a gradient, return the removal that needs none."""
    if max_base_drop is not None:
        check_promise(max_base_drop, n_images(task, base=True), n_images(head_images(task), base=True))
    check_enough(task, removal.density, strategy)
    return without_gradient(task, removal)


def _scan_and_choose(maker: Maker, removal: Removal, prefer: Prefer, max_macs: float | None) -> Clone:
    """Make the clone that is worth its cost, over all positions, and densities if `removal` leaves them open."""
    _log.info("scanning positions")
    found = scan(maker.task, progress=maker.progress)
    if removal.density != "auto":
        if removal.density < 1:
            found, max_macs = at_density(maker.task, found, removal.density, max_macs), None
        return maker.make(found.adapter(found.choose(max_macs, maker.max_bytes)), removal)[0]

    def make(one: Candidate) -> tuple[Clone, Outcome]:
        return maker.make(found.adapter(one.position), replace(removal, density=one.density))

    tunes = removal.tune not in ("norms", "none") and maker.max_bytes is None
    return smallest_good(joint_front(maker.task, found, max_macs, maker.max_bytes, tunes=tunes), prefer, make)


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
        InputError: an argument is out of range, or `fitted` is not from a scan of this task.

    >>> task = pnc.prepare_task(source, target, support, classes=["cat", "dog"], **names)
    >>> found = pnc.scan(task)
    >>> pnc.fit(task, found.adapter(found.choose()), name="pets").name
    'pets'
    """
    removal = Removal(density, method, round_to, tune)
    Bounds(None, max_bytes, max_base_drop)
    check_flag(refine, "refine")
    check_effort("minutes", "balanced", removal, refine, "scan")
    check_outputs(name, None, progress)
    check_task(task)
    if not isinstance(fitted, CrossFitted):
        raise InputError(f"fitted: expected adapters, found.adapter(position) of a scan; got {type(fitted).__name__}")
    if fitted.task_key is not task.key:
        raise InputError("fitted: these adapters are from the scan of another task; scan this one: pnc.scan(task)")
    removal = _checked(task, replace(removal, density=removal.fixed_density), max_base_drop)
    usefulness(task)
    check_gradient(task, fitted.adapter.source_cut, uses_gradient(removal, refine))
    maker = Maker(task, max_bytes, max_base_drop, refine, name, steps, progress)
    return maker.make(fitted, removal)[0]


def _identity(task: CloneTask, settings: Mapping[str, Any]) -> str:
    """Hash (hex) of everything that the results of long steps depend on, except their position."""
    samples = task.samples
    images = (value_digests([samples.images[rows]]) for _, rows in samples.rows(1000))
    networks = [[*one.classes, fingerprint(one.model).weights] for one in (task.source, task.target)]
    own = value_digests([samples.labels, samples.groups, samples.folds])
    setting = [task.new_classes, task.seed, task.batch_size, task.memory, task.team.size, task.precision, settings]
    facts = [networks, [*images], own, setting]
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()
