"""Running the support through parts of the source, and judging what heads make of it on held-out samples."""

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
from pnc.graph.cut_points import LOGITS, CutPoint, extract
from pnc.method.adapter_fitting import CrossFitted
from pnc.method.head_fitting import HeadSamples, Stacking, choose_stacking, fit_stacked
from pnc.method.head_without_base import remembering_head
from pnc.method.task import CloneTask, Progress

SCORED_FOLD = 0
"""The fold that what is learned by gradient leaves out, to be scored on it."""
TAPPED_BYTES = 2**28
"""Memory for the tensors at all cuts that one batch of images takes, about."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """How each image of the support fared when it was held out.

    Attributes:
        values: What was measured of the image's copies, such as whether they were classified right: the mean, (I,),
            float64.
        is_base: Whether it shows a base class, (I,), bool.
    """

    values: Tensor
    is_base: Tensor

    @property
    def average(self) -> tuple[float, float]:
        """Mean of the means over base and over new images, and its standard error; of one kind where it is alone."""
        kinds = [part for part in (self.values[self.is_base], self.values[~self.is_base]) if len(part)]
        mean = sum(float(part.mean()) for part in kinds) / len(kinds)
        variance = sum(float(part.var(correction=0)) / len(part) for part in kinds) / len(kinds) ** 2
        return mean, variance**0.5

    def of(self, base: bool) -> float | None:
        """Mean over base or over new images; None where there are none."""
        part = self.values[self.is_base == base]
        return float(part.mean()) if len(part) else None

    def minus(self, other: "Outcome") -> tuple[float, float]:
        """Difference of both averages and its standard error, which is small: they are of the same images."""
        return replace(self, values=self.values - other.values).average


def unscored(task: CloneTask) -> CloneTask:
    """The same task without the images that score a clone, fold 0; itself, where nothing can be held out."""
    if task.samples.n_folds == 1:
        return task
    return replace(task, samples=task.samples.select(task.samples.folds != SCORED_FOLD))


def source_body(task: CloneTask, cut: CutPoint) -> fx.GraphModule:
    """The source from `cut` to its penultimate features, over the source's own weights."""
    return extract(task.source.recording, cut, [task.source.head.features])


def run_parts(
    task: CloneTask, parts: Sequence[tuple[CrossFitted, nn.Module]], progress: Progress | None = None
) -> list[HeadSamples]:
    """Run the support once through the target and through given parts of the source behind their adapters.

    Each image takes the adapter that was fitted without its fold.

    Args:
        task: Whose support and target.
        parts: Adapters, and the source from the adapters' cut to its penultimate features.
        progress: Called after each batch.
    Returns:
        What heads are fitted on, for each part.
    Raises:
        InputError: there are no base samples, and the source's logits are no linear map of its pooled features.
    """
    own = own_head(task)
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
    n_samples, own_places = len(task.samples.labels), torch.cat(places)
    target_rows, logit_rows, *made = (
        task.team.gather(torch.cat(rows), own_places, n_samples)
        for rows in (target_features, base_logits, *clone_features)
    )
    samples = HeadSamples(
        target_features=target_rows,
        clone_features=torch.empty(0),
        base_logits=logit_rows,
        own_logits=torch.empty(0),
        labels=task.samples.labels,
        folds=task.samples.folds,
        n_classes=task.n_base + len(task.new_classes),
        few=task.has_few_images,
    )
    return [replace(samples, clone_features=rows, own_logits=F.linear(rows, own.weight, own.bias)) for rows in made]


@dataclass(frozen=True, eq=False)
class Judged:
    """What a support says about a head before it is fitted.

    Attributes:
        stacking: How to make the head; None without base samples, where the source's own classifier is it.
        logits: Of each sample by a head that was fitted without it: of all classes, (N, K_base + K_new), or, without
            base samples, of the new ones, (N, K_new).
        labels: Places among these logits, (N,).
    """

    stacking: Stacking | None
    logits: Tensor
    labels: Tensor

    @property
    def correct(self) -> Tensor:
        """Which samples are classified right when they are held out, (N,) bool."""
        return self.logits.argmax(1) == self.labels

    @property
    def log_likelihoods(self) -> Tensor:
        """Logarithm of the probability of each sample's own class when it is held out, (N,)."""
        return -F.cross_entropy(self.logits, self.labels, reduction="none")

    def lowered(self, nats: float) -> "Judged":
        """The same with all new logits lowered by so many nats; only with base samples."""
        assert self.stacking is not None
        stacking = self.stacking.lowered(nats)
        return Judged(stacking, stacking.logits, self.labels)


def judge(samples: HeadSamples) -> Judged:
    """Choose the head that the support allows, and measure it on held-out samples; `run_parts` makes the samples."""
    if samples.has_base:
        stacking = choose_stacking(samples)
        return Judged(stacking, stacking.logits, samples.labels)
    return Judged(None, samples.own_logits, samples.labels - samples.n_base)


def fit_head(task: CloneTask, samples: HeadSamples, judged: Judged) -> Head:
    """Make the head that was chosen, on all samples."""
    own, norm = own_head(task), last_norm(task.target.recording)
    if judged.stacking is not None:
        return fit_stacked(samples, judged.stacking, own)
    return own if norm is None else remembering_head(samples, norm.mean, own)


def features_seen(task: CloneTask) -> CutPoint:
    """What a head reads of the target: its penultimate features, or without base samples those it remembers."""
    norm = None if task.has_base else last_norm(task.target.recording)
    return task.target.head.features if norm is None else norm.cut


def outcome_of(measured: Tensor, task: CloneTask, rows: Tensor | None = None) -> Outcome:
    """Sum up what was measured of samples, image by image: copies of one image are one observation.

    Args:
        measured: (M,), such as whether they were classified right.
        task: Whose support it is.
        rows: The samples that `measured` speaks of, (N,) bool; None for all.
    """
    labels, groups = task.samples.labels, task.samples.groups
    if rows is not None:
        labels, groups = labels[rows], groups[rows]
    images, index = groups.unique(return_inverse=True)
    values = torch.zeros(len(images), dtype=torch.float64)
    values.scatter_reduce_(0, index, measured.double(), "mean", include_self=False)
    is_base = torch.zeros(len(images), dtype=torch.bool)
    is_base[index] = labels < task.n_base
    return Outcome(values, is_base)


def outcome_of_part(part: Judged, unseen: Judged, whole: Judged, task: CloneTask) -> tuple[Outcome, float]:
    """How each image fares with a part that was made on the images that score it.

    It fares as with the whole source at the same position, which has learned nothing, but for the probability that the
    part gives to its class in place of the whole: few images say far more of probabilities than of right and wrong. A
    change of probability counts as much as the whole source's errors are of the probability that it gives to others.
    What the part owes to having seen the images is taken off: how much more probability it gives to the right classes
    of one fold than the same part as it was made without this fold; never below zero.

    Args:
        part: Judged, all samples.
        unseen: The part that was made without the fold `SCORED_FOLD`.
        whole: The source's part with all its channels and its own weights.
        task: Whose support it is.
    Returns:
        The outcome, and the standard error of what was taken off.
    """
    rows = task.samples.folds == SCORED_FOLD
    likely, without, own = (one.log_likelihoods.double().exp() for one in (part, unseen, whole))
    right, sure = outcome_of(whole.correct, task), outcome_of(own, task)
    wrong = max(1 - right.average[0], 1 / len(right.values))
    scale = min(1.0, wrong / max(1 - sure.average[0], 1e-9))
    gain, error = outcome_of(scale * (likely - without)[rows], task, rows).average
    return outcome_of(whole.correct.double() + scale * (likely - own) - max(0.0, gain), task), error


def base_drop_facts(samples: HeadSamples, judged: Judged, task: CloneTask) -> dict[str, float]:
    """For the recipe: the share of held-out base images that the target gets right and the composite does not.

    Nothing where there is no base image, or none could be held out.
    """
    is_base = samples.labels < samples.n_base
    if judged.stacking is None or samples.folds.max() == 0 or not is_base.any():
        return {}
    lost = (samples.base_logits.argmax(1) == samples.labels) & ~judged.correct
    return {"expected_base_drop": outcome_of(lost[is_base], task, is_base).average[0]}


def own_head(task: CloneTask) -> SourceHead:
    """The source's classifier of the new classes, on the CPU; all zeros where it is no linear map of pooled features.

    Raises:
        InputError: it is no such map, and there are no base samples to fit another head on.
    """
    head = task.source.head
    if head.weight is None or head.features.n_prefix_tokens:
        if not task.has_base:
            raise InputError(
                "support: without base samples the source's own classifier is needed, which here is no linear layer "
                "on pooled features; give some samples of every base class"
            )
        return SourceHead(len(task.new_classes), head.features.n_channels)
    bias = head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias
    return source_head(head.weight[task.source_ids].float().cpu(), bias[task.source_ids].float().cpu())


def batches(
    task: CloneTask, cuts: Sequence[CutPoint], what: str, progress: Progress | None, with_first: bool = False
) -> Iterator[tuple[int, int, slice, Tensor]]:
    """Number, fold, place and images of the batches that this process runs.

    Of as many images at a time as the memory for the tensors at `cuts` allows; of the first batch too, `with_first`.
    """
    samples = task.samples
    size = max(1, min(task.batch_size, TAPPED_BYTES // (4 * sum(cut.size for cut in cuts))))
    size = min(size, len(samples.labels) // task.team.size)  # so that each process has one
    for number, (fold, place) in enumerate(samples.rows(size)):
        if task.team.is_mine(number) or (with_first and number == 0):
            yield number, fold, place, samples.images[place]
        if progress is not None:
            progress(what, place.stop, len(samples.labels))
