"""The few labelled samples that a clone is made from, out of whatever holds them."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pnc.data.image_set import ImageSet, check_labels, draw_images, images_as_float
from pnc.data.image_store import ImageStore, check_images
from pnc.data.labelled_batches import batches, label_column, own_names
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


def as_support(data: Any, names: Sequence[str] | Mapping[Any, Any] | None = None) -> Support:
    """Turn whatever holds labelled samples into a `Support`; the global random state stays as it was.

    Args:
        data: A `Support`; an `ImageSet`; a pair (images, labels); a `Dataset` of such pairs, one sample each; or a
            `DataLoader` of batches of them. In place of pairs, dictionaries serve that have one of the keys of
            `IMAGE_KEYS` and one of `LABEL_KEYS`, as data sets of `datasets` give them. Images are tensors, (C, H, W)
            each, uint8 (divided by 255) or floating point (taken as they are), in a batch or in a list. Labels are
            class names, or ids, or ids as rows with a single one.
        names: Class names. With ids it gives the name of each id, unless the data knows its names itself (a `Support`,
            an `ImageSet`, a dataset with `classes`, or with `features` that name them). With class names as labels it
            says which there are and in which order; without it they are those that occur, sorted.

    Raises:
        InputError: no samples, samples of several shapes, NaN or infinite values, ids out of range or without names,
            another kind of data.
        ClassNameError: a label is not among `names`, or `names` has a name twice.
    """
    if isinstance(data, Support):
        return data
    if isinstance(data, ImageSet):
        return Support(images_as_float(data.images), data.labels, data.classes)
    stored = stored_support(data, names, sys.maxsize)
    if isinstance(data, tuple | list) and isinstance(data[0], Tensor) and data[0].dtype == torch.float32:
        return Support(data[0].detach().cpu(), stored.labels, stored.names)  # without a copy
    return Support(stored.images.read(torch.arange(len(stored.images))), stored.labels, stored.names)


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


def stored_support(data: Any, names: Sequence[str] | Mapping[Any, Any] | None, memory: int) -> StoredSupport:
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
    put = store.keep if isinstance(data, tuple | list | Mapping) else store.add
    labels: list[Any] = []
    with torch.random.fork_rng(devices=[]):  # iterating a loader, even an unshuffled one, draws from the global state
        for batch, column in batches(data):
            put(batch)
            labels.extend(column)
    if not labels:
        raise InputError("support: expected at least one sample, got none")
    ids, known = _named(data, labels, names)
    check_labels(ids, len(store), len(known))
    return StoredSupport(store, ids, known)


def _named(data: Any, labels: list[Any], names: Any) -> tuple[Tensor, tuple[str, ...]]:
    """The labels as ids, (N,), and the names that these are places in."""
    column, n_columns = label_column(labels)
    if not isinstance(column, Tensor):
        there = sorted(set(column))
        known = check_class_names(there if names is None else names, "names")
        place = dict(zip(there, class_ids(there, known, "labels"), strict=True))
        return torch.tensor([place[label] for label in column]), known
    own = own_names(data)
    names = names if own is None else own
    if names is None:
        raise InputError("names: the labels are ids; give the name of each id as names=[...], or names as labels")
    known = check_class_names(names, "names" if own is None else "support: classes of the dataset")
    if n_columns is not None and n_columns != len(known):
        raise InputError(
            f"support: the labels are rows of {n_columns} columns, but there are {len(known)} class names "
            f"({listed(known, 5)}); give class names as labels"
        )
    return column, known


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


def doubts(store: ImageStore, labels: Tensor, names: Sequence[str]) -> list[str]:
    """What of labelled images no head can learn from, in words with figures; empty where there is nothing.

    Looked for are images that are all equal, in a class or altogether, images of zeros alone, and images that are given
    under two classes.

    Args:
        store: N images.
        labels: (N,), places in `names`.
        names: Of the classes.
    """
    digests: list[bytes] = []
    black = torch.zeros(len(labels), dtype=torch.bool)
    for rows in torch.arange(len(labels)).split(256):
        images = store.read(rows).flatten(1)
        black[rows] = ~images.any(1)
        digests += [hashlib.blake2b(image.numpy().data, digest_size=16).digest() for image in images]
    if len(digests) > 1 and len(set(digests)) == 1:
        return [f"all {len(digests)} images are equal"]
    found = []
    for label, name in enumerate(names):
        members = (labels == label).nonzero().flatten().tolist()
        n_black = int(black[members].sum())
        if len(members) > 1 and len({digests[row] for row in members}) == 1:
            found.append(f"all {len(members)} images of {name!r} are equal")
        elif n_black == len(members) == 1 or n_black >= max(2, len(members) / 10):
            found.append(f"{n_black} of {len(members)} images of {name!r} are black")
    first: dict[bytes, int] = {}
    pairs = [
        (first[digest], row)
        for row, digest in enumerate(digests)
        if labels[first.setdefault(digest, row)] != labels[row]
    ]
    if pairs:
        one, other = (f"{row} ({names[int(labels[row])]})" for row in pairs[0])
        number = "one image is" if len(pairs) == 1 else f"{len(pairs)} images are"
        found.append(f"{number} given under two classes, such as numbers {one} and {other}")
    return found
