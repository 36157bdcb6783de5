"""The loss of localization and tuning: how far a part's outputs are from the source's own answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pnc.clones.position_grids import pool
from pnc.composite.layer_folding import folded
from pnc.data.image_store import to_device
from pnc.graph.cut_points import LOGITS, CutPoint, extract
from pnc.method.discriminants import fit_discriminants
from pnc.method.task import CloneTask

MARGIN = 3.0
"""Nats by which logits of classes that are not cloned must stay below those of the cloned ones."""
LOGITS_WEIGHT = 0.3
"""Weight of the cloned classes' logits in the loss."""
SHRINKAGE = 0.2


@dataclass(frozen=True, eq=False)
class Answers:
    """The source's own answers to images.

    Attributes:
        features: Penultimate features, pooled, (N, D_s).
        logits: Logits of the cloned classes, (N, K_new).
        inner: Tensors inside the source, each (N, ...).
    """

    features: Tensor
    logits: Tensor
    inner: tuple[Tensor, ...] = ()

    def select(self, rows: Tensor) -> "Answers":
        """Keep the given rows."""
        return Answers(self.features[rows], self.logits[rows], tuple(tensor[rows] for tensor in self.inner))


class Aim:
    """The aim of a part: the source's features, where they matter, and no class except the cloned ones.

    The loss has four terms: the squared distance from the source's own features in units of their variance, except for
    a shift common to all samples, which heads compensate; the same along the discriminants of the classes in the
    support; the squared distance of the cloned classes' logits, in units of their variance; and, if the source knows
    other classes, a penalty unless their logits stay `MARGIN` below the source's own logits of the cloned ones. The
    last term makes the part forget the other classes; without the free shift it keeps less and forgets less.

    Args:
        task: Gives the source; variances and discriminants are those of its support.
        inner: Cut points of the source, whose tensors the answers hold too.

    Attributes:
        support: The source's answers to the support, without inner tensors.
    """

    def __init__(self, task: CloneTask, inner: Sequence[CutPoint] = ()) -> None:
        self._features, self._device = task.source.head.features, task.source.device
        self._teacher = folded(extract(task.source.recording, None, [self._features, LOGITS, *inner]))
        self._cloned, self._batch_size = task.source_ids, task.batch_size
        (features, logits), _ = task.run(lambda images: self._answers(images)[:2], task.source.device)
        self.support = Answers(features, logits)
        self._scale = _above_zero(self.support.features.var(0, correction=0)).sqrt()
        self._logit_scale = _above_zero(self.support.logits.var(0, correction=0)).mean().sqrt()
        discriminants = _discriminants(self.support.features, task.samples.labels)
        spread = (self.support.features @ discriminants).var(correction=0)
        self._discriminants = discriminants / _above_zero(spread).sqrt()
        self._others = [place for place in range(len(task.source.classes)) if place not in self._cloned]
        self._classifier = extract(task.source.recording, self._features, [LOGITS])

    def answers(self, images: Tensor) -> Answers:
        """Return the source's answers to any images (B, C, H, W), in float32."""
        with torch.no_grad():
            found = [self._answers(to_device(some, self._device)) for some in images.split(self._batch_size)]
        features, logits, *inner = (torch.cat(tensors).float() for tensors in zip(*found, strict=True))
        return Answers(features, logits, tuple(inner))

    def _answers(self, images: Tensor) -> tuple[Tensor, ...]:
        features, logits, *inner = self._teacher(images)
        return pool(features, self._features), logits[:, self._cloned], *inner

    def loss(self, outputs: Tensor, wanted: Answers) -> Tensor:
        """Return the mean loss of a batch of outputs; `wanted` are the source's answers to the same images."""
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
    """Directions of features (N, D) that separate the classes, one for each class in `labels`, (D, K)."""
    classes, places = labels.unique(return_inverse=True)
    weight, _ = fit_discriminants(features.cpu(), places, len(classes), SHRINKAGE)
    return (weight - weight.mean(0)).T.to(features)


def _above_zero(variance: Tensor) -> Tensor:
    """Replace zero variances by something small."""
    return variance.clamp_min(1e-6 * float(variance.max()) + 1e-12)
