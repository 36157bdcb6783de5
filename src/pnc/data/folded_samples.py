"""The support as samples: images with labels, mirror images and cross-validation folds."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pnc.data.image_store import Images, ImageStore

MAX_FOLDS = 5


@dataclass(frozen=True, eq=False)
class Samples:
    """The support with the labels of the composite.

    Attributes:
        images: N images, read on demand.
        labels: (N,), indices into the target's classes followed by the new ones.
        groups: (N,), the number of the image that each row shows: a mirror image has its original's.
        folds: (N,), ascending: the cross-validation fold in which the image is held out; all zero (no
            cross-validation) if a new class has a single image.
    """

    images: Images
    labels: Tensor
    groups: Tensor
    folds: Tensor

    @property
    def n_folds(self) -> int:
        """Number of folds; 1 if nothing can be held out."""
        return int(self.folds.max()) + 1

    @property
    def is_copy(self) -> Tensor:
        """Which rows show an image that an earlier row shows, (N,) bool, such as mirror images."""
        n_images = int(self.groups.max()) + 1
        rows = torch.arange(len(self.groups))
        first = torch.full((n_images,), len(rows)).scatter_reduce_(0, self.groups, rows, "amin")
        return first[self.groups] != rows

    def batches(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """Fold and images (B, C, H, W), in order: batches of at most `size` images, each from one fold."""
        for fold, rows in self.rows(size):
            yield fold, self.images[rows]

    def rows(self, size: int) -> Iterator[tuple[int, slice]]:
        """Fold and rows of each batch of `batches`."""
        start = 0
        for fold, count in enumerate(self.folds.bincount().tolist()):
            for first in range(start, start + count, size):
                yield fold, slice(first, min(first + size, start + count))
            start += count

    def select(self, rows: Tensor) -> "Samples":
        """Keep some rows, given by ascending number or bool mask."""
        return Samples(self.images.select(rows), self.labels[rows], self.groups[rows], self.folds[rows])

    def spread(self, n_images: int, n_base: int) -> Tensor:
        """Choose a representative subset of the images, with their copies: the same share of each class and fold.

        Of every new class, and of the base classes together, at least one image of each fold is chosen, so that folds
        can still be held out.

        Args:
            n_images: Approximate number of images.
            n_base: Labels from here on are new classes.
        Returns:
            Mask of the chosen rows, (N,) bool.
        """
        return spread_rows(self.labels, self.groups, self.folds, n_images, n_base)


def spread_rows(labels: Tensor, groups: Tensor, folds: Tensor, n_images: int, n_base: int) -> Tensor:
    """Choose rows of samples, given by their columns: see `Samples.spread`."""
    n_folds = int(folds.max()) + 1
    images, index = groups.unique(return_inverse=True)
    own_labels, own_folds = torch.empty_like(images), torch.empty_like(images)
    own_labels[index], own_folds[index] = labels, folds
    cells = own_labels * n_folds + own_folds
    order, counts = cells.argsort(stable=True), cells.bincount()
    number = torch.empty_like(cells)  # of each image within its cell
    number[order] = torch.arange(len(cells)) - (counts.cumsum(0) - counts)[cells[order]]
    places = (number.double() + 0.5) / counts[cells]
    is_base = own_labels < n_base
    needed = (number == 0) & ~is_base
    for fold in own_folds[is_base].unique().tolist():
        there = (is_base & (own_folds == fold)).nonzero().flatten()
        needed[there[fold * len(there) // n_folds]] = True  # spread over the classes
    places[needed] = -1.0
    n_kept = max(n_images, int(needed.sum()))
    chosen = torch.zeros(len(images), dtype=torch.bool)
    chosen[places.argsort(stable=True)[:n_kept]] = True
    return chosen[index]


def samples_of(store: ImageStore, labels: Tensor, n_base: int, flip: bool, seed: int) -> Samples:
    """Return the images of a store as samples, with their mirror images if `flip`.

    Args:
        store: N images.
        labels: (N,), indices into the target's classes followed by the new ones.
        n_base: Labels from here on are new classes.
        flip: Whether mirror images are samples too.
        seed: Seed of the folds.
    """
    groups = torch.arange(len(labels))
    folds, mirrored = _folds(labels, n_base, seed), torch.zeros(len(labels), dtype=torch.bool)
    if flip:
        labels, folds, groups = labels.repeat(2), folds.repeat(2), groups.repeat(2)
        mirrored = torch.cat([mirrored, ~mirrored])
    order = folds.argsort(stable=True)
    return Samples(Images(store, groups[order], mirrored[order]), labels[order], groups[order], folds[order])


def _folds(labels: Tensor, n_base: int, seed: int) -> Tensor:
    """Stratified cross-validation folds, (N,).

    With any one fold held out, images of every new class and of some base class remain: there are as many folds as
    images in the smallest new class, or in all base classes together, and at most `MAX_FOLDS`.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = labels.bincount()
    needed = [*counts[n_base:].tolist(), int(counts[:n_base].sum())]
    n_folds = min(MAX_FOLDS, *(count for count in needed if count))
    folds, start = torch.zeros_like(labels), 0
    for label in counts.nonzero().flatten():
        members = (labels == label).nonzero().flatten()
        folds[members[torch.randperm(len(members), generator=generator)]] = (
            start + torch.arange(len(members))
        ) % n_folds
        start += len(members)
    return folds
