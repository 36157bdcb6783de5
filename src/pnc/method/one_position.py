"""One clone at one position: cut out its part, tune it or the adapter, judge it on held-out images, fit the head."""

import copy
import logging
from dataclasses import dataclass
from typing import Any

from pnc.clones.clone import Clone
from pnc.foundation.resumable_steps import NO_STEPS, Steps
from pnc.method.adapter_fitting import CrossFitted
from pnc.method.assembly import assembled
from pnc.method.base_drop_bound import least_priority
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
from pnc.method.part_tuning import tune_part, what_to_tune
from pnc.method.refinement import refined
from pnc.method.settings import Removal
from pnc.method.source_part import SourcePart
from pnc.method.task import CloneTask, Progress

_log = logging.getLogger(__name__)


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
        # Heads are fitted on as many samples as memory allows; the scan may have run the same ones.
        seen = task.within(
            16 * (task.source.head.features.n_channels + task.target.head.features.n_channels), share=0.5
        )
        scanned = fitted.samples if len(seen.samples.labels) == len(task.samples.labels) else None
        if scanned is not None and made.part.masks is None and made.fitted is fitted:
            samples = scanned
        else:
            (samples,) = run_parts(seen, [(made.fitted, made.part.module)], self.progress)
        judged, others = judge(samples), []
        if made.part.held_out is not None:
            whole = fitted, source_body(task, fitted.adapter.source_cut)
            wanted = [(made.scored, made.part.held_out), *([whole] if scanned is None else [])]
            behind = run_parts(seen, wanted, self.progress)
            others = [judge(one) for one in (behind[0], scanned or behind[1])]
        if self.max_base_drop is not None:
            labels, groups = samples.labels, seen.samples.groups
            nats = least_priority(judged.logits, labels, groups, task.n_base, self.max_base_drop)
            judged, *others = (one.lowered(nats) for one in (judged, *others))
            facts |= {"base_priority": nats, "max_base_drop": self.max_base_drop}
        outcome, gain_error = outcome_of(judged.correct, seen), 0.0
        if others:
            outcome, gain_error = outcome_of_part(judged, others[0], others[1], seen)
        head = fit_head(task, samples, judged)
        facts |= base_drop_facts(samples, judged, seen)
        adapter = copy.deepcopy(made.fitted.adapter)
        return assembled(task, adapter, made.part, head, outcome, gain_error, self.name, facts), outcome

    def _trained(self, fitted: CrossFitted, part: SourcePart, removal: Removal, steps: Steps) -> _Trained:
        """Tune the adapter or the part by gradient, as asked for."""
        task = self.task
        if self.refine:
            found = refined(task, fitted, part.module, steps, self.progress)
            facts = {"refine": {"gain": found.gain, "steps": found.n_steps}}
            return _Trained(part, found.fitted, found.fitted, facts)
        if is_tuned := what_to_tune(task, fitted.adapter, part, removal.tune, self.max_bytes):
            done = tune_part(task, fitted, part, is_tuned, steps, self.progress)
            return _Trained(done.part, done.fitted, done.scored, {"tune": is_tuned})
        is_norms = removal.tune == "norms" and part.masks is not None
        return _Trained(part, fitted, fitted, {"tune": "norms"} if is_norms else {})
