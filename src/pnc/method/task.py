"""A cloning task: two recorded networks, their class names and the support, every doubt settled at the door."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pnc.composite.composite import Composite
from pnc.data.folded_samples import Samples, samples_of
from pnc.data.image_range import check_range
from pnc.data.image_set import ImageSet
from pnc.data.image_store import MEMORY, ImageStore, check_images, to_device
from pnc.data.support import StoredSupport, doubts, stored_support
from pnc.foundation.argument_checks import check_choice
from pnc.foundation.class_names import MAX_TEXT, check_class_names, class_ids, is_name, listed
from pnc.foundation.errors import ClassNameError, InputError, PNCWarning, RecordingError
from pnc.foundation.network_state import like_images, undisturbed
from pnc.foundation.plain_text import few_names
from pnc.foundation.process_team import ALONE, Team
from pnc.graph.classifier import ClassifierLayer, find_head
from pnc.graph.forward_prints import ForwardPrint, forward_print
from pnc.graph.recording import Recording, info, record
from pnc.method.settings import check_network, check_run

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the steps done, and the steps in all."""

Precision = Literal["float32", "bfloat16"]
"""What networks compute in while a clone is made."""

_EXAMPLES = 4
FEW_IMAGES = 5
"""Of a new class: up to so many, the exact position goes first and the head stays near the ensemble's."""
_NAMES = {"source": "source_classes", "target": "base_classes", "model": "classes"}
IMAGES_SHARE = 0.5
"""Of the memory, what images may take before they go to a file."""


@dataclass(frozen=True, eq=False)
class Network:
    """A recorded classifier, its head, and the names of its outputs in order."""

    model: nn.Module
    recording: Recording
    head: ClassifierLayer
    classes: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        """Where its images must be."""
        return self.recording.probe.device

    @property
    def n_macs(self) -> int:
        """Multiply-accumulates of one sample through the whole network."""
        return sum(info(node).n_macs for node in self.recording.module.graph.nodes)

    @cached_property
    def forward_print(self) -> ForwardPrint:
        """What it does with its weights."""
        return forward_print(self.model, self.recording)

    @property
    def n_params(self) -> int:
        """Parameters that the forward pass uses."""
        return sum(info(node).n_params for node in self.recording.module.graph.nodes)


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
        memory: Bytes that may be kept of the support at a time, beside what a batch takes.
        team: The processes that share the work.
        precision: What networks compute in while they are run; what is solved and summed is float32 or more.
        has_few_images: Some new class has at most `FEW_IMAGES` in the support, so that held-out images say little.
    """

    source: Network
    target: Network
    new_classes: tuple[str, ...]
    samples: Samples
    seed: int
    batch_size: int
    n_background: int = 0
    memory: int = MEMORY
    team: Team = ALONE
    precision: Precision = "float32"
    has_few_images: bool = False

    def autocast(self) -> torch.autocast:
        """A block in which networks run in the task's precision."""
        return torch.autocast(self.target.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def within(self, n_bytes: int, share: float = 0.25) -> "CloneTask":
        """The same task with as much of its support as fits into a share of its memory, spread over classes and folds.

        Args:
            n_bytes: What is kept of one sample.
            share: Of `memory`.
        """
        n_samples, n_images = len(self.samples.labels), len(self.samples.groups.unique())
        n_kept = int(share * self.memory) // max(n_bytes, 1) * n_images // n_samples
        return self.reduced(n_kept)

    def reduced(self, n_images: int) -> "CloneTask":
        """The same task with about that many images of its support, spread over classes and folds; all, if fewer."""
        if n_images >= len(self.samples.groups.unique()):
            return self
        return replace(self, samples=self.samples.select(self.samples.spread(n_images, self.n_base)))

    @torch.no_grad()
    def run(
        self, function: Callable[[Tensor], tuple[Tensor, ...]], device: torch.device
    ) -> tuple[tuple[Tensor, ...], list[slice]]:
        """Run a function over the support, batch by batch; the processes of the team share the batches.

        Args:
            function: From images (B, C, H, W) to tensors (B, ...), of the same shapes and dtypes for all batches.
            device: Where the images go first.
        Returns:
            What it gives for all samples, (N, ...) each, and the places of the batches, none of which has two folds.
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
    def _batch_size(self) -> int:
        """At most `batch_size`, and so that each process has a batch."""
        return min(self.batch_size, len(self.samples.labels) // self.team.size)

    def close(self) -> None:
        """Remove the temporary file that images were put into, if there is one."""
        self.samples.images.close()

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
                f"; where it takes other images than the support's, wrap it: pnc.Preprocessed({argument}, (C, H, W), "
                "mean, std) with the channels and size that it was trained on"
            )
        )
        raise RecordingError(f"{argument} on images {tuple(example.shape[1:])}: {error}{hint}") from error
    if not recording.probe_logits.isfinite().all():
        raise InputError(f"{argument} gives NaN or infinite logits on noise like the support; check its weights")
    if recording.n_classes != len(names):
        raise ClassNameError(
            f"{_NAMES[argument]} has {len(names)} names, the {argument} gives {recording.n_classes} logits; "
            "name every output, in order"
        )
    return Network(model, recording, head, names)


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
        memory: Bytes that may be kept of the support at a time; what is beyond is in a temporary file, or is left out
            where a part of the support says enough.
        team: The processes that make the clone together, each called with the same arguments.
        precision: What networks compute in.
    Raises:
        InputError: source and target are one object, the support lacks samples of a new class, or the background
            images are none, or of another shape.
        ClassNameError: a class is unknown, given twice, or known to the target already.
        RecordingError: a network cannot be recorded.

    >>> pnc.prepare_task(source, target, support, classes=["cat", "dog"], **names).new_classes
    ('cat', 'dog')
    """
    if source is target:
        raise InputError("source and target are the same object; load the network twice if this is meant")
    if isinstance(target, nn.Module) and any(isinstance(module, Composite) for module in target.modules()):
        raise InputError(
            "target is a composite, whose classes come and go; clone into the network in it (composite.target), "
            "attach that clone to the composite too, and calibrate them together"
        )
    for model, argument in ((source, "source"), (target, "target")):
        check_network(model, argument)
    check_run(flip, seed, batch_size, memory, team)
    check_choice(precision, "precision", get_args(Precision))
    base = check_class_names(base_classes, "base_classes")
    known = check_class_names(source_classes, "source_classes")
    new = _new_classes(classes, known, base)
    unwritable = next((name for name in (*base, *new) if not is_name(name)), None)
    if unwritable is not None:
        raise ClassNameError(
            f"classes: {unwritable!r:.100} is no printable text of at most {MAX_TEXT} characters; rename it"
        )
    left_out = tuple(name for name in known if name not in {*base, *new})
    given = stored_support(support, (*base, *new, *left_out), int(IMAGES_SHARE * memory))
    labels, store = _places(given, base, new, left_out), given.images
    n_given = len(store)
    _check_values(source, target, store, "support")
    if team.is_main:
        _warn_of_doubts(given)
    examples = store.read(torch.arange(min(n_given, _EXAMPLES)))
    if background is not None:
        store.keep(_unlabelled(background, store.shape))
        _check_values(source, target, store, "background")
    read = read_network(source, examples, known, "source"), read_network(target, examples, base, "target")
    if read[0].device != read[1].device:
        raise InputError(f"source is on {read[0].device}, target on {read[1].device}; move both to one device")
    numbers = torch.arange(n_given, len(store)).split(batch_size)
    seen = [_answers(read[1], store.read(rows)) for rows in numbers if len(rows)]
    task = CloneTask(
        source=read[0],
        target=read[1],
        new_classes=new,
        samples=samples_of(store, torch.cat([labels, *seen]), len(base), flip, seed),
        seed=seed,
        batch_size=batch_size,
        n_background=len(store) - n_given,
        memory=memory,
        team=team,
        precision=precision,
        has_few_images=bool(labels.bincount(minlength=len(base))[len(base) :].min() <= FEW_IMAGES),
    )
    _check_team(task)
    return task


def check_task(task: object) -> None:
    """Refuse what is no task, as the first argument of the steps of `clone`."""
    if not isinstance(task, CloneTask):
        raise InputError(f"task: expected what pnc.prepare_task gives, got {type(task).__name__}")


def _check_values(source: nn.Module, target: nn.Module, images: ImageStore, argument: str) -> None:
    """Refuse images outside of the range that one of the networks says that it takes."""
    for role, network in (("source", source), ("target", target)):
        check_range(images.value_range, network, role, argument)


def _warn_of_doubts(support: StoredSupport) -> None:
    """Warn once, with figures, of a support that nothing can be learned from."""
    found = doubts(support.images, support.labels, support.names)
    if found:
        text = "; ".join([*found[:3], *([f"and so on ({len(found)} in all)"] if len(found) > 3 else [])])
        warnings.warn(f"support: {text}; were the images read rightly?", PNCWarning, stacklevel=4)


def _widened(tensor: Tensor) -> Tensor:
    """What was computed in bfloat16 as float32; the rest as it is."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _unlabelled(background: Any, shape: tuple[int, ...]) -> Any:
    """The images of a background; what they are is checked by whoever keeps them."""
    images = background.images if isinstance(background, ImageSet) else background
    if isinstance(images, Tensor) and images.ndim == 4 and images.shape[1:] != shape:
        came = tuple(images.shape[1:])
        raise InputError(f"background: expected images {shape} like the support's, got {came}; resize them")
    check_images(images, "background")
    return images


def _check_team(task: CloneTask) -> None:
    """Refuse a team that was not given the same support, or that has more members than there are images."""
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


def _places(support: StoredSupport, base: tuple[str, ...], new: tuple[str, ...], left_out: tuple[str, ...]) -> Tensor:
    """Labels of a support as places among base and new classes, (N,)."""
    names = (*base, *new)
    counts = support.labels.bincount(minlength=len(support.names)).tolist()
    seen = {name: count for name, count in zip(support.names, counts, strict=True) if count}
    dropped = [name for name in left_out if name in seen]
    if dropped:
        raise ClassNameError(
            f"support has samples of {listed(dropped)}, which the source knows but `classes` leaves out: drop these "
            "samples, as [sample for sample in support if its class is wanted], or clone these classes too"
        )
    foreign = sorted(set(seen) - set(names))
    if foreign:
        raise ClassNameError(
            f"support has samples of {listed(foreign)}, neither a base class nor a class to clone; leave them out"
        )
    missing = [name for name in new if name not in seen]
    if missing:
        raise InputError(f"support has no sample of {listed(missing)}; every class to clone needs at least one")
    place = torch.tensor([names.index(name) if name in names else -1 for name in support.names])
    return place[support.labels]
