"""A cloning task: two recorded networks, their class names and the support, every doubt settled at the door."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pnc.cuts import Head, find_head
from pnc.data import Support, as_images, as_support, check_class_names, class_ids
from pnc.errors import ClassNameError, InputError, RecordingError
from pnc.graph import Recording, info, record

_EXAMPLES = 4
MAX_FOLDS = 5


class HasClones(nn.Module):
    """Base of modules that have clones attached: as these come and go, such a module can be no target of others."""


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
        folds: (N,), ascending: the fold of cross-validation in which the image is held out; all zero, which means no
            cross-validation, where a new class has a single image.
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
        n_background: How many images of base classes the target labelled itself.
    """

    source: Network
    target: Network
    new_classes: tuple[str, ...]
    samples: Samples
    seed: int
    batch_size: int
    n_background: int = 0

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
    background: Any = None,
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
        background: Unlabelled images that the target is used on, (N, C, H, W), or an `ImageSet`, whose labels are not
            looked at; they become samples of the base classes that the target itself sees in them.
        flip: Use the mirror image of each sample too.
        seed: Of every random choice.
        batch_size: Images that go through a network at a time.
    Raises:
        InputError: source and target are one object, the support lacks samples of a new class, or the background
            images are none, or of another shape.
        ClassNameError: a class is unknown, given twice, or known to the target already.
        RecordingError: a network cannot be recorded.
    """
    if source is target:
        raise InputError("source and target are the same object; load the network twice if this is meant")
    if isinstance(target, nn.Module) and any(isinstance(module, HasClones) for module in target.modules()):
        raise InputError(
            "target is a composite, whose classes come and go; clone into the network in it (composite.target), "
            "attach that clone to the composite too, and calibrate them together"
        )
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1; got {batch_size}")
    base = check_class_names(base_classes, "base_classes")
    known = check_class_names(source_classes, "source_classes")
    new = _new_classes(classes, known, base)
    given = as_support(support, names=(*base, *new))
    labels = _places(given, base, new)
    unlabelled = given.images[:0] if background is None else as_images(background, "background", given.images)
    examples = given.images[:_EXAMPLES]
    read = read_network(source, examples, known, "source"), read_network(target, examples, base, "target")
    if read[0].device != read[1].device:
        raise InputError(f"source is on {read[0].device}, target on {read[1].device}; move both to one device")
    seen = [_answers(read[1], images) for images in unlabelled.split(batch_size) if len(images)]
    return CloneTask(
        source=read[0],
        target=read[1],
        new_classes=new,
        samples=_samples(torch.cat([given.images, unlabelled]), torch.cat([labels, *seen]), len(base), flip, seed),
        seed=seed,
        batch_size=batch_size,
        n_background=len(unlabelled),
    )


def _answers(network: Network, images: Tensor) -> Tensor:
    """The classes that a network sees in images, (N,)."""
    with torch.no_grad():
        logits: Tensor = network.recording.module(images.to(network.device, network.recording.probe.dtype))
    return logits.argmax(1).cpu()


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


def _places(support: Support, base: tuple[str, ...], new: tuple[str, ...]) -> Tensor:
    """Labels of a support as places among base and new classes, (N,)."""
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
    place = torch.tensor([names.index(name) if name in names else -1 for name in support.names])
    return place[support.labels]


def _samples(images: Tensor, labels: Tensor, n_base: int, flip: bool, seed: int) -> Samples:
    groups = torch.arange(len(labels))
    folds = _folds(labels, n_base, seed)
    if flip:
        images, labels = torch.cat([images, images.flip(3)]), labels.repeat(2)
        groups, folds = groups.repeat(2), folds.repeat(2)
    order = folds.argsort(stable=True)
    return Samples(images[order], labels[order], groups[order], folds[order])


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
