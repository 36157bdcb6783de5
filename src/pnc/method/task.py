"""A cloning task: two recorded networks, their class names and the support, all checked once."""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pnc.composite.batched_logits import Progress as Progress
from pnc.composite.composite import Composite
from pnc.data.folded_samples import Samples, samples_of
from pnc.data.image_range import check_range
from pnc.data.image_set import ImageSet
from pnc.data.image_store import MEMORY, ImageStore, check_images, to_device
from pnc.data.support import StoredSupport, doubts, stored_support
from pnc.foundation.argument_checks import check_choice
from pnc.foundation.class_names import check_class_names
from pnc.foundation.errors import ClassNameError, InputError, PNCWarning, RecordingError
from pnc.foundation.network_state import like_images, undisturbed
from pnc.foundation.plain_text import few_names
from pnc.foundation.process_team import ALONE, Team
from pnc.graph.classifier import ClassifierLayer, find_head
from pnc.graph.dry_run import logits_without_values
from pnc.graph.forward_prints import ForwardPrint, forward_print
from pnc.graph.recording import Recording, info, record
from pnc.method.settings import check_network, check_run
from pnc.method.task_classes import support_labels, task_classes

_log = logging.getLogger(__name__)

Precision = Literal["float32", "bfloat16"]
"""Precision in which the networks run while a clone is made."""

_EXAMPLES = 4
FEW_IMAGES = 5
"""Up to this many images of a new class, exact positions go first and the head stays near the ensemble's."""
_NAMES = {"source": "source_classes", "target": "base_classes", "model": "classes"}
IMAGES_SHARE = 0.5
"""Share of the memory that images may take before they go to a file."""


@dataclass(frozen=True, eq=False)
class Network:
    """A recorded classifier, its head, and the names of its outputs in order."""

    model: nn.Module
    recording: Recording
    head: ClassifierLayer
    classes: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        """The device on which it runs."""
        return self.recording.probe.device

    @property
    def n_macs(self) -> int:
        """Multiply-accumulates of one sample through the whole network."""
        return sum(info(node).n_macs for node in self.recording.module.graph.nodes)

    @cached_property
    def forward_print(self) -> ForwardPrint:
        """Digest and answers of its recorded graph."""
        return forward_print(self.model, self.recording)

    @property
    def n_params(self) -> int:
        """Number of parameters that the forward pass uses."""
        return sum(info(node).n_params for node in self.recording.module.graph.nodes)


@dataclass(frozen=True, eq=False)
class CloneTask:
    """Everything that a clone is made from.

    Attributes:
        source: The network that knows the new classes.
        target: The network that will receive them.
        new_classes: Their names, in the order of the new logits.
        samples: The support, base classes first.
        seed: Seed of every random choice.
        batch_size: Images that go through a network at a time.
        n_given: Number of images that came with labels; the target labelled those with a higher number.
        memory: Bytes of the support that may be held at a time, without those of a batch.
        team: The processes that share the work.
        precision: Precision in which networks run; sums and solutions are float32 or more.
        has_few_images: Whether some new class has at most `FEW_IMAGES` images, so that held-out scores say little.
        key: The same object in this task and all its reductions; another one in every other task.
    """

    source: Network
    target: Network
    new_classes: tuple[str, ...]
    samples: Samples
    seed: int
    batch_size: int
    n_given: int
    memory: int = MEMORY
    team: Team = ALONE
    precision: Precision = "float32"
    has_few_images: bool = False
    key: object = field(default_factory=object)

    def autocast(self) -> torch.autocast:
        """Return a context in which networks run in the task's precision."""
        return torch.autocast(self.target.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def within(self, n_bytes: int, share: float = 0.25) -> "CloneTask":
        """Return the task with as much of its support as fits into a share of its memory, as `reduced` does.

        Args:
            n_bytes: Bytes held for one sample.
            share: Share of `memory`.
        """
        n_samples, n_images = len(self.samples.labels), len(self.samples.groups.unique())
        n_kept = int(share * self.memory) // max(n_bytes, 1) * n_images // n_samples
        return self.reduced(n_kept)

    def reduced(self, n_images: int) -> "CloneTask":
        """Return the task with about that many images of its support, spread over classes and folds; all, if fewer."""
        if n_images >= len(self.samples.groups.unique()):
            return self
        return replace(self, samples=self.samples.select(self.samples.spread(n_images, self.n_base)))

    @property
    def without_copies(self) -> "CloneTask":
        """The task without copies of its images, such as mirror images."""
        return replace(self, samples=self.samples.select(~self.samples.is_copy))

    @torch.no_grad()
    def run(
        self, function: Callable[[Tensor], tuple[Tensor, ...]], device: torch.device
    ) -> tuple[tuple[Tensor, ...], list[slice]]:
        """Run a function over the support, batch by batch; the processes of the team share the batches.

        Args:
            function: Maps images (B, C, H, W) to tensors (B, ...), of the same shapes and dtypes for all batches.
            device: Where images are moved first.
        Returns:
            Its results for all samples, (N, ...) each, and the slices of the batches, none of which spans two folds.
        """
        places = [place for _, place in self.samples.rows(self._batch_size)]
        own = places[self.team.rank :: self.team.size]
        with self.autocast():
            made = zip(*(function(to_device(self.samples.images[place], device)) for place in own), strict=True)
        rows = torch.cat([torch.arange(place.start, place.stop) for place in own])
        n_samples = len(self.samples.labels)
        return tuple(self.team.gather(_widened(torch.cat(parts)), rows, n_samples) for parts in made), places

    def __repr__(self) -> str:
        labels, groups = self.samples.labels, self.samples.groups
        n_base = len(groups[labels < self.n_base].unique())
        n_new = len(groups[labels >= self.n_base].unique())
        return (
            f"CloneTask({few_names(self.new_classes)} of {len(self.source.classes)} source classes, for a target of "
            f"{self.n_base}; support of {n_new} new and {n_base} base images)"
        )

    @property
    def background(self) -> Tensor:
        """Which samples the target labelled, (N,) bool."""
        return self.samples.groups >= self.n_given

    @property
    def _batch_size(self) -> int:
        """At most `batch_size`, and small enough that each process has a batch."""
        return min(self.batch_size, len(self.samples.labels) // self.team.size)

    def close(self) -> None:
        """Remove the temporary file of the images, if there is one."""
        self.samples.images.close()

    @property
    def clones_all(self) -> bool:
        """Whether all classes that the source knows are cloned, so that a part of it need not forget any."""
        return len(self.source_ids) == len(self.source.classes)

    @property
    def source_ids(self) -> list[int]:
        """Indices of the new classes among the source's outputs."""
        return [self.source.classes.index(name) for name in self.new_classes]

    @property
    def n_base(self) -> int:
        """Number of the target's classes."""
        return len(self.target.classes)

    @property
    def has_base(self) -> bool:
        """Whether the support has samples of base classes."""
        return bool((self.samples.labels < self.n_base).any())


def read_network(model: nn.Module, example: Tensor, classes: Sequence[str], argument: str) -> Network:
    """Record `model` and find its head; error messages start with `argument`.

    Args:
        model: A classifier, (B, C, H, W) to (B, K).
        example: Images to run it on, (B, C, H, W).
        classes: Names of its K outputs, in order.
        argument: "source", "target" or "model".
    Raises:
        RecordingError: the network cannot be recorded, or cannot process such images.
        ClassNameError: the number of names is not that of the outputs.
    """
    check_network(model, argument)
    names = check_class_names(classes, f"{argument} classes")
    example = example.to(like_images(model))
    try:
        recording = record(model, example)
        head = find_head(recording)
    except RecordingError as error:
        hint = (
            ""
            if argument == "model" or "cannot process images" not in str(error)
            else (
                f"; if it needs other images than the support's, wrap it: pnc.Preprocessed({argument}, (C, H, W), "
                "mean, std) with the channels and size that it was trained on"
            )
        )
        raise RecordingError(f"{argument} on images {tuple(example.shape[1:])}: {error}{hint}") from error
    if not recording.probe_logits.isfinite().all():
        raise InputError(f"{argument} gives NaN or infinite logits on noise like the support; check its weights")
    _check_number(recording.n_classes, names, argument)
    return Network(model, recording, head, names)


def _check_number(n_logits: int | None, names: Sequence[str], argument: str) -> None:
    """Refuse another number of names than of logits, if that is known."""
    if n_logits is not None and n_logits != len(names):
        raise ClassNameError(
            f"{_NAMES[argument]} has {len(names)} names, the {argument} gives {n_logits} logits; "
            "name every output, in order"
        )


@undisturbed()
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
    memory: int = MEMORY,
    team: Team = ALONE,
    precision: Precision = "float32",
) -> CloneTask:
    """Check everything that a clone is made from, and record both networks.

    Args:
        source: Network that knows the new classes; it is not changed.
        target: Network that will receive them; it is not changed.
        support: Labelled images, in any form that `as_support` accepts; labels are class names, or ids that count the
            base classes first, then the new ones.
        classes: Names of the classes to clone; None clones all of the source's that the target lacks.
        source_classes: Names of the source's outputs, in order.
        base_classes: Names of the target's outputs, in order.
        background: Unlabelled images that the target is used on, (N, C, H, W), or an `ImageSet`, whose labels are
            ignored; the target's predictions become their labels.
        flip: Use the mirror image of each sample too.
        seed: Seed of every random choice.
        batch_size: Images that go through a network at a time.
        memory: Bytes of the support that may be held at a time; the rest is in a temporary file, or left out where a
            part of the support is enough.
        team: The processes that make the clone together, each called with the same arguments.
        precision: Precision in which the networks run.
    Raises:
        InputError: source and target are the same object, the support lacks samples of a new class, or the background
            has no images, or images of another shape.
        ClassNameError: a class is unknown, given twice, or already known to the target.
        RecordingError: a network cannot be recorded.

    >>> pnc.prepare_task(source, target, support, classes=["cat", "dog"], **names).new_classes
    ('cat', 'dog')
    """
    if source is target:
        raise InputError("source and target are the same object; load the network twice if this is meant")
    if isinstance(target, nn.Module) and any(isinstance(module, Composite) for module in target.modules()):
        raise InputError(
            "target is a composite, whose classes can change; clone into its target (composite.target), attach the "
            "clone to the composite, and calibrate all clones together"
        )
    for model, argument in ((source, "source"), (target, "target")):
        check_network(model, argument)
    check_run(flip, seed, batch_size, memory, team)
    check_choice(precision, "precision", get_args(Precision))
    names = task_classes(classes, source_classes, base_classes)
    given = stored_support(support, names.all, int(IMAGES_SHARE * memory))
    labels, store = support_labels(given, names), given.images
    n_given = len(store)
    _check_values(source, target, store, "support")
    if team.is_main:
        _warn_of_doubts(given)
    examples = store.read(torch.arange(min(n_given, _EXAMPLES)))
    if background is not None:
        store.keep(_unlabelled(background, store.shape))
        _check_values(source, target, store, "background")
    for model, own, argument in ((source, names.source, "source"), (target, names.base, "target")):
        _check_number(logits_without_values(model, examples), own, argument)  # before the recording, which takes longer
    _log.info("recording both networks on images %s", tuple(examples.shape[1:]))
    read = read_network(source, examples, names.source, "source"), read_network(target, examples, names.base, "target")
    if read[0].device != read[1].device:
        raise InputError(f"source is on {read[0].device}, target on {read[1].device}; move both to one device")
    numbers = torch.arange(n_given, len(store)).split(batch_size)
    seen = [_answers(read[1], store.read(rows)) for rows in numbers if len(rows)]
    task = CloneTask(
        source=read[0],
        target=read[1],
        new_classes=names.new,
        samples=samples_of(store, torch.cat([labels, *seen]), len(names.base), flip, seed),
        seed=seed,
        batch_size=batch_size,
        n_given=n_given,
        memory=memory,
        team=team,
        precision=precision,
        has_few_images=bool(labels.bincount()[len(names.base) :].min() <= FEW_IMAGES),
    )
    _check_team(task)
    return task


def check_task(task: object) -> None:
    """Refuse anything but a task as first argument of `scan` and `fit`."""
    if not isinstance(task, CloneTask):
        raise InputError(f"task: expected what pnc.prepare_task returns, got {type(task).__name__}")


def _check_values(source: nn.Module, target: nn.Module, images: ImageStore, argument: str) -> None:
    """Refuse images outside the range that a network declares."""
    for role, network in (("source", source), ("target", target)):
        check_range(images.value_range, network, role, argument)


def _warn_of_doubts(support: StoredSupport) -> None:
    """Warn once, with figures, of a support that cannot teach anything."""
    found = doubts(support.images, support.labels, support.names)
    if found:
        text = "; ".join([*found[:3], *([f"and {len(found) - 3} more"] if len(found) > 3 else [])])
        warnings.warn(f"support: {text}; were the images read correctly?", PNCWarning, stacklevel=4)


def _widened(tensor: Tensor) -> Tensor:
    """Return a bfloat16 tensor as float32; others as they are."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _unlabelled(background: Any, shape: tuple[int, ...]) -> Any:
    """Return the images of a background; the image store checks their values."""
    images = background.images if isinstance(background, ImageSet) else background
    if isinstance(images, Tensor) and images.ndim == 4 and images.shape[1:] != shape:
        came = tuple(images.shape[1:])
        raise InputError(f"background: expected images {shape} like the support's, got {came}; resize them")
    check_images(images, "background")
    return images


def _check_team(task: CloneTask) -> None:
    """Refuse a team whose processes have different supports, or more processes than images."""
    if task.team.size == 1:
        return
    samples = task.samples
    if len(samples.labels) < task.team.size:
        raise InputError(f"support: {len(samples.labels)} images are too few for {task.team.size} processes")
    image = samples.images[:1].double()
    own = torch.stack([samples.labels.double().sum(), samples.labels.double() @ samples.groups.double(), image.sum()])
    if not task.team.agree(own):
        raise InputError("support: the processes were given different images; give every process the same support")


def _answers(network: Network, images: Tensor) -> Tensor:
    """Return a network's predictions for images, (N,)."""
    with torch.no_grad():
        logits: Tensor = network.recording.module(images.to(network.device, network.recording.probe.dtype))
    return logits.argmax(1).cpu()
