"""Labelled images of one size, and how to select from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pnc.data.image_store import check_images
from pnc.foundation.class_names import check_class_names, class_ids, listed
from pnc.foundation.errors import ClassNameError, InputError
from pnc.foundation.plain_text import few_names


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images of one size, with the names of their classes.

    Attributes:
        images: (N, C, H, W), uint8 in [0, 255] or floating point in [0, 1].
        labels: (N,), int64, each an index into `classes`.
        classes: Class names, all different; a class may have no image.

    Raises:
        InputError: a shape, dtype or value is not as above.
        ClassNameError: a class name is empty or appears twice.

    >>> ImageSet(torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 1]), ("cat", "dog"))
    ImageSet(3 images 1x8x8, 2 classes: cat, dog)
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", check_class_names(self.classes, "classes"))
        check_images(self.images, "images")
        if self.images.dtype != torch.uint8 and (self.images.min() < 0 or self.images.max() > 1):
            low, high = self.images.min().item(), self.images.max().item()
            raise InputError(
                f"images: floating-point pixels must lie in [0, 1], these lie in [{low:.3g}, {high:.3g}]; "
                "pass them before any normalisation (networks do their own)"
            )
        check_labels(self.labels, len(self.images), len(self.classes))

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.input_shape))
        return f"ImageSet({len(self)} images {shape}, {len(self.classes)} classes: {few_names(self.classes)})"

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one image, (C, H, W)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def counts(self) -> dict[str, int]:
        """Return the number of images per class name, in the order of `classes`."""
        return dict(zip(self.classes, torch.bincount(self.labels, minlength=len(self.classes)).tolist(), strict=True))


def images_as_float(images: Tensor) -> Tensor:
    """Return images as float32: uint8 is divided by 255, floating point is converted."""
    if images.dtype == torch.uint8:
        return images.float().div_(255)
    return images.float()


def select(data: ImageSet, indices: Tensor) -> ImageSet:
    """Return the images at `indices` (int64, in that order) with their labels."""
    return ImageSet(data.images[indices], data.labels[indices], data.classes)


def relabel(data: ImageSet, classes: Sequence[str]) -> ImageSet:
    """Return the same images with labels that are indices into `classes`, matched by name.

    `classes` may reorder the names or add others, but must contain every class that has images.

    Raises:
        ClassNameError: a class that has images is missing from `classes`.
    """
    classes = check_class_names(classes, "classes")
    place = {name: index for index, name in enumerate(classes)}
    missing = [name for name, count in data.counts().items() if count and name not in place]
    if missing:
        raise ClassNameError(
            f"classes: {listed(missing)} missing, but the data has images of it; add it or use class_subset"
        )
    new_ids = torch.tensor([place.get(name, -1) for name in data.classes])
    return ImageSet(data.images, new_ids[data.labels], classes)


def class_subset(data: ImageSet, classes: Sequence[str]) -> ImageSet:
    """Return the images of some classes, in their order in `data`, labelled by their index in `classes`.

    Raises:
        ClassNameError: a name is unknown or given twice.
        InputError: none of the classes has an image.
    """
    classes = check_class_names(classes, "classes")
    wanted = torch.tensor(class_ids(classes, data.classes))
    indices = torch.isin(data.labels, wanted).nonzero().flatten()
    if not len(indices):
        raise InputError(f"classes: the data has no image of {listed(classes)}")
    return relabel(select(data, indices), classes)


def sample_per_class(
    data: ImageSet,
    n_samples: int | None,
    pick: Literal["first", "last", "random"] = "random",
    generator: torch.Generator | None = None,
    argument: str = "n_samples",
) -> ImageSet:
    """Return `n_samples` images of every class (None: all), grouped by class in the order of `data.classes`.

    Args:
        data: The images to choose from.
        n_samples: Images per class, at least 1.
        pick: The first or last images of each class, or a draw without replacement.
        generator: Random generator of the draw; needed for "random" unless all images are taken.
        argument: Name of `n_samples` in the error message.

    Raises:
        InputError: a class has fewer images than that; the message says how many it has.
    """
    chosen = [_pick(data, class_id, n_samples, pick, generator, argument) for class_id in range(len(data.classes))]
    return select(data, torch.cat(chosen))


def hold_back(data: ImageSet, n_samples: int) -> tuple[ImageSet, ImageSet]:
    """Split off the last `n_samples` images of every class: all others in their order, then these, grouped by class.

    Raises:
        InputError: a class has fewer images than that.
    """
    last = torch.cat(
        [_pick(data, class_id, n_samples, "last", None, "n_samples") for class_id in range(len(data.classes))]
    )
    kept = torch.ones(len(data), dtype=torch.bool)
    kept[last] = False
    return select(data, kept.nonzero().flatten()), select(data, last)


def _pick(
    data: ImageSet,
    class_id: int,
    n_samples: int | None,
    pick: str,
    generator: torch.Generator | None,
    argument: str,
) -> Tensor:
    indices = (data.labels == class_id).nonzero().flatten()
    name = data.classes[class_id]
    if n_samples is None and len(indices):
        return indices
    if n_samples is None or n_samples < 1 or len(indices) < n_samples:
        wanted = "at least one image" if n_samples is None else f"{n_samples} images"
        raise InputError(
            f"{argument}: asked for {wanted} of class {name!r}, which has {len(indices)}; ask for 1 to that many"
        )
    if pick == "random":
        if generator is None:
            raise InputError("generator: a random draw needs one, got None; pass torch.Generator().manual_seed(...)")
        return indices[torch.randperm(len(indices), generator=generator)[:n_samples]]
    return indices[:n_samples] if pick == "first" else indices[-n_samples:]


def draw_images(
    data: ImageSet,
    new_classes: Sequence[str],
    base_classes: Sequence[str],
    n_new: int | None,
    n_base: int | None,
    generator: torch.Generator,
) -> ImageSet:
    """Draw `n_new` images per new class and `n_base` per base class without replacement, in their own dtype.

    None takes all images of a class. An `n_base` of 0 takes none; the data then need not have the base classes. The
    images are grouped by class, base classes first, and `classes` is always base_classes + new_classes. With equally
    seeded generators, the images of the new classes do not depend on `n_base`, and a smaller draw of a class is the
    beginning of a larger one.

    Raises:
        ClassNameError: a class is unknown, given twice, or both new and base.
        InputError: a class has too few images; the message says how many it has.
    """
    new_classes = check_class_names(new_classes, "new_classes")
    base_classes = check_class_names(base_classes, "base_classes") if base_classes else ()
    names = check_class_names([*base_classes, *new_classes], "new_classes and base_classes")
    class_ids(new_classes if n_base == 0 else names, data.classes, "new_classes and base_classes")
    parts = [sample_per_class(class_subset(data, new_classes), n_new, "random", generator, "n_new")]
    if base_classes and n_base != 0:
        parts.insert(0, sample_per_class(class_subset(data, base_classes), n_base, "random", generator, "n_base"))
    parts = [relabel(part, names) for part in parts]
    return ImageSet(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]), names)


def check_labels(labels: Tensor, n_images: int, n_classes: int) -> None:
    """Raise an `InputError` unless `labels` has one id below `n_classes` for each image."""
    if isinstance(labels, Tensor) and labels.dim() == 1 and len(labels) != n_images:
        raise InputError(f"labels: there are {len(labels)} for {n_images} images; give one for each image")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (n_images,):
        came = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise InputError(f"labels: expected one int64 id per image, shape ({n_images},), got {came}")
    if labels.min() < 0 or labels.max() >= n_classes:
        raise InputError(
            f"labels: ids must lie in 0-{n_classes - 1} ({n_classes} class names), "
            f"these lie in {labels.min().item()}-{labels.max().item()}; are all classes named, in the order of the ids?"
        )
