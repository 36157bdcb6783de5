"""Evaluation of a composite on labelled images: what `pnc eval` shows."""

import dataclasses
import textwrap
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pnc.composite.batched_logits import Progress, logits_of
from pnc.composite.composite import Composite, check_composite
from pnc.composite.forward_plan import Plan
from pnc.composite.metrics import measure_logits
from pnc.data.image_set import ImageSet
from pnc.data.support import as_support
from pnc.foundation.argument_checks import check_whole
from pnc.foundation.class_names import listed
from pnc.foundation.errors import InputError

_COLUMNS = 80


@dataclass(frozen=True)
class EvaluationReport:
    """The result of `evaluate`; printed, it fits on one screen.

    The measures `base_accuracy` to `base_drop` are those of `LogitMeasures`.

    Attributes:
        clones: The enabled clones, in the order of their logits.
        classes: Names of all logits.
        classes_without_images: Classes without images, about which nothing was measured.
        n_images: Number of images.
        n_ignored: Number of further images, of classes that the composite lacks.
        base_accuracy: Accuracy on images of base classes.
        new_accuracy: Accuracy on images of new classes.
        average_accuracy: Mean of both.
        conditional_kl: Locality among the base classes, in nats.
        leak: Mean probability of the new classes on base images.
        locality_kl: Locality over all classes, in nats.
        base_drop: Accuracy that base images lost.
        base_logits_equal: Whether the base logits equal the target's own, bit for bit, on all these images.
        uncalibrated: Enabled clones that were never calibrated together; empty if there is only one clone.
    """

    clones: tuple[str, ...]
    classes: tuple[str, ...]
    classes_without_images: tuple[str, ...]
    n_images: int
    n_ignored: int
    base_accuracy: float
    new_accuracy: float
    average_accuracy: float
    conditional_kl: float
    leak: float
    locality_kl: float
    base_drop: float
    base_logits_equal: bool
    uncalibrated: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}

    def __str__(self) -> str:
        facts = {key.replace("_", " "): _shown(value) for key, value in self.facts().items()}
        width = max(map(len, facts)) + 2
        lines = [
            "\n".join(
                textwrap.wrap(
                    f"{name:{width}}{value}",
                    _COLUMNS,
                    subsequent_indent=" " * width,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )
            for name, value in facts.items()
        ]
        warning = uncalibrated_warning(self.uncalibrated)
        return "\n".join([*lines, *textwrap.wrap(warning, _COLUMNS)])


@dataclass(frozen=True, eq=False)
class Answers:
    """Logits of a composite and of its target for labelled images.

    Attributes:
        images: (N, C, H, W), uint8 or floating point.
        labels: (N,), indices in `classes`.
        logits: Logits of the composite, (N, K_base + K_new).
        target_logits: Logits of the target alone, (N, K_base).
        classes: Names of all logits.
        seen: The classes that have images.
        plan: The set of clones that answered.
        n_ignored: Number of further images, of classes that the composite lacks.
    """

    images: Tensor
    labels: Tensor
    logits: Tensor
    target_logits: Tensor
    classes: tuple[str, ...]
    seen: tuple[str, ...]
    plan: Plan
    n_ignored: int


def evaluate(net: Composite, data: Any, *, batch_size: int = 64, progress: Progress | None = None) -> EvaluationReport:
    """Measure a composite: accuracy on base and new classes, and how far its predictions moved from the target's.

    Args:
        net: With at least one clone enabled.
        data: Held-out labelled images, in any form that `pnc.clone` accepts as support: an ImageSet such as
            `pnc.load_data("folder:photos", "test")`, a pair (images, labels), a Dataset or a DataLoader. If the data
            names its own classes, images of classes that the composite lacks are ignored.
        batch_size: Images per batch.
        progress: Called with (what, done, total) after each batch.
    Raises:
        InputError: `net` is not a composite, no clone is enabled, or all images are of base or all of new classes.
        ClassNameError: a label is not a class of the composite.

    >>> report = pnc.evaluate(net, support)
    >>> report.n_images, report.base_logits_equal, report.conditional_kl
    (24, True, 0.0)
    """
    return report_of(answers(net, data, batch_size, progress))


def report_of(found: Answers) -> EvaluationReport:
    """Compute the report from the logits that `answers` collected."""
    n_base = found.target_logits.shape[1]
    return EvaluationReport(
        clones=found.plan.names,
        classes=found.classes,
        classes_without_images=tuple(name for name in found.classes if name not in found.seen),
        n_images=len(found.labels),
        n_ignored=found.n_ignored,
        **vars(measure_logits(found.logits, found.labels, found.target_logits)),
        base_logits_equal=torch.equal(found.logits[:, :n_base], found.target_logits),
        uncalibrated=found.plan.uncalibrated,
    )


def answers(net: Composite, data: Any, batch_size: int = 64, progress: Progress | None = None) -> Answers:
    """Run a composite and its target on labelled images. Arguments and errors: see `evaluate`."""
    check_composite(net)
    check_whole(batch_size, "batch_size", 1)
    plan = net.now()  # one set of clones for all batches: other threads may change the composite
    classes = plan.classes
    if len(classes) == len(net.base_classes):
        raise InputError("net: no clone is enabled; attach one, or leave the block of disabled()")
    given = data if isinstance(data, ImageSet) else as_support(data, names=classes)
    names = given.classes if isinstance(given, ImageSet) else given.names
    place = torch.tensor([classes.index(name) if name in classes else -1 for name in names])
    labels = place[given.labels]
    known = labels >= 0
    images, labels = (given.images, labels) if bool(known.all()) else (given.images[known], labels[known])
    seen = tuple(classes[index] for index in labels.unique().tolist())
    if not set(seen) & set(net.base_classes) or set(seen) <= set(net.base_classes):
        raise InputError(
            f"data: images of base and of new classes are needed; of {listed(classes)} "
            f"there are images of {listed(seen)} only"
        )
    logits = logits_of(net, images, batch_size, progress, "evaluating", partial(net.logits, plan))
    target_logits = logits_of(net.target, images, batch_size, progress, "evaluating the target alone")
    return Answers(images, labels, logits, target_logits, classes, seen, plan, int((~known).sum()))


def uncalibrated_warning(names: tuple[str, ...]) -> str:
    """A warning that these clones were never calibrated; empty for no names."""
    if not names:
        return ""
    return (
        f"Not calibrated: {listed(names)}. Clones that were made separately respond to each other's images and to "
        "those of base classes; calibrate them together first (pnc calibrate, pnc.calibrate)."
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
