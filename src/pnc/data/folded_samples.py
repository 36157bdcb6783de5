"""The support, sample by sample: images with labels, mirror images and folds."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pnc.data.image_store import Images, ImageStore

MAX_FOLDS = 5


@dataclass(frozen=True, eq=False)
class Samples:
    """The support in the terms of the composite.

    Attributes:
        images: N images, each made when it is asked for.
        labels: (N,), places among the target's classes followed by the new ones.
        groups: (N,), which image each row shows: a flipped copy shares its original's.
        folds: (N,), ascending: the fold of cross-validation in which the image is held out; all zero, which means no
            cross-validation, where a new class has a single image.
    """

    images: Images
    labels: Tensor
    groups: Tensor
    folds: Tensor

    @property
    def n_folds(self) -> int:
        """Number of folds; 1 where nothing can be held out."""
        return int(self.folds.max()) + 1

    def batches(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """Fold and images (B, C, H, W), in order, at most `size` at a time and never of two folds."""
        for fold, rows in self.rows(size):
            yield fold, self.images[rows]

    def rows(self, size: int) -> Iterator[tuple[int, slice]]:
        """Fold and place of the batches that `batches` gives."""
        start = 0
        for fold, count in enumerate(self.folds.bincount().tolist()):
            for first in range(start, start + count, size):
                yield fold, slice(first, min(first + size, start + count))
            start += count

    def select(self, rows: Tensor) -> "Samples":
        """Keep the given rows, ascending, by number or bool mask."""
        return Samples(self.images.select(rows), self.labels[rows], self.groups[rows], self.folds[rows])

    def spread(self, n_images: int, n_base: int) -> Tensor:
        """Choose images that stand for all, with their copies: of each class and fold the same share.

        Of every new class one image of each fold is taken at least, so that folds can still be held out.

        Args:
            n_images: How many, about.
            n_base: Labels from here on are new classes.
        Returns:
            Which rows, (N,) bool.
        """
        images, index = self.groups.unique(return_inverse=True)
        labels, folds = torch.empty_like(images), torch.empty_like(images)
        labels[index], folds[index] = self.labels, self.folds
        cells = labels * self.n_folds + folds
        order, counts = cells.argsort(stable=True), cells.bincount()
        number = torch.empty_like(cells)  # of each image within its cell
        number[order] = torch.arange(len(cells)) - (counts.cumsum(0) - counts)[cells[order]]
        places = (number.double() + 0.5) / counts[cells]
        places[(number == 0) & (labels >= n_base)] = -1.0
        n_kept = max(n_images, int((places < 0).sum()))
        chosen = torch.zeros(len(images), dtype=torch.bool)
        chosen[places.argsort(stable=True)[:n_kept]] = True
        return chosen[index]


def samples_of(store: ImageStore, labels: Tensor, n_base: int, flip: bool, seed: int) -> Samples:
    """Give the images of a store as samples, with their mirror images if `flip`.

    Args:
        store: N images.
        labels: (N,), places among the target's classes followed by the new ones.
        n_base: Labels from here on are new classes.
        flip: Whether mirror images are samples too.
        seed: Of the folds.
    """
    groups = torch.arange(len(labels))
    folds, mirrored = _folds(labels, n_base, seed), torch.zeros(len(labels), dtype=torch.bool)
    if flip:
        labels, folds, groups = labels.repeat(2), folds.repeat(2), groups.repeat(2)
        mirrored = torch.cat([mirrored, ~mirrored])
    order = folds.argsort(stable=True)
    return Samples(Images(store, groups[order], mirrored[order]), labels[order], groups[order], folds[order])


def _folds(labels: Tensor, n_base: int, seed: int) -> Tensor:
    """Folds of cross-validation, (N,), in which every class has the same share, as far as its number allows.

    Without any fold there are still images of every new class, and of some base class: so there are as many folds as
    the smallest new class has images, or all base classes together, and at most `MAX_FOLDS`.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = labels.bincount()
    of_kinds = [*counts[n_base:].tolist(), int(counts[:n_base].sum())]
    n_folds = min(MAX_FOLDS, *(count for count in of_kinds if count))
    folds, start = torch.zeros_like(labels), 0
    for label in counts.nonzero().flatten():
        members = (labels == label).nonzero().flatten()
        folds[members[torch.randperm(len(members), generator=generator)]] = (
            start + torch.arange(len(members))
        ) % n_folds
        start += len(members)
    return folds
