"""Images classified by a composite: names, probabilities, and which clone answered. What `pnc predict` shows."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from pnc.composite.batched_logits import logits_of
from pnc.composite.composite import Composite
from pnc.data.image_inputs import find_images, read_images
from pnc.data.normalization import Normalization
from pnc.foundation.errors import InputError


@dataclass(frozen=True)
class Prediction:
    """What a composite says of one image.

    Attributes:
        image: The path of its file; None where it has none.
        label: The most probable class.
        probability: Of that class, in [0, 1].
        clone: Name of the clone whose class it is; None where it is one of the target's own.
        probabilities: Of all classes, the most probable first.
    """

    image: str | None
    label: str
    probability: float
    clone: str | None
    probabilities: Mapping[str, float]

    def top(self, n_classes: int) -> dict[str, float]:
        """The so many most probable classes with their probabilities."""
        return dict(islice(self.probabilities.items(), n_classes))

    def __str__(self) -> str:
        said = ", ".join(f"{name} ({probability:.2f})" for name, probability in self.top(3).items())
        return said if self.image is None else f"{self.image}: {said}"


def predict(
    net: Composite, images: Any, *, normalization: Normalization | None = None, batch_size: int = 64
) -> tuple[Prediction, ...]:
    """Classify images with a composite.

    Files, Pillow images and arrays are turned upright, cropped at their centre to the ratio that the network takes and
    resized; a batch of them is in memory at a time.

    Args:
        net: What `pnc.attach` gives.
        images: The path of an image or of a folder of images, a Pillow image, an array (H, W, C) or (H, W) of type
            uint8, a tensor (C, H, W) or (N, C, H, W) as the network takes it, an ImageSet, or a sequence of these.
        normalization: What the target's own loader does to images in [0, 1]; None for nothing. Floating-point tensors
            are taken as they are in any case.
        batch_size: Images at a time.
    Returns:
        One prediction for each image, in order; those of a folder are sorted by path.
    Raises:
        InputError: `net` is no composite, a file is not there or no image, or a tensor has another shape than the
            network takes.
    """
    if not isinstance(net, Composite):
        raise InputError(f"net: expected a composite, what pnc.attach gives; got {type(net).__name__}")
    found = find_images(images)
    classes = net.classes
    owner = {name: one.name for one in net.status() for name in one.classes}
    predictions: list[Prediction] = []
    for start in range(0, len(found), batch_size):
        batch = found[start : start + batch_size]
        logits = logits_of(net, read_images(batch, net.input_shape, normalization), batch_size)
        paths = [one.path for one in batch]
        predictions.extend(_prediction(*one, classes, owner) for one in zip(paths, logits, strict=True))
    return tuple(predictions)


def _prediction(path: str | None, logits: Tensor, classes: tuple[str, ...], owner: Mapping[str, str]) -> Prediction:
    ordered = logits.float().softmax(0).sort(descending=True, stable=True)
    names = [classes[index] for index in ordered.indices.tolist()]
    probabilities = dict(zip(names, ordered.values.tolist(), strict=True))
    return Prediction(path, names[0], probabilities[names[0]], owner.get(names[0]), probabilities)
