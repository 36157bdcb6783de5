"""The few labelled samples that a clone is made from, out of whatever holds them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ChainDataset, ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from pnc.data.image_set import ImageSet, check_labels, draw_images, images_as_float
from pnc.data.image_store import ImageStore, check_images
from pnc.foundation.class_names import check_class_names, class_ids, listed
from pnc.foundation.errors import InputError
from pnc.foundation.plain_text import few_names


@dataclass(frozen=True, eq=False)
class Support:
    """The few labelled samples that a clone is made from; made by `as_support` or `draw_support`.

    Attributes:
        images: (N, C, H, W), float32, as the networks take them.
        labels: (N,), int64, each a place in `names`.
        names: Class names, all different; a class may have no sample.
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", check_class_names(self.names, "names"))
        check_images(self.images, "support")
        check_labels(self.labels, len(self.images), len(self.names))

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape[1:]))
        return f"Support({len(self)} images {shape} of {len(self.labels.unique())} classes, {few_names(self.names)})"


def as_support(data: Any, names: Sequence[str] | None = None) -> Support:
    """Turn whatever holds labelled samples into a `Support`; the global random state stays as it was.

    Args:
        data: A `Support`; an `ImageSet`; a pair (images, labels); a `Dataset` of such pairs, one sample each; or a
            `DataLoader` of batches of them. Images are tensors, (C, H, W) each, uint8 (divided by 255) or floating
            point (taken as they are). Labels are class names, or ids.
        names: Class names. With ids it gives the name of each id, unless the data knows its names itself (a `Support`,
            an `ImageSet`, a dataset with `classes`). With class names as labels it says which there are and in which
            order; without it they are those that occur, sorted.

    Raises:
        InputError: no samples, samples of several shapes, NaN or infinite values, ids out of range or without names,
            another kind of data.
        ClassNameError: a label is not among `names`, or `names` has a name twice.
    """
    if isinstance(data, Support):
        return data
    if isinstance(data, ImageSet):
        return Support(images_as_float(data.images), data.labels, data.classes)
    images, labels = [], []
    with torch.random.fork_rng(devices=[]):  # iterating a loader, even an unshuffled one, draws from the global state
        for batch, column in _batches(data):
            images.append(batch)
            labels.extend(column)
    ids, known = _named(data, labels, names)
    return Support(images_as_float(_concatenated(images)), ids, known)


@dataclass(frozen=True, eq=False)
class StoredSupport:
    """A support whose images may be too many for memory; made by `stored_support`.

    Attributes:
        images: Its N images.
        labels: (N,), int64, each a place in `names`.
        names: Class names, all different; a class may have no sample.
    """

    images: ImageStore
    labels: Tensor
    names: tuple[str, ...]


def stored_support(data: Any, names: Sequence[str] | None, memory: int) -> StoredSupport:
    """Read labelled samples once, and keep their images in memory or, beyond a bound, in a temporary file.

    Args:
        data: As for `as_support`. What a Dataset or a DataLoader gives is copied; other images stay where they are.
        names: As for `as_support`.
        memory: Bytes that copies may take in memory.
    Raises:
        InputError, ClassNameError: as `as_support`.
    """
    store = ImageStore(memory)
    if isinstance(data, Support | ImageSet):
        store.keep(data.images)
        return StoredSupport(store, data.labels, data.names if isinstance(data, Support) else data.classes)
    put = store.keep if isinstance(data, tuple | list) else store.add
    labels: list[Any] = []
    with torch.random.fork_rng(devices=[]):  # as in `as_support`
        for batch, column in _batches(data):
            put(batch)
            labels.extend(column)
    if not labels:
        raise InputError("support: expected at least one sample, got none")
    ids, known = _named(data, labels, names)
    check_labels(ids, len(store), len(known))
    return StoredSupport(store, ids, known)


def _named(data: Any, labels: list[Any], names: Sequence[str] | None) -> tuple[Tensor, tuple[str, ...]]:
    """The labels as ids, (N,), and the names that these are places in."""
    column = _label_column(labels)
    if not isinstance(column, Tensor):
        there = sorted(set(column))
        known = check_class_names(there if names is None else names, "names")
        place = dict(zip(there, class_ids(there, known, "labels"), strict=True))
        return torch.tensor([place[label] for label in column]), known
    own = _own_names(data)
    names = names if own is None else own
    if names is None:
        raise InputError("names: the labels are ids; give the name of each id as names=[...], or names as labels")
    return column, check_class_names(names, "names")


def as_images(data: Any, argument: str, like: Tensor) -> Tensor:
    """Unlabelled images, (N, C, H, W), as floating point.

    Args:
        data: A tensor of images, uint8 (divided by 255) or floating point, or an `ImageSet`.
        argument: What the message of an error calls it.
        like: Images whose shape they must have.
    Raises:
        InputError: they are no images, none, or of another shape.
    """
    images = data.images if isinstance(data, ImageSet) else data
    check_images(images, argument)
    if images.shape[1:] != like.shape[1:]:
        came, expected = tuple(images.shape[1:]), tuple(like.shape[1:])
        raise InputError(f"{argument}: expected images {expected} like the support's, got {came}; resize them")
    return images_as_float(images)


def draw_support(
    data: ImageSet,
    new_classes: Sequence[str],
    base_classes: Sequence[str],
    n_new: int | None,
    n_base: int | None,
    generator: torch.Generator,
) -> Support:
    """Draw a support as `draw_images` does, as float32."""
    drawn = draw_images(data, new_classes, base_classes, n_new, n_base, generator)
    return Support(images_as_float(drawn.images), drawn.labels, drawn.classes)


def _own_names(data: Any) -> Sequence[str] | None:
    """Return `classes` of the dataset at the bottom of a loader, of subsets or of joined datasets: what ids point into.

    Raises:
        InputError: joined datasets have different ones.
    """
    while isinstance(data, DataLoader | Subset):
        data = data.dataset
    if not isinstance(data, ConcatDataset | ChainDataset):
        names: Sequence[str] | None = getattr(data, "classes", None)
        return names
    found = {None if names is None else tuple(names) for names in map(_own_names, data.datasets)}
    if len(found) > 1:
        raise InputError(
            "support: the joined datasets do not have the same classes, so an id means different ones; "
            "let them give class names as labels"
        )
    return found.pop()


def _batches(data: Any) -> Iterator[tuple[Tensor, list[Any]]]:
    """Images (B, C, H, W) and their labels, of a pair, dataset or loader."""
    if isinstance(data, DataLoader):
        for images, labels in _pairs(data):
            yield _image_tensor(images), _label_list(labels)
    elif isinstance(data, Dataset):
        for image, label in _pairs(_items(data)):
            yield _image_tensor(image)[None], [label]
    elif isinstance(data, tuple | list) and len(data) == 2:
        yield _image_tensor(data[0]), _label_list(data[1])
    else:
        kind = f"{type(data).__module__.partition('.')[0]}.{type(data).__name__}".removeprefix("builtins.")
        raise InputError(
            "support: expected a pair (images, labels), an ImageSet, or a Dataset or DataLoader of torch.utils.data, "
            f"got {kind}"
        )


def _items(dataset: Dataset[Any]) -> Iterable[Any]:
    if isinstance(dataset, IterableDataset):
        return dataset
    if not hasattr(dataset, "__len__"):
        raise InputError(f"support: {type(dataset).__name__} has no length; give it __len__, or pass a DataLoader")
    return (dataset[index] for index in range(len(dataset)))


def _pairs(items: Iterable[Any]) -> Iterable[tuple[Any, Any]]:
    for item in items:
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise InputError(f"support: every item must be a pair (image, label), got {type(item).__name__}")
        yield item[0], item[1]


def _image_tensor(image: Any) -> Tensor:
    if not isinstance(image, Tensor):
        raise InputError(f"support: images must be tensors, got {type(image).__name__}; add a transform that makes one")
    return image.detach().cpu()


def _label_list(labels: Any) -> list[Any]:
    if isinstance(labels, str | Mapping) or not isinstance(labels, Iterable) or getattr(labels, "ndim", 1) == 0:
        raise InputError(
            f"support: expected a sequence of labels beside the images, one for each; got {type(labels).__name__}"
        )
    return list(labels)


def _concatenated(images: list[Tensor]) -> Tensor:
    if not images:
        raise InputError("support: expected at least one sample, got none")
    shapes = sorted({str(tuple(image.shape[1:])) for image in images})
    if len(shapes) > 1:
        raise InputError(f"support: the images have {len(shapes)} shapes, {listed(shapes, 3)}; give all one shape")
    return torch.cat(images)


def _label_column(labels: list[Any]) -> Tensor | list[str]:
    values = [label.item() if isinstance(label, Tensor | np.generic) and label.ndim == 0 else label for label in labels]
    names = [value for value in values if isinstance(value, str)]
    ids = [value for value in values if isinstance(value, int)]
    if len(ids) == len(values):
        return torch.tensor(ids, dtype=torch.int64)
    if len(names) == len(values):
        return names
    strange = [value for value in values if not isinstance(value, str | int)]
    came = repr(strange[0]) if strange else "a mix of both"
    raise InputError(f"support: labels must be all class names or all integer ids, got {came}")
