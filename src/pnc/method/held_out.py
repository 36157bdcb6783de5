"""Runs the support through parts of the source, and scores heads on held-out samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pnc.clones.adapter import Stitched
from pnc.clones.heads import Head, SourceHead, source_head
from pnc.clones.position_grids import pool
from pnc.data.image_store import to_device
from pnc.foundation.errors import InputError
from pnc.graph.batch_norm_means import last_norm
from pnc.graph.classifier import ClassifierLayer
from pnc.graph.cut_points import LOGITS, CutPoint, extract
from pnc.method.adapter_fitting import CrossFitted
from pnc.method.head_fitting import HeadSamples, Stacking, choose_stacking, fit_stacked
from pnc.method.head_without_base import remembering_head
from pnc.method.task import CloneTask, Progress

SCORED_FOLD = 0
"""The fold that training by gradient leaves out and that scores the result."""
TAPPED_BYTES = 2**28
"""Approximate memory for the tensors at all cuts of one batch."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """Held-out result of each image of the support.

    Attributes:
        values: The mean over each image's copies, such as the share classified correctly, (I,), float64.
        is_base: Whether the image shows a base class, (I,), bool.
    """

    values: Tensor
    is_base: Tensor

    @property
    def average(self) -> tuple[float, float]:
        """Mean of the means over base and over new images (or over the only kind), and its standard error."""
        kinds = [part for part in (self.values[self.is_base], self.values[~self.is_base]) if len(part)]
        mean = sum(float(part.mean()) for part in kinds) / len(kinds)
        variance = sum(float(part.var(correction=0)) / len(part) for part in kinds) / len(kinds) ** 2
        return mean, variance**0.5

    def of(self, base: bool) -> float | None:
        """Mean over base or over new images; None if there are none."""
        part = self.values[self.is_base == base]
        return float(part.mean()) if len(part) else None

    def minus(self, other: "Outcome") -> tuple[float, float]:
        """Difference of both averages, and its standard error, which is small because the images are the same."""
        return replace(self, values=self.values - other.values).average


def unscored(task: CloneTask) -> CloneTask:
    """Return the task without the fold that scores a clone; the task itself if nothing can be held out."""
    if task.samples.n_folds == 1:
        return task
    return replace(task, samples=task.samples.select(task.samples.folds != SCORED_FOLD))


def source_body(task: CloneTask, cut: CutPoint) -> fx.GraphModule:
    """The source from `cut` to its penultimate features, over the source's own weights."""
    return extract(task.source.recording, cut, [task.source.head.features])


def run_parts(
    task: CloneTask, parts: Sequence[tuple[CrossFitted, nn.Module]], progress: Progress | None = None
) -> list[HeadSamples]:
    """Run the support once through the target and the given parts of the source behind their adapters.

    Each image passes the adapter that was fitted without its fold.

    Args:
        task: Gives support and target.
        parts: Adapters, each with the source from its cut to the penultimate features.
        progress: Called after each batch.
    Returns:
        The samples to fit heads on, for each part.
    Raises:
        InputError: there are no base samples, and the source's logits are not a linear map of its pooled features.
    """
    cuts = list(dict.fromkeys(fitted.adapter.target_cut for fitted, _ in parts))
    seen = features_seen(task)
    trunk = extract(task.target.recording, None, [*cuts, seen, LOGITS])
    target_features, base_logits, places = [], [], []
    clone_features: list[list[Tensor]] = [[] for _ in parts]
    for _, fold, place, images in batches(task, cuts, "scoring positions", progress):
        with torch.no_grad(), task.autocast():
            *tensors, features, logits = trunk(to_device(images, task.target.device))
            at_cut = dict(zip(cuts, tensors, strict=True))
            target_features.append(pool(features, seen).float().cpu())
            base_logits.append(logits.float().cpu())
            places.append(torch.arange(place.start, place.stop))
            for (fitted, body), collected in zip(parts, clone_features, strict=True):
                stitched = Stitched(fitted.held_out[fold], body, task.source.head.features)
                collected.append(stitched(at_cut[fitted.adapter.target_cut]).float().cpu())
    rows = torch.cat(places)
    columns = (target_features, base_logits, *clone_features)
    seen_rows, logit_rows, *made = (task.team.gather(torch.cat(one), rows, len(task.samples.labels)) for one in columns)
    return [head_samples(task, seen_rows, logit_rows, one) for one in made]


def head_samples(task: CloneTask, target_features: Tensor, base_logits: Tensor, clone_features: Tensor) -> HeadSamples:
    """Return the samples to fit heads on: all rows of the task, on the CPU.

    Args:
        task: Gives labels, folds and the source's own classifier.
        target_features: Of the target at `features_seen`, pooled, (N, D_t).
        base_logits: The target's logits, (N, K_base).
        clone_features: The pooled features of a part of the source, (N, D_s).
    Raises:
        InputError: there are no base samples, and the source's logits are not a linear map of its pooled features.
    """
    own = own_head(task)
    return HeadSamples(
        target_features=target_features,
        clone_features=clone_features,
        base_logits=base_logits,
        own_logits=F.linear(clone_features, own.weight, own.bias),
        labels=task.samples.labels,
        folds=task.samples.folds,
        n_classes=task.n_base + len(task.new_classes),
        few=task.has_few_images,
    )


@dataclass(frozen=True, eq=False)
class Judged:
    """Held-out logits of a head, and how to fit it.

    Attributes:
        stacking: Mixing weights of the head; None without base samples, when it is the source's own classifier.
        logits: Logits of each sample by a head fitted without it: of all classes, (N, K_base + K_new), or without base
            samples of the new ones, (N, K_new).
        labels: Indices of the right classes among these logits, (N,).
    """

    stacking: Stacking | None
    logits: Tensor
    labels: Tensor

    @property
    def correct(self) -> Tensor:
        """Which samples are classified correctly when held out, (N,) bool."""
        return self.logits.argmax(1) == self.labels

    @property
    def log_likelihoods(self) -> Tensor:
        """Log-probability of each sample's class when held out, (N,)."""
        return -F.cross_entropy(self.logits, self.labels, reduction="none")

    def on(self, samples: HeadSamples) -> "Judged":
        """Return the same heads, judged on other features of the same samples."""
        if self.stacking is None:
            return judge(samples)
        stacking = self.stacking.on(samples)
        return Judged(stacking, stacking.logits, samples.labels)

    def lowered(self, nats: float) -> "Judged":
        """Return the same with all new logits lowered by so many nats; only with base samples."""
        assert self.stacking is not None
        stacking = self.stacking.lowered(nats)
        return Judged(stacking, stacking.logits, self.labels)


def judge(samples: HeadSamples) -> Judged:
    """Choose the head that the support allows, and score it on held-out samples from `run_parts`."""
    if samples.has_base:
        stacking = choose_stacking(samples)
        return Judged(stacking, stacking.logits, samples.labels)
    return Judged(None, samples.own_logits, samples.labels - samples.n_base)


def fit_head(task: CloneTask, samples: HeadSamples, judged: Judged) -> Head:
    """Fit the chosen head on all samples."""
    own, norm = own_head(task), last_norm(task.target.recording)
    if judged.stacking is not None:
        return fit_stacked(samples, judged.stacking, own)
    return own if norm is None else remembering_head(samples, norm.mean, own)


def features_seen(task: CloneTask) -> CutPoint:
    """Return the cut of the target that heads read: its penultimate features, or without base samples its last norm."""
    norm = None if task.has_base else last_norm(task.target.recording)
    return task.target.head.features if norm is None else norm.cut


def outcome_of(measured: Tensor, task: CloneTask, rows: Tensor | None = None) -> Outcome:
    """Average per-sample results image by image: copies of an image are one observation.

    Args:
        measured: A result for each sample, (M,), such as whether it was classified correctly.
        task: Gives the support.
        rows: The samples that were measured, (N,) bool; None for all.
    """
    labels, groups = task.samples.labels, task.samples.groups
    if rows is not None:
        labels, groups = labels[rows], groups[rows]
    return image_outcome(measured, labels, groups, task.n_base)


def counts_for_score(task: CloneTask) -> Tensor:
    """Which samples a score counts, (N,) bool: not those that the target labelled, if others show base classes."""
    given = ~task.background
    shows_base = bool((given & (task.samples.labels < task.n_base)).any())
    return given if shows_base else torch.ones_like(given)


def score_of(correct: Tensor, task: CloneTask, rows: Tensor | None = None) -> Outcome:
    """Average which samples were right, (N,), image by image, over those that count and are in `rows`, (N,) bool."""
    counted = counts_for_score(task) if rows is None else counts_for_score(task) & rows
    return outcome_of(correct[counted], task, counted)


def image_outcome(measured: Tensor, labels: Tensor, groups: Tensor, n_base: int) -> Outcome:
    """As `outcome_of`, for samples given by their labels and by the numbers of the images that they show, (M,) each."""
    images, index = groups.unique(return_inverse=True)
    values = torch.zeros(len(images), dtype=torch.float64)
    values.scatter_reduce_(0, index, measured.double(), "mean", include_self=False)
    is_base = torch.zeros(len(images), dtype=torch.bool)
    is_base[index] = labels < n_base
    return Outcome(values, is_base)


def outcome_of_part(part: Judged, unseen: Judged, whole: Judged, task: CloneTask) -> tuple[Outcome, float]:
    """Estimate the held-out result of a part that was made on the images that score it.

    The estimate is the result of the whole source at the same position, which was not trained on them, plus the change
    in the probability of the right class: on few images, probabilities are far less noisy than counts of right and
    wrong. Changes are scaled by the whole source's error rate over the probability that it gives to wrong classes. The
    benefit of having seen the images is subtracted: the probability that the part gives to the right classes of one
    fold beyond the same part made without this fold, if positive.

    Args:
        part: The part, judged on all samples.
        unseen: The part made without the fold `SCORED_FOLD`.
        whole: The source's part with all its channels and its own weights.
        task: Gives the support.
    Returns:
        The outcome, and the standard error of what was subtracted.
    """
    rows = task.samples.folds == SCORED_FOLD
    likely, without, own = (one.log_likelihoods.double().exp() for one in (part, unseen, whole))
    right, sure = score_of(whole.correct, task), score_of(own, task)
    wrong = max(1 - right.average[0], 1 / len(right.values))
    scale = min(1.0, wrong / max(1 - sure.average[0], 1e-9))
    gain, error = score_of(scale * (likely - without), task, rows).average
    return score_of(whole.correct.double() + scale * (likely - own) - max(0.0, gain), task), error


def base_drop_facts(samples: HeadSamples, judged: Judged, task: CloneTask) -> dict[str, float]:
    """Return the recipe's entry for the share of held-out base images that only the target alone gets right.

    Empty if there are no base images, or none could be held out.
    """
    is_base = samples.labels < samples.n_base
    if judged.stacking is None or samples.folds.max() == 0 or not is_base.any():
        return {}
    lost = (samples.base_logits.argmax(1) == samples.labels) & ~judged.correct
    return {"expected_base_drop": outcome_of(lost[is_base], task, is_base).average[0]}


def own_head(task: CloneTask) -> SourceHead:
    """Return the source's classifier of the new classes, on the CPU; zeros if it is not linear on pooled features.

    Raises:
        InputError: it is not, and there are no base samples to fit another head on.
    """
    own = head_of_classes(task.source.head, task.source_ids)
    if own is None and not task.has_base:
        raise InputError(
            "support: without base samples the clone uses the source's own classifier, which here is not a linear "
            "layer on pooled features; give some samples of every base class"
        )
    return SourceHead(len(task.new_classes), task.source.head.features.n_channels) if own is None else own


def head_of_classes(layer: ClassifierLayer, ids: Sequence[int]) -> SourceHead | None:
    """Return a network's own classifier of some outputs, on the CPU; None if it is not linear on pooled features."""
    if layer.weight is None or layer.features.n_prefix_tokens:
        return None
    bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
    return source_head(layer.weight[ids].float().cpu(), bias[ids].float().cpu())


def batches(
    task: CloneTask, cuts: Sequence[CutPoint], what: str, progress: Progress | None, with_first: bool = False
) -> Iterator[tuple[int, int, slice, Tensor]]:
    """Yield number, fold, slice and images of the batches that this process runs.

    Batches are as large as the memory for the tensors at `cuts` allows; `with_first` adds the first batch.
    """
    samples = task.samples
    size = max(1, min(task.batch_size, TAPPED_BYTES // (4 * sum(cut.size for cut in cuts))))
    size = min(size, len(samples.labels) // task.team.size)  # so that each process has a batch
    for number, (fold, place) in enumerate(samples.rows(size)):
        if task.team.is_mine(number) or (with_first and number == 0):
            yield number, fold, place, samples.images[place]
        if progress is not None:
            progress(what, place.stop, len(samples.labels))
