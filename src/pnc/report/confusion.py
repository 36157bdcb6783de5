"""Confusion matrices before and after attaching, with the images of their cells as small pictures."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pnc.composite.evaluation import Answers
from pnc.data.image_set import images_as_float

MAX_CLASSES = 30
"""Largest number of rows; beyond that, the base classes that changed least are merged."""

PER_CELL, MAX_IMAGES, MAX_BYTES = 6, 400, 400_000
"""Limits: pictures per cell, pictures of all cells, and their bytes as base64."""

_SIDE, _LOSSLESS = 64, 16


@dataclass(frozen=True)
class Cell:
    """Images of one class predicted as another: their count, share of the row, and keys of `Confusion.pictures`."""

    count: int
    strength: float
    images: tuple[int, ...]


@dataclass(frozen=True)
class Confusion:
    """Matrices with one row per true class and one column per predicted class.

    Attributes:
        names: Names of rows and columns.
        n_base: Number of base classes among them, which come first.
        before: Predictions of the target alone.
        after: Predictions of the composite.
        difference: After minus before, as counts and as shares of the row in [-1, 1].
        pictures: Data URIs by index of the image.
    """

    names: tuple[str, ...]
    n_base: int
    before: tuple[tuple[Cell, ...], ...]
    after: tuple[tuple[Cell, ...], ...]
    difference: tuple[tuple[tuple[int, float], ...], ...]
    pictures: Mapping[int, str]


def confusion(found: Answers) -> Confusion:
    """Count the predictions of the target alone and of the composite, and choose pictures to show."""
    n_base, n_classes = found.target_logits.shape[1], len(found.classes)
    answers = [found.target_logits.argmax(1), found.logits.argmax(1)]
    counts = [_counts(found.labels, answer, n_classes) for answer in answers]
    groups = _groups(found, counts[1] - counts[0], n_base)
    place = torch.empty(n_classes, dtype=torch.int64)
    for index, (_, members) in enumerate(groups):
        place[torch.tensor(members)] = index
    labels, grouped = place[found.labels], [place[answer] for answer in answers]
    before, after = (_counts(labels, answer, len(groups)) for answer in grouped)
    chosen, pictures = _pictures(found, labels, grouped)
    names = tuple(name for name, _ in groups)
    return Confusion(
        names=names,
        n_base=sum(members[0] < n_base for _, members in groups),
        before=_cells(before, chosen[0]),
        after=_cells(after, chosen[1]),
        difference=_differences(after - before, before),
        pictures=pictures,
    )


def _counts(labels: Tensor, answers: Tensor, n_classes: int) -> Tensor:
    return torch.bincount(labels * n_classes + answers, minlength=n_classes**2).reshape(n_classes, n_classes)


def _groups(found: Answers, change: Tensor, n_base: int) -> list[tuple[str, list[int]]]:
    """Rows of the matrices: (name, classes), base classes first."""
    there = [index for index, name in enumerate(found.classes) if name in found.seen]
    shown = there if len(there) < len(found.classes) or len(there) > MAX_CLASSES else [*range(len(found.classes))]
    moved = change.abs().sum(1) + change.abs().sum(0)
    ordered = sorted(shown, key=lambda index: (index < n_base, -int(moved[index]), index))
    kept = sorted(ordered[:MAX_CLASSES])
    rest = [index for index in range(len(found.classes)) if index not in kept]
    groups = [(found.classes[index], [index]) for index in kept]
    for is_new in (False, True):
        members = [index for index in rest if (index >= n_base) == is_new]
        if members:
            at = len(groups) if is_new else sum(index < n_base for index in kept)
            groups.insert(at, (f"{len(members)} other {'new' if is_new else 'base'}", members))
    return groups


def _pictures(
    found: Answers, labels: Tensor, answers: list[Tensor]
) -> tuple[list[dict[tuple[int, int], tuple[int, ...]]], dict[int, str]]:
    """Choose images for the cells of each matrix; errors of the composite come first, until the limits are reached."""
    confidence = [logits.double().softmax(1).max(1).values for logits in (found.target_logits, found.logits)]
    wanted: list[tuple[bool, int, int, int, list[int]]] = []
    for matrix in (1, 0):
        for row, column in {*zip(labels.tolist(), answers[matrix].tolist(), strict=True)}:
            inside = ((labels == row) & (answers[matrix] == column)).nonzero().flatten()
            surest = inside[confidence[matrix][inside].argsort(descending=True, stable=True)[:PER_CELL]]
            wanted.append((row == column, 1 - matrix, row, column, surest.tolist()))
    chosen: list[dict[tuple[int, int], tuple[int, ...]]] = [{}, {}]
    pictures: dict[int, str] = {}
    room = MAX_BYTES
    low, high = (0.0, 1.0) if found.images.dtype == torch.uint8 else _range_of(found.images)
    for _, other, row, column, images in sorted(wanted):
        for index in images:
            if index not in pictures and len(pictures) < MAX_IMAGES and room > 0:
                pictures[index] = _data_uri((images_as_float(found.images[index]) - low) / (high - low))
                room -= len(pictures[index])
        chosen[1 - other][row, column] = tuple(index for index in images if index in pictures)
    return chosen, pictures


def _range_of(images: Tensor) -> tuple[float, float]:
    """Values of black and white: 0 and 1, or the extremes of the images if these were normalized."""
    low, high = float(images.min()), float(images.max())
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


def _data_uri(image: Tensor) -> str:
    """A picture of an image (C, H, W) in [0, 1], at most `_SIDE` pixels high and wide."""
    from PIL import Image

    pixels = (image if image.shape[0] == 3 else image[:1]).mul(255).round().clamp(0, 255).to(torch.uint8).cpu()
    array = pixels.permute(1, 2, 0).contiguous().numpy() if len(pixels) == 3 else pixels[0].contiguous().numpy()
    picture = Image.fromarray(array)
    picture.thumbnail((_SIDE, _SIDE))
    data = io.BytesIO()
    if max(picture.size) <= _LOSSLESS:
        kind = "png"
        picture.save(data, format=kind, optimize=True)
    else:
        kind = "jpeg"
        picture.save(data, format=kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def _cells(counts: Tensor, images: Mapping[tuple[int, int], tuple[int, ...]]) -> tuple[tuple[Cell, ...], ...]:
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    return tuple(
        tuple(
            Cell(count, share, images.get((row, column), ()))
            for column, (count, share) in enumerate(zip(line, strengths, strict=True))
        )
        for row, (line, strengths) in enumerate(zip(counts.tolist(), shares.tolist(), strict=True))
    )


def _differences(change: Tensor, before: Tensor) -> tuple[tuple[tuple[int, float], ...], ...]:
    shares = change / before.sum(1, keepdim=True).clamp_min(1)
    return tuple(
        tuple(zip(line, strengths, strict=True))
        for line, strengths in zip(change.tolist(), shares.tolist(), strict=True)
    )
