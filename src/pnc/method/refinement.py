"""Refinement by gradient: adapters tuned behind the frozen source, kept only where held-out images gain by it.

The closed form makes the source's tensor at the cut as well as an affine map can. What counts is what the source's rest
makes of it: so the adapters go on from there by gradient, towards the penultimate features that the source itself has
for the same images and towards the right classes. Every fold has an adapter of its own, tuned without it, as in closed
form; so the head, again in closed form, and the decision when to stop rest on images that no adapter has seen.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnc.clones.adapter import Adapter, Stitched
from pnc.clones.heads import Head, SourceHead
from pnc.clones.position_grids import pool
from pnc.foundation.process_team import ALONE, Team
from pnc.foundation.resumable_steps import NO_STEPS, Steps
from pnc.graph.cut_points import LOGITS, CutPoint, extract
from pnc.method.adapter_fitting import CrossFitted
from pnc.method.head_fitting import HeadSamples
from pnc.method.held_out import features_seen, fit_head, judge, outcome_of, run_parts
from pnc.method.task import CloneTask, Progress


@dataclass(frozen=True, eq=False)
class Views:
    """What training needs of the support, sample by sample, computed once: all of it lies before the adapter.

    Attributes:
        tensors: The target's tensors at the cut, (N, ...).
        target_features: Its penultimate features, (N, D_t).
        base_logits: Its logits, (N, K_base).
        source_features: The source's penultimate features of the same images, (N, D_s).
        labels: (N,), base classes first.
    """

    tensors: Tensor
    target_features: Tensor
    base_logits: Tensor
    source_features: Tensor
    labels: Tensor

    def select(self, rows: Tensor) -> "Views":
        """Keep the given rows."""
        return Views(*(tensor[rows] for tensor in vars(self).values()))


RefiningLoss = Callable[[Tensor, Head, Views], Tensor]
"""(the clone's features (B, D_s), the head, the batch) -> loss."""

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast is trained: Adam, the learning rate falls linearly to zero."""

    learning_rate: float
    n_steps: int
    n_snapshots: int = 1
    batch_size: int = 64


SCHEDULE = Schedule(learning_rate=0.0003, n_steps=120, n_snapshots=3)
CLASS_WEIGHT = 0.3


def bounded(task: CloneTask, cut: CutPoint) -> CloneTask:
    """The task with as much of its support as its memory has room for, where `views` are kept."""
    widths = cut.size, task.target.head.features.n_channels, task.source.head.features.n_channels
    return task.within(8 * sum(widths))  # float32, and a choice of them beside


@torch.no_grad()
def views(task: CloneTask, cut: CutPoint) -> Views:
    """Run the support through the target, up to its logits, and through the source."""
    read = features_seen(task)
    trunk = extract(task.target.recording, None, [cut, read, LOGITS])
    teacher = extract(task.source.recording, None, [task.source.head.features])

    def seen(images: Tensor) -> tuple[Tensor, ...]:
        tensors, features, logits = trunk(images)
        own = pool(teacher(images), task.source.head.features)
        return tensors, pool(features, read), logits, own

    (tensors, target_features, base_logits, source_features), _ = task.run(seen, task.target.device)
    labels = task.samples.labels.to(task.target.device)
    return Views(tensors, target_features, base_logits, source_features, labels)


def train(
    stitched: Stitched,
    head: Head,
    data: Views,
    loss: RefiningLoss,
    schedule: Schedule,
    generator: torch.Generator,
    team: Team = ALONE,
) -> list[tuple[Adapter, Head]]:
    """Train copies of an adapter and a head; the source's part between them stays frozen.

    Batches hold every class equally often.

    Args:
        stitched: The adapter to start from and the source's part, whose parameters need no gradient.
        head: To start from.
        data: What is trained on.
        loss: Of a batch.
        schedule: How long and how fast.
        generator: Draws the batches.
        team: Processes that share every batch; all are given the same.
    Returns:
        Adapter and head at each of the schedule's snapshots; they share nothing with those given.
    """
    adapter, head = copy.deepcopy(stitched.adapter), copy.deepcopy(head)
    trained = Stitched(adapter, stitched.body, stitched.features)
    leaves, of_head = (
        [buffer.requires_grad_() for buffer in module.buffers() if buffer.numel()] for module in (adapter, head)
    )
    weights = (1 / data.labels.bincount().clamp_min(1).double())[data.labels].cpu()
    optimizer = torch.optim.Adam([*leaves, *of_head], schedule.learning_rate)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / schedule.n_steps)
    snapshots = []
    for step in range(1, schedule.n_steps + 1):
        batch = data.select(torch.multinomial(weights, schedule.batch_size, replacement=True, generator=generator))
        with torch.enable_grad():
            optimizer.zero_grad()
            features = trained(batch.tensors[team.part(schedule.batch_size)])
            loss(team.whole(features, schedule.batch_size), head, batch).backward()
        team.sum_gradients(leaves)  # the head's are of the whole batch already
        optimizer.step()
        decay.step()
        if step % (schedule.n_steps // schedule.n_snapshots) == 0:
            snapshots.append((_frozen(adapter), _frozen(head)))
    return snapshots


def _frozen(module: Module) -> Module:
    frozen = copy.deepcopy(module)
    for buffer in frozen.buffers():
        buffer.requires_grad_(False)
        buffer.grad = None
    return frozen


def composite_class_loss(features: Tensor, head: Head, batch: Views) -> Tensor:
    """Cross entropy of the composite's logits; among the new ones alone where `head` knows no base samples."""
    new, n_base = head(batch.target_features, features, batch.base_logits), batch.base_logits.shape[1]
    if isinstance(head, SourceHead):
        return F.cross_entropy(new, batch.labels - n_base)
    return F.cross_entropy(torch.cat([batch.base_logits, new], 1), batch.labels)


def feature_loss(features: Tensor, head: Head, batch: Views) -> Tensor:
    """Squared distance to the source's own features, in units of their variance."""
    scale = batch.source_features.var(0).mean()
    return (features - batch.source_features).square().mean() / scale


def refining_loss(features: Tensor, head: Head, batch: Views) -> Tensor:
    """What adapters are refined by."""
    return feature_loss(features, head, batch) + CLASS_WEIGHT * composite_class_loss(features, head, batch)


@dataclass(frozen=True, eq=False)
class Refined:
    """What came of a refinement.

    Attributes:
        fitted: The refined adapters; those given, where held-out images gained nothing.
        n_steps: After which they were best; 0 where the closed form was.
        gain: In average accuracy on held-out folds, at least 0.
    """

    fitted: CrossFitted
    n_steps: int
    gain: float


def refined(
    task: CloneTask, fitted: CrossFitted, part: nn.Module, steps: Steps = NO_STEPS, progress: Progress | None = None
) -> Refined:
    """Tune the adapters of a position by gradient, and keep what held-out images gain by.

    An adapter that passes on what it gets has nothing to tune, and is kept.

    Args:
        task: From `prepare_task`.
        fitted: The position's adapters in closed form.
        part: The source's part behind them, an own copy without gradients.
        steps: Where what was trained is kept, and found again.
        progress: Called after each training.
    """
    if fitted.adapter.is_identity:
        return Refined(fitted, 0, 0.0)
    task = bounded(task, fitted.adapter.target_cut)
    data = views(task, fitted.adapter.target_cut)
    (samples,) = run_parts(task, [(fitted, part)])
    head = fit_head(task, samples, judge(samples)).to(task.target.device)
    paths = []
    for fold, adapter in enumerate([*fitted.held_out, fitted.adapter]):
        name, snapshots = f"refined {fold}", [copy.deepcopy(adapter) for _ in range(SCHEDULE.n_snapshots)]
        kept = steps.get(name)
        if kept is None:
            rows = task.samples.folds != fold if task.samples.n_folds > 1 else task.samples.folds == 0
            stitched = Stitched(adapter, part, task.source.head.features)
            generator = torch.Generator().manual_seed(task.seed + fold)
            with task.autocast():
                trained = train(stitched, head, data.select(rows), refining_loss, SCHEDULE, generator, task.team)
            kept = nn.ModuleList(tuned for tuned, _ in trained).state_dict()
            steps.keep(name, kept)
        nn.ModuleList(snapshots).load_state_dict(kept)
        paths.append([adapter, *snapshots])
        if progress is not None:
            progress("refining adapters", fold + 1, len(fitted.held_out) + 1)
    stages = [CrossFitted(adapter, tuple(held_out), fitted.error) for *held_out, adapter in zip(*paths, strict=True)]
    quality = [held_out_quality(task, one) for one in run_parts(task, [(stage, part) for stage in stages])]
    no_worse = [place for place, (score, _) in enumerate(quality) if score >= quality[0][0]]
    best = min(no_worse, key=lambda place: quality[place][1])
    n_steps = best * SCHEDULE.n_steps // SCHEDULE.n_snapshots
    return Refined(stages[best], n_steps, quality[best][0] - quality[0][0])


def held_out_quality(task: CloneTask, samples: HeadSamples) -> tuple[float, float]:
    """Average accuracy and average log-loss of samples by a head that was fitted without them."""
    judged, is_base = judge(samples), samples.labels < samples.n_base
    losses = F.cross_entropy(judged.logits, judged.labels, reduction="none")
    kinds = [losses[rows] for rows in (is_base, ~is_base) if rows.any()]
    loss = sum(float(kind.mean()) for kind in kinds) / len(kinds)
    return outcome_of(judged.correct, task).average[0], loss
