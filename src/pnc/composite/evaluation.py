"""A composite measured on labelled images, and how sure it should be: what `pnc eval` shows."""

import dataclasses
import textwrap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pnc.composite.batched_logits import logits_of
from pnc.composite.composite import Composite
from pnc.composite.metrics import measure_logits
from pnc.data.image_set import ImageSet
from pnc.data.support import as_support
from pnc.foundation.class_names import listed
from pnc.foundation.errors import InputError

_COLUMNS = 80


@dataclass(frozen=True)
class EvaluationReport:
    """What `evaluate` measured; printed, it fits on one screen.

    Attributes:
        clones: Those that were enabled, in the order of their logits.
        classes: Names of all logits.
        classes_without_images: Those of them that nothing is known of.
        n_images: On which it was measured.
        base_accuracy: Accuracy on images of base classes, in [0, 1], predicting over base and new classes.
        new_accuracy: The same on images of the new classes.
        average_accuracy: Mean of both.
        conditional_kl: Mean KL divergence, in nats, from the target's distribution to the composite's among the base
            classes, on base images.
        leak: Mean probability given to new classes on base images.
        locality_kl: Mean KL divergence, in nats, from the target's distribution to the composite's over all classes.
        base_drop: The target's own accuracy on base images minus `base_accuracy`.
        base_logits_equal: Whether the base logits were the target's own, bit for bit, on all these images.
        uncalibrated: Clones that were made apart and never calibrated; empty where there is only one clone.
    """

    clones: tuple[str, ...]
    classes: tuple[str, ...]
    classes_without_images: tuple[str, ...]
    n_images: int
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
        """The same as JSON values."""
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
    """What a composite and its target say on labelled images.

    Attributes:
        images: (N, C, H, W), uint8 or floating point.
        labels: (N,), places in `classes`.
        logits: Of the composite, (N, K_base + K_new).
        target_logits: Of the target alone, (N, K_base).
        classes: Names of all logits.
        there: Those of them that have images.
    """

    images: Tensor
    labels: Tensor
    logits: Tensor
    target_logits: Tensor
    classes: tuple[str, ...]
    there: tuple[str, ...]


def evaluate(net: Composite, data: Any, *, batch_size: int = 64) -> EvaluationReport:
    """Measure a composite: accuracy on base and on new classes, and how much the target's own answers moved.

    Args:
        net: With at least one clone enabled.
        data: Labelled images that nothing was made from, as `pnc.clone` takes a support: an ImageSet such as
            `pnc.load_data("folder:photos", "test")`, a pair (images, labels), a Dataset or a DataLoader. Images of
            classes that the composite does not know are left out where the data names its classes itself.
        batch_size: Images at a time.
    Raises:
        InputError: `net` is no composite, no clone is enabled, or there are images of base or of new classes only.
        ClassNameError: a label is no class of the composite.
    """
    return report_of(net, answers(net, data, batch_size))


def report_of(net: Composite, found: Answers) -> EvaluationReport:
    """Sum up what a composite answered."""
    n_base = found.target_logits.shape[1]
    return EvaluationReport(
        clones=tuple(one.name for one in net.status() if one.enabled),
        classes=found.classes,
        classes_without_images=tuple(name for name in found.classes if name not in found.there),
        n_images=len(found.labels),
        **vars(measure_logits(found.logits, found.labels, found.target_logits)),
        base_logits_equal=torch.equal(found.logits[:, :n_base], found.target_logits),
        uncalibrated=uncalibrated_clones(net),
    )


def answers(net: Composite, data: Any, batch_size: int = 64) -> Answers:
    """Run a composite and its target on labelled images; arguments and errors as `evaluate`."""
    if not isinstance(net, Composite):
        raise InputError(f"net: expected a composite, what pnc.attach gives; got {type(net).__name__}")
    classes = net.classes
    if len(classes) == len(net.base_classes):
        raise InputError("net: no clone is enabled; attach one, or leave the block of disabled()")
    given = data if isinstance(data, ImageSet) else as_support(data, names=classes)
    names = given.classes if isinstance(given, ImageSet) else given.names
    place = torch.tensor([classes.index(name) if name in classes else -1 for name in names])
    labels = place[given.labels]
    known = labels >= 0
    images, labels = (given.images, labels) if bool(known.all()) else (given.images[known], labels[known])
    there = tuple(classes[index] for index in labels.unique().tolist())
    if not set(there) & set(net.base_classes) or set(there) <= set(net.base_classes):
        raise InputError(
            f"data: images of base and of new classes are needed; of {listed(classes)} "
            f"there are images of {listed(there)} only"
        )
    logits, target_logits = logits_of(net, images, batch_size), logits_of(net.target, images, batch_size)
    return Answers(images, labels, logits, target_logits, classes, there)


def uncalibrated_clones(net: Composite) -> tuple[str, ...]:
    """Names of the enabled clones that were never calibrated, where there are several clones; none otherwise."""
    enabled = [one for one in net.status() if one.enabled]
    return tuple(one.name for one in enabled if not one.calibrated) if len(enabled) > 1 else ()


def uncalibrated_warning(names: tuple[str, ...]) -> str:
    """One sentence on clones that were never calibrated; empty for none."""
    if not names:
        return ""
    return (
        f"Not calibrated: {listed(names)}. Clones that were made apart take each other's images and those of old "
        "classes; calibrate them together first (pnc calibrate, pnc.calibrate)."
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
