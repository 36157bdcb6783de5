"""Refinement by gradient: adapters tuned with the frozen source, kept only if held-out images gain.

The closed form reproduces the source's tensor at the cut as well as an affine map can. What counts, though, are the
features that the rest of the source computes from it. So the adapters are trained further by gradient, towards the
source's own penultimate features for the same images and towards the right classes. As in closed form, every fold has
its own adapter, tuned without it, so that the head (in closed form again) and the choice of the number of steps use
images that no adapter has seen.
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
from pnc.method.held_out import features_seen, fit_head, judge, run_parts, score_of
from pnc.method.task import CloneTask, Progress


@dataclass(frozen=True, eq=False)
class Views:
    """The support as training needs it, computed once, as none of it depends on the adapter.

    Attributes:
        tensors: The target's tensors at the cut, (N, ...).
        target_features: The target's features that the head reads, (N, D_t).
        base_logits: The target's logits, (N, K_base).
        source_features: The source's penultimate features, (N, D_s).
        labels: Class ids, (N,), base classes first.
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
"""Maps the clone's features (B, D_s), the head and the batch to a loss."""

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Schedule:
    """Schedule of Adam: the learning rate falls linearly to zero."""

    learning_rate: float
    n_steps: int
    n_snapshots: int = 1
    batch_size: int = 64


SCHEDULE = Schedule(learning_rate=0.0003, n_steps=120, n_snapshots=3)
CLASS_WEIGHT = 0.3


def bounded(task: CloneTask, cut: CutPoint) -> CloneTask:
    """Return the task with as much of its support as its memory can hold as `Views`."""
    widths = cut.size, task.target.head.features.n_channels, task.source.head.features.n_channels
    return task.within(8 * sum(widths))  # float32, twice: all of them and a selection


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

    Batches draw every class equally often.

    Args:
        stitched: The adapter to start from, and the source's part, whose parameters need no gradient.
        head: The head to start from.
        data: Training data.
        loss: Loss of a batch.
        schedule: Learning rate, steps and snapshots.
        generator: Draws the batches.
        team: Processes that share every batch; all get the same arguments.
    Returns:
        Adapter and head at each snapshot; they share no memory with those given.
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
        team.sum_gradients(leaves)  # the head's are already those of the whole batch
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
    """Cross entropy of the composite's logits; among the new classes only if `head` was made without base samples."""
    new, n_base = head(batch.target_features, features, batch.base_logits), batch.base_logits.shape[1]
    if isinstance(head, SourceHead):
        return F.cross_entropy(new, batch.labels - n_base)
    return F.cross_entropy(torch.cat([batch.base_logits, new], 1), batch.labels)


def feature_loss(features: Tensor, head: Head, batch: Views) -> Tensor:
    """Squared distance to the source's own features, in units of their variance."""
    scale = batch.source_features.var(0).mean()
    return (features - batch.source_features).square().mean() / scale


def refining_loss(features: Tensor, head: Head, batch: Views) -> Tensor:
    """The loss of refinement."""
    return feature_loss(features, head, batch) + CLASS_WEIGHT * composite_class_loss(features, head, batch)


@dataclass(frozen=True, eq=False)
class Refined:
    """Result of a refinement.

    Attributes:
        fitted: The refined adapters, or the given ones if held-out images gained nothing.
        n_steps: Steps after which they were best; 0 for the closed form.
        gain: Gain in average accuracy on held-out folds, at least 0.
    """

    fitted: CrossFitted
    n_steps: int
    gain: float


def refined(
    task: CloneTask, fitted: CrossFitted, part: nn.Module, steps: Steps = NO_STEPS, progress: Progress | None = None
) -> Refined:
    """Tune the adapters of a position by gradient, and keep the result if held-out images gain.

    An identity adapter has nothing to tune and is kept.

    Args:
        task: From `prepare_task`.
        fitted: The position's adapters in closed form.
        part: The source's part behind them, a copy without gradients.
        steps: Stores trained adapters, so that a stopped job can continue.
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
    """Return the average accuracy and average log-loss of samples under a head fitted without them."""
    judged, is_base = judge(samples), samples.labels < samples.n_base
    losses = F.cross_entropy(judged.logits, judged.labels, reduction="none")
    kinds = [losses[rows] for rows in (is_base, ~is_base) if rows.any()]
    loss = sum(float(kind.mean()) for kind in kinds) / len(kinds)
    return score_of(judged.correct, task).average[0], loss
