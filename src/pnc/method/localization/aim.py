"""What a part of the source shall give for images: what localization and tuning are both trained towards."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pnc.clones.position_grids import pool
from pnc.data.image_store import to_device
from pnc.graph.cut_points import LOGITS, extract
from pnc.method.discriminants import fit_discriminants
from pnc.method.task import CloneTask

MARGIN = 3.0
"""Nats by which the logits of classes that are not cloned shall stay below those of the cloned ones."""
LOGITS_WEIGHT = 0.3
"""Of the cloned classes' logits, beside the features, in what a part shall give."""
SHRINKAGE = 0.2


@dataclass(frozen=True, eq=False)
class Answers:
    """What the source itself says of images.

    Attributes:
        features: Its penultimate features, pooled, (N, D_s).
        logits: Its logits of the cloned classes, (N, K_new).
    """

    features: Tensor
    logits: Tensor

    def select(self, rows: Tensor) -> "Answers":
        """Keep the given rows."""
        return Answers(self.features[rows], self.logits[rows])


class Aim:
    """What a part shall give: the source's features, where they matter, and no class but the cloned.

    Four terms: the squared distance from the source's own features in units of their variance, but for a shift that all
    samples share, which heads make up for; the same along the discriminants of the classes at hand; the squared
    distance of the cloned classes' logits, likewise in units; and, where the source knows classes that are not cloned,
    what their logits lack to stay by `MARGIN` below what the source itself says of the cloned ones. The last one makes
    the part forget the others, for which the free shift leaves it room: where the shift counts, the part keeps
    less and forgets less.

    Args:
        task: Whose source; units and discriminants are those of its support.

    Attributes:
        support: What the source says of the support.
    """

    def __init__(self, task: CloneTask) -> None:
        self._features, self._device = task.source.head.features, task.source.device
        self._teacher = extract(task.source.recording, None, [self._features, LOGITS])
        self._cloned = task.source_ids
        found, _ = task.run(self._answers, task.source.device)
        self.support = Answers(*found)
        self._scale = _above_zero(self.support.features.var(0, correction=0)).sqrt()
        self._logit_scale = _above_zero(self.support.logits.var(0, correction=0)).mean().sqrt()
        discriminants = _discriminants(self.support.features, task.samples.labels)
        spread = (self.support.features @ discriminants).var(correction=0)
        self._discriminants = discriminants / _above_zero(spread).sqrt()
        self._others = [place for place in range(len(task.source.classes)) if place not in self._cloned]
        self._classifier = extract(task.source.recording, self._features, [LOGITS])

    def answers(self, images: Tensor) -> Answers:
        """What the source says of any images (B, C, H, W), in float32."""
        with torch.no_grad():
            features, logits = self._answers(to_device(images, self._device))
        return Answers(features.float(), logits.float())

    def _answers(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self._teacher(images)
        return pool(features, self._features), logits[:, self._cloned]

    def loss(self, outputs: Tensor, wanted: Answers) -> Tensor:
        """The mean over a batch of the part's outputs; `wanted` are the source's answers for the same images."""
        missed = pool(outputs, self._features) - wanted.features
        missed = missed - missed.mean(0)
        logits = self._classifier(outputs)
        loss: Tensor = (missed / self._scale).square().mean() + (missed @ self._discriminants).square().mean()
        distance = (logits[:, self._cloned] - wanted.logits) / self._logit_scale
        loss = loss + LOGITS_WEIGHT * distance.square().mean()
        if self._others:
            others = logits[:, self._others].logsumexp(1)
            loss = loss + F.softplus(others + MARGIN - wanted.logits.logsumexp(1)).mean()
        return loss


def _discriminants(features: Tensor, labels: Tensor) -> Tensor:
    """Directions of features (N, D) that tell classes apart, one for each class that there is, (D, K)."""
    classes, places = labels.unique(return_inverse=True)
    weight, _ = fit_discriminants(features.cpu(), places, len(classes), SHRINKAGE)
    return (weight - weight.mean(0)).T.to(features)


def _above_zero(variance: Tensor) -> Tensor:
    """Variances, those of what never moves replaced by something small."""
    return variance.clamp_min(1e-6 * float(variance.max()) + 1e-12)
