"""A cloning task: two recorded networks, their class names and the support, every doubt settled at the door."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pnc.cuts import Head, find_head
from pnc.data import Support, as_support, check_class_names, class_ids
from pnc.errors import ClassNameError, InputError, RecordingError
from pnc.graph import Recording, info, record

_EXAMPLES = 4
MAX_FOLDS = 5


@dataclass(frozen=True, eq=False)
class Network:
    """A recorded classifier, its head, and the names of its outputs in order."""

    model: nn.Module
    recording: Recording
    head: Head
    classes: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        """Where its images must be."""
        return self.recording.probe.device

    @property
    def n_macs(self) -> int:
        """Multiply-accumulates of one sample through the whole network."""
        return sum(info(node).n_macs for node in self.recording.module.graph.nodes)

    @property
    def n_params(self) -> int:
        """Parameters that the forward pass uses."""
        return sum(info(node).n_params for node in self.recording.module.graph.nodes)


@dataclass(frozen=True, eq=False)
class Samples:
    """The support in the terms of the composite.

    Attributes:
        images: (N, C, H, W), float32.
        labels: (N,), places among the target's classes followed by the new ones.
        groups: (N,), which image each row shows: a flipped copy shares its original's.
        folds: (N,), ascending: the fold of cross-validation in which the image is held out. Each fold has every class
            in the same share; all zero, which means no cross-validation, where a class has a single image.
    """

    images: Tensor
    labels: Tensor
    groups: Tensor
    folds: Tensor

    @property
    def n_folds(self) -> int:
        """Number of folds; 1 where nothing can be held out."""
        return int(self.folds.max()) + 1

    def batches(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """Fold and images (B, C, H, W), in order, at most `size` at a time and never of two folds."""
        for fold, images in enumerate(self.images.split(self.folds.bincount().tolist())):
            for batch in images.split(size):
                yield fold, batch


@dataclass(frozen=True, eq=False)
class CloneTask:
    """Everything that a clone is made from.

    Attributes:
        source: The network that knows the new classes.
        target: The network that shall get them.
        new_classes: Their names, in the order of the new logits.
        samples: The support, base classes first.
        seed: Of every random choice.
        batch_size: Images that go through a network at a time.
    """

    source: Network
    target: Network
    new_classes: tuple[str, ...]
    samples: Samples
    seed: int
    batch_size: int

    @property
    def source_ids(self) -> list[int]:
        """Places of the new classes among the source's outputs."""
        return [self.source.classes.index(name) for name in self.new_classes]

    @property
    def n_base(self) -> int:
        """Number of the target's classes."""
        return len(self.target.classes)

    @property
    def has_base(self) -> bool:
        """Whether the support holds samples of base classes."""
        return bool((self.samples.labels < self.n_base).any())


def read_network(model: nn.Module, example: Tensor, classes: Sequence[str], argument: str) -> Network:
    """Record `model` and find its head; the message of any error starts with `argument`.

    Args:
        model: A classifier, (B, C, H, W) to (B, K).
        example: Images that it takes, (B, C, H, W).
        classes: Names of its K outputs, in order.
        argument: "source" or "target".
    Raises:
        RecordingError: the network cannot be recorded, or cannot take such images.
        ClassNameError: the names do not fit to the outputs.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"{argument} must be a torch.nn.Module that maps images to logits; got {type(model).__name__}")
    names = check_class_names(classes, f"{argument} classes")
    parameter = next(model.parameters(), None)
    if parameter is not None:
        example = example.to(parameter.device, parameter.dtype)
    try:
        recording = record(model, example)
        head = find_head(recording)
    except RecordingError as error:
        raise RecordingError(f"{argument} on images {tuple(example.shape[1:])}: {error}") from error
    if not recording.probe_logits.isfinite().all():
        raise InputError(f"{argument} gives NaN or infinite logits on noise like the support; check its weights")
    if recording.n_classes != len(names):
        raise ClassNameError(
            f"{argument} has {recording.n_classes} outputs but {len(names)} class names were given; "
            "name every output, in order"
        )
    return Network(model, recording, head, names)


def prepare_task(
    source: nn.Module,
    target: nn.Module,
    support: Any,
    *,
    classes: Sequence[str] | None,
    source_classes: Sequence[str],
    base_classes: Sequence[str],
    flip: bool = False,
    seed: int = 0,
    batch_size: int = 128,
) -> CloneTask:
    """Check everything that a clone is made from, and record both networks.

    It takes what `pnc.clone` takes, hence its many arguments.

    Args:
        source: Network that knows the new classes; stays as it is.
        target: Network that shall get them; stays as it is.
        support: Whatever `as_support` takes; labels are class names, or ids of base classes followed by new ones.
        classes: Names of the classes to clone; None takes all of the source's that the target lacks.
        source_classes: Names of the source's outputs, in order.
        base_classes: Names of the target's outputs, in order.
        flip: Use the mirror image of each sample too.
        seed: Of every random choice.
        batch_size: Images that go through a network at a time.
    Raises:
        InputError: source and target are one object, or the support lacks samples of a class.
        ClassNameError: a class is unknown, given twice, or known to the target already.
        RecordingError: a network cannot be recorded.
    """
    if source is target:
        raise InputError("source and target are the same object; load the network twice if this is meant")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1; got {batch_size}")
    base = check_class_names(base_classes, "base_classes")
    known = check_class_names(source_classes, "source_classes")
    new = _new_classes(classes, known, base)
    samples = _samples(as_support(support, names=(*base, *new)), base, new, flip, seed)
    examples = samples.images[:_EXAMPLES]
    read = read_network(source, examples, known, "source"), read_network(target, examples, base, "target")
    if read[0].device != read[1].device:
        raise InputError(f"source is on {read[0].device}, target on {read[1].device}; move both to one device")
    return CloneTask(
        source=read[0],
        target=read[1],
        new_classes=new,
        samples=samples,
        seed=seed,
        batch_size=batch_size,
    )


def _new_classes(classes: Sequence[str] | None, known: tuple[str, ...], base: tuple[str, ...]) -> tuple[str, ...]:
    if classes is None:
        new = tuple(name for name in known if name not in base)
        if not new:
            raise ClassNameError("classes: the target knows every class of the source already; there is none to clone")
        return new
    new = check_class_names(classes, "classes")
    class_ids(new, known, "classes")
    clash = [name for name in new if name in base]
    if clash:
        raise ClassNameError(
            f"classes: the target knows {', '.join(clash)} already; rename the class in source_classes or leave it out"
        )
    return new


def _samples(support: Support, base: tuple[str, ...], new: tuple[str, ...], flip: bool, seed: int) -> Samples:
    names = (*base, *new)
    counts = support.labels.bincount(minlength=len(support.names)).tolist()
    seen = {name: count for name, count in zip(support.names, counts, strict=True) if count}
    foreign = sorted(set(seen) - set(names))
    if foreign:
        raise ClassNameError(
            f"support has samples of {', '.join(foreign)}, neither a base class nor a class to clone; leave them out"
        )
    missing = [name for name in new if name not in seen]
    if missing:
        raise InputError(f"support has no sample of {', '.join(missing)}; every class to clone needs at least one")
    missing = [name for name in base if name not in seen]
    if missing and len(missing) < len(base):
        raise InputError(
            f"support has samples of some base classes but none of {', '.join(missing)}; "
            "give at least one of each, or none of any"
        )
    place = torch.tensor([names.index(name) if name in names else -1 for name in support.names])
    images, labels = support.images, place[support.labels]
    groups = torch.arange(len(labels))
    folds = _folds(labels, seed)
    if flip:
        images, labels = torch.cat([images, images.flip(3)]), labels.repeat(2)
        groups, folds = groups.repeat(2), folds.repeat(2)
    order = folds.argsort(stable=True)
    return Samples(images[order], labels[order], groups[order], folds[order])


def _folds(labels: Tensor, seed: int) -> Tensor:
    """Stratified folds of cross-validation, (N,); as many as the smallest class has images, at most `MAX_FOLDS`."""
    generator = torch.Generator().manual_seed(seed)
    counts = labels.bincount()
    n_folds = min(MAX_FOLDS, int(counts[counts > 0].min()))
    folds = torch.zeros_like(labels)
    for label in counts.nonzero().flatten():
        members = (labels == label).nonzero().flatten()
        folds[members[torch.randperm(len(members), generator=generator)]] = torch.arange(len(members)) % n_folds
    return folds
