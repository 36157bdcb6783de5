"""A quick look at one source: one pass over the support, and a cross-validated head on both networks' features."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pnc.foundation.errors import InputError
from pnc.method.head_fitting import HeadSamples
from pnc.method.held_out import Judged, Outcome, head_of_classes, image_outcome, judge
from pnc.method.task import Network, read_network
from pnc.zoo.model_zoo import Zoo
from pnc.zoo.output_names import outputs_by_name, renamed, stand_ins
from pnc.zoo.question import N_EXAMPLES, Question, features_and_logits

N_KEPT = 4
"""Recorded networks that are kept for others of their architecture."""

Named = Literal["all", "some", "none"]


@dataclass(frozen=True)
class Look:
    """What a look at a source found, as JSON values.

    Attributes:
        name: Of its entry.
        named: Whether the source names all, some or none of the requested classes.
        source_classes: Names of its outputs for `pnc.clone`: the requested classes have an output each.
        accuracy: Share of held-out images classified correctly, the mean of base and new ones.
        standard_error: Of this share, from the number of images.
        probability: Mean probability of the right class, over the same images.
        log_loss: Their log-loss, in nats.
        n_macs: Multiply-accumulates that the clone adds to the target's for an image.
        macs_share: The same as a share of the whole source's.
        n_params: Parameters that run for it.
        n_images: Number of images of the support that were looked at.
        base_probabilities: Held-out probability of the right class, of each base image.
        new_probabilities: The same of each image of a requested class. Both are in the same order for every source.
        position: Names of the cuts where the clone leaves the target and enters the source, after a scan; None before,
            for the whole source.
    """

    name: str
    named: Named
    source_classes: tuple[str, ...]
    accuracy: float
    standard_error: float
    probability: float
    log_loss: float
    n_macs: int
    macs_share: float
    n_params: int
    n_images: int
    base_probabilities: tuple[float, ...]
    new_probabilities: tuple[float, ...]
    position: tuple[str, str] | None = None

    def facts(self) -> dict[str, Any]:
        """Return the look as JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def summary(self) -> dict[str, Any]:
        """Return the facts without those of single images."""
        return {key: value for key, value in self.facts().items() if not key.endswith("_probabilities")}


def look_from(facts: Mapping[str, Any]) -> Look:
    """Make a look again from its `facts`, perhaps read from JSON."""
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
    return Look(**given)


@dataclass(frozen=True, eq=False)
class Seen:
    """A source's answers to a question.

    Attributes:
        features: Its pooled penultimate features, (N, D).
        logits: Its logits, (N, K).
        outputs: The output that stands for each requested class.
        own_logits: The logits of these as a linear map of the features, (N, K_new); zeros if they are none.
        named: Whether the source names the requested classes.
    """

    features: Tensor
    logits: Tensor
    outputs: list[int]
    own_logits: Tensor
    named: Named


def see(question: Question, network: Network) -> Seen:
    """Run a source over the images of a question.

    Raises:
        InputError: it has fewer outputs than there are requested classes.
    """
    features, logits = features_and_logits(network, question.images)
    by_name = outputs_by_name(question.classes, question.names, network.classes)
    is_new = question.labels >= question.n_base
    new_labels = question.labels[is_new] - question.n_base
    outputs = stand_ins(by_name, logits[is_new].log_softmax(1), new_labels)
    if outputs is None:
        raise InputError(
            f"source: it has {len(network.classes)} outputs, too few for {len(question.classes)} classes of which it "
            f"names {sum(one is not None for one in by_name)}"
        )
    head = head_of_classes(network.head, outputs)
    own = torch.zeros(len(features), len(outputs)) if head is None else F.linear(features, head.weight, head.bias)
    n_named = sum(one is not None for one in by_name)
    named: Named = "all" if n_named == len(by_name) else "some" if n_named else "none"
    return Seen(features, logits, outputs, own, named)


def judged_of(question: Question, seen: Seen) -> Judged:
    """Fit a head on both networks' features in each fold, and judge it on the images of the fold."""
    samples = HeadSamples(
        target_features=question.target_features,
        clone_features=seen.features,
        base_logits=question.base_logits,
        own_logits=seen.own_logits,
        labels=question.labels,
        folds=question.folds,
        n_classes=question.n_base + len(question.classes),
        few=question.few,
    )
    return judge(samples)


class Sources:
    """Loads and records sources, one after the other, for the images of a question.

    Reference networks of one architecture are built and recorded once, and then only given other weights: their graph
    does not depend on these. Few are kept, since each takes memory.

    Args:
        zoo: Where they are.
        question: What they are asked.
    """

    def __init__(self, zoo: Zoo, question: Question) -> None:
        self._zoo, self._question = zoo, question
        self._known: dict[tuple[Any, ...], Network] = {}

    def network(self, name: str) -> Network:
        """A source, valid until the next one is asked for.

        Raises:
            PNCError: the network cannot be loaded or recorded, or does not take such images.
        """
        entry = self._zoo.entry(name)
        key = entry.spec, len(entry.classes), entry.input_shape, repr(entry.preprocessing)
        known = self._known.pop(key, None)
        if known is None:
            made = self._zoo.load(name, self._question.input_shape)
            images = self._question.images[:N_EXAMPLES]
            known = read_network(made.module.to(self._question.device), images, entry.classes, "source")
        else:
            self._zoo.load_into(known.model, name)
        if entry.spec.startswith("zoo:"):
            self._known[key] = known
        if len(self._known) > N_KEPT:
            self._known.pop(next(iter(self._known)))
        return replace(known, classes=entry.classes)

    def look_at(self, name: str) -> Look:
        """Look at a source."""
        network = self.network(name)
        return look_of(name, network, see(self._question, network), self._question)


def look_of(name: str, network: Network, seen: Seen, question: Question) -> Look:
    """Judge what was seen of a source."""
    judged = judged_of(question, seen)

    def averaged(values: Tensor) -> Outcome:
        return image_outcome(values, question.labels, question.groups, question.n_base)

    (accuracy, error), features = averaged(judged.correct).average, network.head.features
    likely = averaged(judged.log_likelihoods.double().exp())
    return Look(
        name=name,
        named=seen.named,
        source_classes=renamed(network.classes, seen.outputs, question.classes),
        accuracy=accuracy,
        standard_error=error,
        probability=likely.average[0],
        log_loss=-averaged(judged.log_likelihoods).average[0],
        n_macs=features.n_macs,
        macs_share=features.n_macs / max(network.n_macs, 1),
        n_params=features.n_params,
        n_images=question.n_images,
        base_probabilities=tuple(likely.values[likely.is_base].tolist()),
        new_probabilities=tuple(likely.values[~likely.is_base].tolist()),
    )
