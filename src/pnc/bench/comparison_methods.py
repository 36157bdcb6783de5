"""Methods, groups of classes and networks of the comparison."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from pnc.bench.main_job import CLONE
from pnc.bench.rivals import (
    clone_variants,
    derpp,
    ensemble,
    ewc,
    finetuning,
    icarl,
    joint_training,
    lda,
    linear_probe,
    lora,
    lwf,
    nearest_mean,
    stacked_features,
    tempered,
)
from pnc.bench.rivals.rival import Budget, Fitted, Rival
from pnc.composite.composite import attach
from pnc.data.image_set import ImageSet, class_subset
from pnc.foundation.class_names import listed, parse_classes, unknown_name
from pnc.foundation.errors import InputError
from pnc.foundation.tensor_files import canonical_json
from pnc.method.pipeline import fit
from pnc.method.positions import scan
from pnc.method.task import CloneTask
from pnc.models.model_specs import LoadedModel
from pnc.models.pretraining import EpochReport, Recipe, pretrain


def _clone(task: CloneTask, budget: Budget, max_base_drop: float | None = None, density: float = 1.0) -> Fitted:
    """A clone in closed form, without removed channels; with a bound on the loss of base accuracy, or a tuned part."""
    found = scan(task)
    clone = fit(task, found.adapter(found.choose()), density=density, max_base_drop=max_base_drop)
    place = {"target_cut": clone.target_cut.name, "source_cut": clone.source_cut.name}
    facts = {key: clone.recipe[key] for key in ("base_priority",) if key in clone.recipe}
    return Fitted(attach(task.target.model, clone), {**place, "held_out_score": clone.recipe["score"], **facts})


BOUNDED = f"{CLONE} (base drop <= 2 points)"
HALF = f"{CLONE} of half the source"
METHODS: Mapping[str, Rival] = {
    rival.name: rival
    for rival in (
        Rival(CLONE, "clone", _clone),
        Rival(HALF, "clone", partial(_clone, density=0.5)),
        Rival(BOUNDED, "clone", partial(_clone, max_base_drop=0.02)),
        *clone_variants.RIVALS,
        ensemble.RIVAL,
        tempered.RIVAL,
        *stacked_features.RIVALS,
        lda.ON_TARGET,
        lda.ON_SOURCE,
        linear_probe.ON_TARGET,
        linear_probe.ON_SOURCE,
        nearest_mean.RIVAL,
        *finetuning.RIVALS,
        lwf.RIVAL,
        ewc.RIVAL,
        derpp.RIVAL,
        icarl.RIVAL,
        lora.RIVAL,
        joint_training.RIVAL,
    )
}
OURS = (CLONE, HALF, BOUNDED)
SLOW = (joint_training.RIVAL.name,)
"""Methods that are compared only if they are named."""

GROUPS = ("all", "single", "fifth")


def choose_methods(text: str | None) -> list[str]:
    """Read names of methods, separated by commas; None gives all except the slow ones.

    "rivals" stands for all except the slow ones and the clone in both forms.

    Raises:
        InputError: a name is unknown.
    """
    usual = [name for name in METHODS if name not in SLOW]
    if text is None:
        return usual
    chosen: list[str] = []
    for name in (part.strip() for part in text.split(",") if part.strip()):
        if name != "rivals" and name not in METHODS:
            raise InputError(f"methods: {unknown_name(name, list(METHODS), 'method')}")
        chosen += [one for one in usual if one not in OURS] if name == "rivals" else [name]
    if not chosen:
        raise InputError(f"methods: give at least one of {listed(list(METHODS), len(METHODS))}")
    return list(dict.fromkeys(chosen))


def class_groups(text: str, new: Sequence[str], seed: int) -> list[tuple[str, ...]]:
    """Groups of classes, one cell each.

    Args:
        text: "all"; "single", one cell for each class; "fifth", a fifth of the classes, at least one, different for
            each seed; or names, as `parse_classes` reads them.
        new: The source's classes that the target lacks.
        seed: Of the cell.
    """
    if text == "all":
        return [tuple(new)]
    if text == "single":
        return [(name,) for name in new]
    if text == "fifth":
        number = max(1, len(new) // 5)
        chosen = {(seed * number + place) % len(new) for place in range(number)}
        return [tuple(name for place, name in enumerate(new) if place in chosen)]
    return [parse_classes(text, new)]


def trained_network(
    spec: str,
    classes: Sequence[str],
    images: tuple[ImageSet, ImageSet],
    recipe: Recipe,
    folder: Path,
    progress: Callable[[EpochReport], None] | None = None,
) -> LoadedModel:
    """Train a network of a spec on some classes, unless that was done before.

    Args:
        spec: As for `pretrain`.
        classes: Its outputs.
        images: For training and for testing.
        recipe: How it is trained.
        folder: Keeps networks in files named by a digest of their settings; created if it is missing.
        progress: Called after every epoch.
    """
    train, test = (class_subset(data, classes) for data in images)
    facts = {"spec": spec, "classes": list(classes), "recipe": recipe.facts(), "images": _digest(train)}
    name = hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return pretrain(spec, train, test, recipe, folder / f"{name}.safetensors", progress)


def _digest(data: ImageSet) -> str:
    digest = hashlib.sha256(data.labels.numpy().tobytes())
    for chunk in data.images.split(1000):
        digest.update(chunk.contiguous().numpy().tobytes())
    return digest.hexdigest()
