"""The few labelled samples that a clone is made from, read from any common container."""

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
        labels: (N,), int64, each an index into `names`.
        names: Class names, all different; a class may have no sample.

    >>> Support(torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 1]), ("cat", "dog"))
    Support(3 images 1x8x8 of 2 classes, cat, dog)
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
    """Read labelled samples from any common container into a `Support`; the global random state does not change.

    Args:
        data: A `Support`; an `ImageSet`; a pair (images, labels); a list or a `Dataset` of single samples (image,
            label); or a `DataLoader` of batches of them. Instead of a pair, a dictionary may be given that has one of
            the keys in `IMAGE_KEYS` and one of those in `LABEL_KEYS`, as in data sets of `datasets`. Images are tensors
            (C, H, W), uint8 (divided by 255) or floating point (used unchanged), in a batch or a list. Labels are class
            names, ids, or one-hot rows.
        names: Class names. If labels are ids, the name of each id, unless the data has names itself (a `Support`, an
            `ImageSet`, a dataset with `classes` or with `features` that name them). If labels are class names, the
            classes in order; by default all that occur, sorted.

    Raises:
        InputError: there are no samples, they have several shapes, NaN or infinite values, ids out of range or without
            names, or `data` is of another type.
        ClassNameError: a label is not in `names`, or `names` has a name twice.
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
    """A support whose images may not fit into memory; made by `stored_support`.

    Attributes:
        images: The N images.
        labels: (N,), int64, each an index into `names`.
        names: Class names, all different; a class may have no sample.
    """

    images: ImageStore
    labels: Tensor
    names: tuple[str, ...]


def stored_support(data: Any, names: Sequence[str] | Mapping[Any, Any] | None, memory: int) -> StoredSupport:
    """Read labelled samples once, and keep their images in memory or, beyond a limit, in a temporary file.

    Args:
        data: As for `as_support`. Images from a Dataset or a DataLoader are copied; others stay where they are.
        names: As for `as_support`.
        memory: Maximum size, in bytes, of copies in memory.
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
    """The labels as ids, (N,), and the class names that they index."""
    column, n_columns = label_column(labels)
    if not isinstance(column, Tensor):
        used = sorted(set(column))
        known = check_class_names(used if names is None else names, "names")
        place = dict(zip(used, class_ids(used, known, "labels"), strict=True))
        return torch.tensor([place[label] for label in column]), known
    own = own_names(data)
    names = names if own is None else own
    if names is None:
        raise InputError("names: the labels are ids; give names=[...], the name of each id, or class names as labels")
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
        argument: What messages call it.
        like: Images whose shape they must have.
    Raises:
        InputError: they are not images, are empty, or have another shape.
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
    generator: torch.Generator | None = None,
) -> Support:
    """Draw a support: `n_new` images per new class and `n_base` per base class, like `draw_images`, as float32.

    Without a generator the draw is that of seed 0.

    >>> data = ImageSet(torch.rand(6, 1, 8, 8), torch.tensor([0, 0, 1, 1, 2, 2]), ("cat", "dog", "cow"))
    >>> draw_support(data, ["cow"], ["cat", "dog"], n_new=2, n_base=1)
    Support(4 images 1x8x8 of 3 classes, cat, dog, cow)
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    drawn = draw_images(data, new_classes, base_classes, n_new, n_base, generator)
    return Support(images_as_float(drawn.images), drawn.labels, drawn.classes)


def doubts(store: ImageStore, labels: Tensor, names: Sequence[str]) -> list[str]:
    """Describe, with numbers, images that no head can learn from; empty if there are none.

    These are images that are all equal, in a class or altogether, images that are all zeros, and images that appear in
    two classes.

    Args:
        store: N images.
        labels: (N,), indices into `names`.
        names: Class names.
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
        found.append(f"{number} in two classes, such as numbers {one} and {other}")
    return found
