"""Assembles a clone from its pieces, with the recipe that says how it was made."""

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
"""Longest name, in characters, that lists all classes of a clone."""


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
    """Assemble a clone; one argument for each piece.

    Args:
        task: Gives source, target and support.
        adapter: Runs before the part.
        part: The part of the source.
        head: Fitted on the part's features.
        outcome: Held-out result of each image of the support.
        gain_error: Standard error of the correction that `outcome` already contains.
        name: Name of the clone; None makes one from its classes.
        facts: More entries of the recipe, in addition to those of every clone.
    """
    n_macs = adapter.n_macs + sum(info(node).n_macs for node in part.module.graph.nodes)
    base_score, new_score = (_share(outcome.of(base=is_base)) for is_base in (True, False))
    scores = [score for score in (base_score, new_score) if score is not None]
    useful, n_background = usefulness(task), len(task.samples.groups[task.background].unique())
    recipe = {
        "density": part.density,
        "flip": bool(len(task.samples.groups) > int(task.samples.groups.max()) + 1),
        "macs_share": n_macs / task.source.n_macs,
        "n_background_samples": n_background,
        "n_base_samples": n_images(task, base=True) - n_background,
        "n_new_samples": n_images(task, base=False),
        "score": sum(scores) / len(scores),
        "seed": task.seed,
        "standard_error": math.hypot(outcome.average[1], gain_error),
        "n_folds": task.samples.n_folds,
        "source_score": useful.source_score,
        **({"doubts": list(useful.doubts)} if useful.doubts else {}),
        "base_score": base_score,
        "new_score": new_score,
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
        target_features=features_seen(task),
        recipe=recipe,
        source_forward=task.source.forward_print,
        target_forward=task.target.forward_print,
        deltas=part.deltas,
    )


def n_images(task: CloneTask, base: bool) -> int:
    """Count the support's images of base or of new classes."""
    labels, groups = task.samples.labels, task.samples.groups
    return len(groups[(labels < task.n_base) == base].unique())


def _default_name(classes: Sequence[str]) -> str:
    joined = "+".join(classes)
    return joined if len(joined) <= MAX_NAME else f"{classes[0]}+{len(classes) - 1}"


def _share(value: float | None) -> float | None:
    """Clamp a share to [0, 1]: differences of probabilities may leave it slightly outside."""
    return None if value is None else min(1.0, max(0.0, value))
