"""Classifying images with a composite: class names, probabilities, and which clone answered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor

from pnc.composite.batched_logits import Progress, logits_of
from pnc.composite.composite import Composite, check_composite
from pnc.data.image_inputs import find_images, read_images
from pnc.data.normalization import Normalization
from pnc.foundation.argument_checks import check_whole


@dataclass(frozen=True)
class Prediction:
    """A composite's prediction for one image.

    Attributes:
        image: Path of its file; None if it did not come from a file.
        label: The most probable class.
        probability: Probability of that class, in [0, 1].
        clone: Name of the clone that has this class; None if it is one of the target's own.
        probabilities: Probabilities of all classes, highest first.
        owners: Name of the clone of each class that is a clone's.
    """

    image: str | None
    label: str
    probability: float
    clone: str | None
    probabilities: Mapping[str, float]
    owners: Mapping[str, str]

    def facts(self, n_classes: int) -> dict[str, Any]:
        """The image, the clone that answered, and the `n_classes` most probable classes, as JSON values."""
        top = [
            {"class": name, "probability": probability, "clone": self.owners.get(name)}
            for name, probability in self.top(n_classes).items()
        ]
        return {"image": self.image, "clone": self.clone, "classes": top}

    def top(self, n_classes: int) -> dict[str, float]:
        """The `n_classes` most probable classes, with their probabilities."""
        check_whole(n_classes, "n_classes", 1)
        return dict(islice(self.probabilities.items(), n_classes))

    def __str__(self) -> str:
        text = self.text()
        return text if self.image is None else f"{self.image}: {text}"

    def text(self, n_classes: int = 3) -> str:
        """The most probable classes in one line, such as "dog (0.81), cat (0.12)"."""
        return ", ".join(f"{name} ({probability:.2f})" for name, probability in self.top(n_classes).items())


def predict(
    net: Composite,
    images: Any,
    *,
    normalization: Normalization | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> tuple[Prediction, ...]:
    """Classify images with a composite.

    Files, Pillow images and arrays are turned upright, centre-cropped to the network's aspect ratio and resized; one
    batch is in memory at a time.

    Args:
        net: As returned by `pnc.attach`.
        images: Path of an image or of a folder of images, a Pillow image, a uint8 array (H, W, C) or (H, W), a tensor
            (C, H, W) or (N, C, H, W) as the network takes it, an ImageSet, or a sequence of these.
        normalization: How the target's own loader normalizes images in [0, 1]; None if it does not. Floating-point
            tensors are never normalized.
        batch_size: Images per batch.
        progress: Called with (what, done, total) after each batch.
    Returns:
        One prediction per image, in order; images of a folder are sorted by path.
    Raises:
        InputError: `net` is not a composite, a file is missing or not an image, or a tensor does not have the
            network's input shape.

    >>> pictures, _ = support
    >>> [one.label for one in pnc.predict(net, pictures[-2:])]
    ['dog', 'dog']
    """
    check_composite(net)
    check_whole(batch_size, "batch_size", 1)
    found = find_images(images)
    plan = net.now()  # one set of clones for all batches: other threads may change the composite
    run, classes, owners = partial(net.logits, plan), plan.classes, plan.owners
    predictions: list[Prediction] = []
    for start in range(0, len(found), batch_size):
        batch = found[start : start + batch_size]
        logits = logits_of(net, read_images(batch, net.input_shape, normalization), batch_size, run=run)
        paths = [one.path for one in batch]
        predictions.extend(prediction_of(*one, classes, owners) for one in zip(paths, logits, strict=True))
        if progress is not None:
            progress("classifying", len(predictions), len(found))
    return tuple(predictions)


def prediction_of(image: str | None, logits: Tensor, classes: Sequence[str], owners: Mapping[str, str]) -> Prediction:
    """Turn the logits of one image into a prediction.

    Args:
        image: Its path or name, if it has one.
        logits: (K,).
        classes: Names of the logits.
        owners: Name of the clone of each class that is a clone's.
    """
    ordered = logits.float().softmax(0).sort(descending=True, stable=True)
    names = [classes[index] for index in ordered.indices.tolist()]
    probabilities = dict(zip(names, ordered.values.tolist(), strict=True))
    return Prediction(image, names[0], probabilities[names[0]], owners.get(names[0]), probabilities, owners)
