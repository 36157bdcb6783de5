"""Labelled images read batch by batch from pairs, dictionaries, datasets and loaders, and the names of their ids."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ChainDataset, ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from pnc.foundation.class_names import check_class_names, listed
from pnc.foundation.errors import InputError

IMAGE_KEYS = ("image", "images", "img", "pixel_values")
LABEL_KEYS = ("label", "labels", "fine_label")


def batches(data: Any) -> Iterator[tuple[Tensor, list[Any]]]:
    """Images (B, C, H, W) and their labels, from a pair, a dictionary, a list of samples, a dataset or a loader.

    Raises:
        InputError: `data` is something else, or contains something other than images and labels.
    """
    if isinstance(data, DataLoader):
        for images, labels in map(_pair, data):
            yield _image_batch(images), _label_list(labels)
    elif isinstance(data, Dataset) or (isinstance(data, tuple | list) and data and _is_sample(data[0])):
        for image, label in map(_pair, _items(data)):
            yield _image_tensor(image)[None], [label]
    elif isinstance(data, Mapping) or (isinstance(data, tuple | list) and len(data) == 2):
        images, labels = _pair(data)
        yield _image_batch(images), _label_list(labels)
    else:
        kind = f"{type(data).__module__.partition('.')[0]}.{type(data).__name__}".removeprefix("builtins.")
        loader = "; pass torch.utils.data.DataLoader(data.with_format('torch'), batch_size=64)"
        raise InputError(
            "support: expected a pair (images, labels), a list of pairs (image, label), an ImageSet, or a Dataset or "
            f"DataLoader of torch.utils.data, got {kind}{loader if hasattr(data, 'with_format') else ''}"
        )


def _is_sample(item: Any) -> bool:
    """Whether an item is a pair (image, label), so that the list that contains it is a list of samples."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        return False
    label = item[1]
    return isinstance(label, str | int | np.generic) or (isinstance(label, Tensor) and label.ndim == 0)


def _items(dataset: Dataset[Any] | Sequence[Any]) -> Iterable[Any]:
    if isinstance(dataset, IterableDataset | tuple | list):
        return dataset
    if not isinstance(dataset, Sized):
        raise InputError(f"support: {type(dataset).__name__} has no length; give it __len__, or pass a DataLoader")
    return (dataset[index] for index in range(len(dataset)))


def _pair(item: Any) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        found = [[key for key in keys if key in item] for keys in (IMAGE_KEYS, LABEL_KEYS)]
        if any(len(keys) != 1 for keys in found):
            raise InputError(
                f"support: a dictionary must have one of the keys {', '.join(IMAGE_KEYS)} and one of the keys "
                f"{', '.join(LABEL_KEYS)}, got {listed([str(key) for key in item], 6)}; give pairs "
                "(item[KEY], item[KEY])"
            )
        return item[found[0][0]], item[found[1][0]]
    if not isinstance(item, tuple | list) or len(item) != 2:
        what = f"{type(item).__name__} of {len(item)}" if isinstance(item, tuple | list) else type(item).__name__
        raise InputError(f"support: every item must be a pair (image, label), got {what}")
    return item[0], item[1]


def _image_batch(images: Any) -> Tensor:
    """One tensor of images, from a tensor or a list of tensors."""
    if isinstance(images, tuple | list) and images and all(isinstance(image, Tensor) for image in images):
        shapes = sorted({str(tuple(image.shape)) for image in images})
        if len(shapes) > 1:
            raise InputError(f"support: the images have {len(shapes)} shapes, {listed(shapes, 3)}; give all one shape")
        return torch.stack([image.detach().cpu() for image in images])
    if isinstance(images, tuple | list) and images:
        images = next(image for image in images if not isinstance(image, Tensor))  # for the message
    return _image_tensor(images)


def _image_tensor(image: Any) -> Tensor:
    if isinstance(image, Tensor):
        return image.detach().cpu()
    kind = type(image).__name__
    if hasattr(image, "getpixel"):
        way_out = (
            "add transform=torchvision.transforms.ToTensor(), or torchvision.transforms.functional.to_tensor(image)"
        )
        kind = "a Pillow image"
    elif isinstance(image, np.ndarray):
        way_out = "use torch.from_numpy(images), and .permute(0, 3, 1, 2) if the channels come last"
    else:
        way_out = "add a transform that returns one"
    raise InputError(f"support: images must be tensors, got {kind}; {way_out}")


def _label_list(labels: Any) -> list[Any]:
    if isinstance(labels, str | Mapping) or not isinstance(labels, Iterable) or getattr(labels, "ndim", 1) == 0:
        raise InputError(
            f"support: expected a sequence of labels with the images, one for each; got {type(labels).__name__}"
            f"{'; give the loader a batch_size' if isinstance(labels, Tensor) else ''}"
        )
    return list(labels)


def label_column(labels: list[Any]) -> tuple[Tensor | list[str], int | None]:
    """Labels as ids, (N,), or as names; and the number of columns if they were one-hot rows.

    Raises:
        InputError: they are none of these.
    """
    values = [label.item() if isinstance(label, Tensor | np.generic) and label.ndim == 0 else label for label in labels]
    if values and all(isinstance(value, Tensor | np.ndarray) and value.ndim == 1 for value in values):
        return _from_rows(values)
    names = [value for value in values if isinstance(value, str)]
    ids = [value for value in values if isinstance(value, int)]
    if len(ids) == len(values):
        if any(not -(2**63) <= value < 2**63 for value in ids):
            raise InputError("support: label ids must fit in int64")
        return torch.tensor(ids, dtype=torch.int64), None
    if len(names) == len(values):
        return names, None
    strange = [value for value in values if not isinstance(value, str | int)]
    came = f"{strange[0]!r:.80}" if strange else "a mix of both"
    hint = "; use labels.long()" if strange and all(isinstance(value, float) for value in strange) else ""
    raise InputError(f"support: labels must be all class names or all integer ids, got {came}{hint}")


def _from_rows(rows: Sequence[Any]) -> tuple[Tensor, int]:
    """The ids of labels that are one-hot rows."""
    sizes = {len(row) for row in rows}
    if len(sizes) == 1 and (n_columns := sizes.pop()) > 1:
        matrix = torch.stack([torch.as_tensor(row) for row in rows])
        if bool(((matrix == 0) | (matrix == 1)).all()) and bool((matrix.sum(1) == 1).all()):
            return matrix.long().argmax(1), n_columns
    raise InputError(
        "support: labels that are rows must be zeros with a single one; give one id for each image, such as "
        "labels.argmax(1), or labels.flatten() if there is one column"
    )


def own_names(data: Any) -> tuple[str, ...] | None:
    """The class names that a dataset knows for its ids, also through loaders, subsets and concatenated datasets.

    They are its `classes`, or those of the label in its `features`, as in data sets of `datasets`. A `classes` that is
    not a collection, such as a number of classes, is ignored.

    Raises:
        InputError: concatenated datasets have different names, or `classes` contains something other than names.
    """
    while isinstance(data, DataLoader | Subset):
        data = data.dataset
    if isinstance(data, ConcatDataset | ChainDataset):
        found = {own_names(one) for one in data.datasets}
        if len(found) > 1:
            raise InputError(
                "support: the joined datasets do not have the same classes, so an id means different ones; "
                "make them return class names as labels"
            )
        return found.pop() if found else None
    classes = getattr(data, "classes", None)
    if classes is None:
        features = getattr(data, "features", None)
        labels = [features[key] for key in LABEL_KEYS if key in features] if isinstance(features, Mapping) else []
        classes = getattr(labels[0], "names", None) if len(labels) == 1 else None
    if isinstance(classes, str) or callable(classes) or not isinstance(classes, Iterable):
        return None
    values = list(classes.values()) if isinstance(classes, Mapping) else list(classes)
    if not values or not (isinstance(classes, Mapping) or all(isinstance(value, str) for value in values)):
        came = type(values[0]).__name__ if values else "nothing"
        raise InputError(
            f"support: the attribute `classes` of {type(data).__name__} must name the ids, but contains {came}, not "
            "names; set it to a list of names, or make the dataset return class names as labels"
        )
    return check_class_names(classes, f"support: the attribute `classes` of {type(data).__name__}")
