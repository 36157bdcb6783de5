"""One clone at one position: cut out its part, tune it or the adapter, judge it on held-out images, fit the head."""

import copy
import logging
from dataclasses import dataclass
from typing import Any

from torch import nn

from pnc.clones.clone import Clone
from pnc.foundation.resumable_steps import NO_STEPS, Steps
from pnc.method.adapter_fitting import CrossFitted
from pnc.method.assembly import assembled
from pnc.method.base_drop_bound import least_priority
from pnc.method.head_fitting import HeadSamples
from pnc.method.held_out import (
    Judged,
    Outcome,
    base_drop_facts,
    fit_head,
    judge,
    outcome_of_part,
    run_parts,
    score_of,
    source_body,
)
from pnc.method.localization.localizer import localize
from pnc.method.localization.norms import batch_norms
from pnc.method.part_tuning import tune_part, what_to_tune
from pnc.method.refinement import refined
from pnc.method.settings import Removal
from pnc.method.source_part import SourcePart
from pnc.method.task import CloneTask, Progress

_log = logging.getLogger(__name__)


def head_images(task: CloneTask) -> CloneTask:
    """Return the task with as many images as memory allows for fitting heads."""
    return task.within(16 * (task.source.head.features.n_channels + task.target.head.features.n_channels), share=0.5)


@dataclass(frozen=True, eq=False)
class _Trained:
    """A part and its adapter after training by gradient, if there was any.

    Attributes:
        part: The part that the clone will have.
        fitted: The adapter before it.
        scored: The adapter before `part.held_out`, which was trained without the fold that scores the clone.
        facts: What the recipe says about it.
    """

    part: SourcePart
    fitted: CrossFitted
    scored: CrossFitted
    facts: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Maker:
    """Makes clones of one task at positions of its scan.

    Attributes:
        task: From `prepare_task`; all arguments are checked.
        max_bytes: Bound on the thin file, for what is tuned by default.
        max_base_drop: Bound on the accuracy that base images may lose.
        refine: Whether the adapter is tuned by gradient.
        name: Name of the clones; None makes one from the classes.
        steps: Stores the results of long steps, so that a stopped job can continue.
        progress: Called with the name of the work, the steps done, and the number of steps.
    """

    task: CloneTask
    max_bytes: int | None = None
    max_base_drop: float | None = None
    refine: bool = False
    name: str | None = None
    steps: Steps = NO_STEPS
    progress: Progress | None = None

    def make(self, fitted: CrossFitted, removal: Removal) -> tuple[Clone, Outcome]:
        """Make a clone; also return the held-out result of each image of the support.

        Args:
            fitted: The adapters of a position.
            removal: What is removed and tuned, with a fixed density.
        """
        task, density = self.task, removal.fixed_density
        norms = removal.tune == "norms"
        method = removal.method or ("gates" if norms else "taylor")
        where = fitted.adapter.target_cut.name, fitted.adapter.source_cut.name
        steps = self.steps.at(f"{where[0]} > {where[1]} at {density}")
        _log.info("making a clone from %s to %s at density %s", *where, density)
        cut_out = localize(
            task,
            fitted.adapter,
            density,
            method,
            norms=norms,
            round_to=removal.round_to,
            steps=steps,
            progress=self.progress,
        )
        made = self._trained(fitted, cut_out, removal, steps)
        facts = {"adapter_error": fitted.error, "method": None if cut_out.masks is None else method, **made.facts}
        seen = head_images(task)
        samples, judged, others = self._judged(seen, fitted, made)
        if self.max_base_drop is not None:
            labels, groups = samples.labels, seen.samples.groups
            nats = least_priority(judged.logits, labels, groups, task.n_base, self.max_base_drop)
            judged, *others = (one.lowered(nats) for one in (judged, *others))
            facts |= {"base_priority": nats, "max_base_drop": self.max_base_drop}
        outcome, gain_error = score_of(judged.correct, seen), 0.0
        if others:
            outcome, gain_error = outcome_of_part(judged, others[0], others[1], seen)
        head = fit_head(task, samples, judged)
        facts |= base_drop_facts(samples, judged, seen)
        adapter = copy.deepcopy(made.fitted.adapter)
        return assembled(task, adapter, made.part, head, outcome, gain_error, self.name, facts), outcome

    def _judged(self, task: CloneTask, fitted: CrossFitted, made: _Trained) -> tuple[HeadSamples, Judged, list[Judged]]:
        """Judge the heads behind a part.

        A part that imitates the source from its input on, with all its classes, has nearly the source's own features.
        Its heads are fitted on the source's, since its own are closer to these on the images that it was tuned on than
        on others.

        Returns:
            The samples that its head is fitted on; the part; and if some fold scores it, the part made without this
            fold, and the whole source.
        """
        part = made.part
        imitates = part.deltas is not None and fitted.adapter.is_identity and task.clones_all
        runs: dict[str, tuple[CrossFitted, nn.Module]] = {}
        if part.masks is not None or made.fitted is not fitted:
            runs["part"] = made.fitted, part.module
        if part.held_out is not None:
            runs["unseen"] = made.scored, part.held_out
        found = {}
        if fitted.samples is not None and len(fitted.samples.labels) == len(task.samples.labels):
            found["whole"] = fitted.samples
        else:
            runs["whole"] = fitted, source_body(self.task, fitted.adapter.source_cut)
        if runs:
            found |= dict(zip(runs, run_parts(task, list(runs.values()), self.progress), strict=True))
        own = found.get("part", found["whole"])
        if "unseen" not in found and not imitates:
            return own, judge(own), []
        whole = judge(found["whole"])
        part_heads = whole.on if imitates else judge
        others = [part_heads(found["unseen"]), whole] if "unseen" in found else []
        return found["whole"] if imitates else own, part_heads(own), others

    def _trained(self, fitted: CrossFitted, part: SourcePart, removal: Removal, steps: Steps) -> _Trained:
        """Tune the adapter or the part by gradient, as asked for."""
        task = self.task
        is_tuned = what_to_tune(task, fitted.adapter, part, removal.tune, self.max_bytes)
        if self.refine:
            found = refined(task, fitted, part.module, steps, self.progress)
            facts = {"refine": {"gain": found.gain, "steps": found.n_steps}}
            return _Trained(part, found.fitted, found.fitted, facts)
        if is_tuned:
            done = tune_part(task, fitted, part, is_tuned, steps, self.progress)
            return _Trained(done.part, done.fitted, done.scored, {"tune": is_tuned})
        is_norms = removal.tune == "norms" and part.masks is not None and bool(batch_norms(part.module))
        return _Trained(part, fitted, fitted, {"tune": "norms"} if is_norms else {})
