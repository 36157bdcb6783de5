"""What is asked of every source of a zoo: the support, and what the target makes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pnc.clones.position_grids import pool
from pnc.data.folded_samples import samples_of, spread_rows
from pnc.data.image_set import ImageSet
from pnc.data.support import Support, stored_support
from pnc.foundation.tensor_bits import value_digests
from pnc.graph.cut_points import LOGITS, extract
from pnc.method.task import FEW_IMAGES, Network, read_network
from pnc.method.task_classes import support_labels, task_classes
from pnc.zoo.output_names import Names

N_EXAMPLES = 4
BATCH_SIZE = 32
"""Larger batches leave the processor's cache: 100 images of 32x32 take half the time in batches of 32."""


@dataclass(frozen=True, eq=False)
class Question:
    """A support and the target's answers to it: all that a source is looked at with, without the target.

    Attributes:
        images: (N, C, H, W), float32, mirror images among them.
        labels: (N,): base classes first, then the requested ones.
        groups: (N,), the number of the image that each row shows.
        folds: (N,), ascending: the fold in which each is held out.
        target_features: The target's pooled penultimate features, (N, D_t).
        base_logits: The target's logits, (N, K_base).
        classes: The requested classes.
        names: What sources call them, from the user.
        few: Whether some requested class has few images, see `CloneTask.has_few_images`.
        device: Where networks run.
    """

    images: Tensor
    labels: Tensor
    groups: Tensor
    folds: Tensor
    target_features: Tensor
    base_logits: Tensor
    classes: tuple[str, ...]
    names: Names
    few: bool
    device: str = "cpu"

    @property
    def n_base(self) -> int:
        """Number of the target's classes."""
        return self.base_logits.shape[1]

    @property
    def has_base(self) -> bool:
        """Whether there are images of base classes."""
        return bool((self.labels < self.n_base).any())

    @property
    def n_images(self) -> int:
        """Number of images, without mirror images."""
        return len(self.groups.unique())

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def select(self, rows: Tensor) -> "Question":
        """Return the question with some rows only, (N,) bool."""
        return question_from({name: tensor[rows] for name, tensor in self.tensors().items()}, self.facts())

    def spread(self, n_images: int) -> "Question":
        """Return the question with about so many images, the same share of each class and fold; itself if fewer."""
        if n_images >= self.n_images:
            return self
        return self.select(spread_rows(self.labels, self.groups, self.folds, n_images, self.n_base))

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def facts(self) -> dict[str, Any]:
        """Everything else, as JSON values."""
        names = {name: list(values) for name, values in self.names.items()}
        return {"classes": list(self.classes), "names": names, "few": self.few, "device": self.device}

    def digest(self) -> str:
        """Digest of all of it."""
        return "".join(value[:8] for value in value_digests(list(self.tensors().values()))) + repr(self.facts())


def question_from(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Question:
    """Make a question again from `tensors()` and `facts()`."""
    return Question(
        images=tensors["images"],
        labels=tensors["labels"],
        groups=tensors["groups"],
        folds=tensors["folds"],
        target_features=tensors["target_features"],
        base_logits=tensors["base_logits"],
        classes=tuple(facts["classes"]),
        names=facts["names"],
        few=facts["few"],
        device=facts["device"],
    )


def ask(
    target: Any,
    support: ImageSet | Support,
    classes: Sequence[str],
    base_classes: Sequence[str],
    names: Names,
    *,
    flip: bool,
    seed: int,
    max_images: int,
    memory: int,
) -> tuple[Question, Network]:
    """Check the target and the support, and run the target over it once.

    Args:
        target: The network that will receive the classes.
        support: Labelled images of the requested and of base classes.
        classes: The requested classes.
        base_classes: Names of the target's outputs, in order.
        names: What sources call the requested classes.
        flip: Use mirror images too.
        seed: Seed of the folds.
        max_images: At most about this many images are kept, spread over classes and folds.
        memory: At most about so many bytes of images are kept.
    Returns:
        The question, and the recorded target.
    Raises:
        InputError, ClassNameError, RecordingError: as `prepare_task`.
    """
    known = task_classes(classes, classes, base_classes)
    given = stored_support(support, known.all, memory)
    labels, store = support_labels(given, known), given.images
    network = read_network(target, store.read(torch.arange(min(N_EXAMPLES, len(store)))), known.base, "target")
    n_base = len(known.base)
    samples = samples_of(store, labels, n_base, flip, seed)
    n_kept = min(max_images, memory // (samples.images.n_bytes * (2 if flip else 1)))
    if n_kept < len(labels):
        samples = samples.select(samples.spread(n_kept, n_base))
    images = samples.images[torch.arange(len(samples.labels))]
    features, logits = features_and_logits(network, images)
    counts = labels.bincount(minlength=n_base + len(known.new))
    question = Question(
        images=images,
        labels=samples.labels,
        groups=samples.groups,
        folds=samples.folds,
        target_features=features,
        base_logits=logits,
        classes=known.new,
        names=names,
        few=bool(counts[n_base:].min() <= FEW_IMAGES),
        device=str(network.device),
    )
    return question, network


@torch.no_grad()
def features_and_logits(network: Network, images: Tensor) -> tuple[Tensor, Tensor]:
    """Run a network over images; its pooled penultimate features (N, D) and its logits (N, K), float32 on the CPU."""
    cut = network.head.features
    run = extract(network.recording, None, [cut, LOGITS])
    features, logits = [], []
    for batch in images.split(BATCH_SIZE):
        given = batch.to(network.device, memory_format=torch.channels_last)
        made, answers = run(given)
        features.append(pool(made, cut).float().cpu())
        logits.append(answers.float().cpu())
    return torch.cat(features), torch.cat(logits)
