"""The pieces of a clone put together, with the recipe that says how it was made."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pnc.clones.adapter import Adapter, Stitched
from pnc.clones.branch import Branch
from pnc.clones.clone import Clone
from pnc.clones.heads import Head
from pnc.foundation.fingerprints import fingerprint
from pnc.graph.nodes import info
from pnc.method.held_out import Outcome, features_seen
from pnc.method.source_part import SourcePart
from pnc.method.task import CloneTask
from pnc.method.usefulness import usefulness

MAX_NAME = 60
"""Characters up to which a clone is named after all of its classes."""


def assembled(
    task: CloneTask,
    adapter: Adapter,
    part: SourcePart,
    head: Head,
    outcome: Outcome,
    gain_error: float,
    name: str | None,
    facts: Mapping[str, Any],
) -> Clone:
    """Put the pieces together. One argument for each piece.

    Args:
        task: Whose source and target.
        adapter: In front of the part.
        part: Of the source.
        head: Fitted behind them.
        outcome: How each image of the support fares when it is held out.
        gain_error: Standard error of what was taken off in it.
        name: Of the clone; None makes one of its classes.
        facts: For the recipe, beside what every clone says.
    """
    n_macs = adapter.n_macs + sum(info(node).n_macs for node in part.module.graph.nodes)
    average, error = outcome.average
    useful = usefulness(task)
    recipe = {
        "density": part.density,
        "flip": bool(len(task.samples.groups) > int(task.samples.groups.max()) + 1),
        "macs_share": n_macs / task.source.n_macs,
        "n_background_samples": task.n_background,
        "n_base_samples": n_images(task, base=True) - task.n_background,
        "n_new_samples": n_images(task, base=False),
        "score": _share(average),
        "seed": task.seed,
        "standard_error": math.hypot(error, gain_error),
        "n_folds": task.samples.n_folds,
        "source_score": useful.source_score,
        **({"doubts": list(useful.doubts)} if useful.doubts else {}),
        "base_score": _share(outcome.of(base=True)),
        "new_score": _share(outcome.of(base=False)),
        **facts,
    }
    return Clone(
        name=name or _default_name(task.new_classes),
        classes=task.new_classes,
        base_classes=task.target.classes,
        branch=Branch(Stitched(adapter, part.module, task.source.head.features), head).cpu(),
        masks=part.masks,
        source=fingerprint(task.source.model),
        target=fingerprint(task.target.model),
        input_shape=task.target.recording.input_shape,
        source_input_shape=task.source.recording.input_shape,
        target_features=features_seen(task),
        recipe=recipe,
        source_forward=task.source.forward_print,
        target_forward=task.target.forward_print,
        deltas=part.deltas,
    )


def n_images(task: CloneTask, base: bool) -> int:
    """How many images of base or of new classes the support has."""
    labels, groups = task.samples.labels, task.samples.groups
    return len(groups[(labels < task.n_base) == base].unique())


def _default_name(classes: Sequence[str]) -> str:
    joined = "+".join(classes)
    return joined if len(joined) <= MAX_NAME else f"{classes[0]}+{len(classes) - 1}"


def _share(value: float | None) -> float | None:
    """A share, as differences of probabilities may leave it a little below 0 or above 1."""
    return None if value is None else min(1.0, max(0.0, value))
