"""Tune: trains a part's own weights to reproduce the source's answers on random views of images.

The source answers for any image, so no label is needed: each step draws images of the support (unlabelled ones too),
crops them at random, mixes half of the batches in pairs, and asks the source for its answers. If all of the source's
classes are cloned, it is also asked for its tensors at a few places inside.

BatchNorm layers begin with the statistics of each batch. If all classes are cloned, their running statistics are then
recomputed and stay, and the weights adapt to them at a low rate.

First the part is tuned without the fold that scores the clone, and a copy is kept for the score; the last steps use all
images. Then the change of every weight is rounded to what a file stores, before the head is fitted: so the clone in
memory is the same as the one in the file.

On processors with bfloat16, networks run in it meanwhile; weights, losses and statistics are float32.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.func import functional_call

from pnc.channels.compaction import own_copy
from pnc.clones.adapter import Adapter
from pnc.clones.deltas import Deltas, deltas_of, low_rank_deltas, merge, rank_of, rounded_deltas
from pnc.data.image_store import Images, to_device
from pnc.foundation.resumable_steps import NO_STEPS, Steps
from pnc.graph.cut_points import extract
from pnc.method.adapter_fitting import CrossFitted
from pnc.method.file_size import FileTooLarge, statistics_bytes, thin_bytes, tuned_bytes
from pnc.method.held_out import unscored
from pnc.method.localization.aim import Answers
from pnc.method.localization.fixed_norms import FixedNorms
from pnc.method.localization.inner_tensors import InnerTensors
from pnc.method.localization.norms import batch_norms, reestimate_statistics, training_norms
from pnc.method.localization.training_precision import in_training_precision, training_autocast
from pnc.method.settings import Tune
from pnc.method.source_part import SourcePart
from pnc.method.task import CloneTask, Progress

Distilled = Literal["weights", "low-rank"]
"""Parameters tuned here; the localizer tunes norms."""

N_STEPS = 900
SCORED_SHARE = 2 / 3
"""Share of the steps without the scored fold; then the part is copied for the score, and the rest uses all images."""
BATCH_STATISTICS_SHARE = 1 / 2
"""Share of the steps in which BatchNorm layers use the statistics of each batch."""
BATCH_SIZE = 64
LEARNING_RATES: Mapping[str, float] = {"weights": 2e-3, "low-rank": 3e-3}
LAST_RATE = 0.5
"""Share of the learning rate with which the steps on all images begin."""
FIXED_RATE = 0.1
"""Share of the learning rate with which the steps with fixed statistics begin."""
RANK = 3
"""With it, half of a ResNet-20 is a file of 55 kB; docs/method.md compares it with 4."""
CROP = 1 / 8
"""Largest shift of a crop, as a share of an image's height and width: 4 pixels of 32."""
INNER_WEIGHT = 2.0
"""Weight of the distance between tensors inside the part and inside the source."""
MIXED = 0.5
"""Share of the batches whose images are mixed in pairs."""
N_STATISTICS = 2_000
"""At most this many images for the statistics of BatchNorm layers."""

_STEP = "tuned"


@dataclass(frozen=True, eq=False)
class Tuned:
    """Result of tuning.

    Attributes:
        part: The tuned part with its deltas, and a copy made without the fold that scores the clone.
        fitted: The adapter that was tuned with it, also in place of the held-out ones.
        scored: Likewise the adapter of `part.held_out`.
    """

    part: SourcePart
    fitted: CrossFitted
    scored: CrossFitted


def what_to_tune(
    task: CloneTask, adapter: Adapter, part: SourcePart, tune: Tune | None, max_bytes: int | None
) -> Distilled | None:
    """Return what to tune of a part, or None: as `tune` says; by default, below density 1, what fits `max_bytes`.

    Raises:
        FileTooLarge: the thin file would be larger than `max_bytes`.
    """
    if part.masks is None and (adapter.is_identity or tune is None):
        return None  # the part is the source itself, or close to it
    tried: tuple[Distilled | None, ...] = ("weights", "low-rank", None)
    if tune is not None:
        tried = (tune if tune == "weights" or tune == "low-rank" else None,)
    for kind in tried:
        n_bytes = _bytes_with(task, adapter, part, kind)
        if max_bytes is None or n_bytes <= max_bytes:
            return kind
    how = "" if tune in (None, "none") else f" with tune={tune!r}"
    way_out = "give density=1" if tune is None or tried == (None,) else "leave tune out"
    raise FileTooLarge(
        f"max_bytes={max_bytes}: the file of a part of density {part.density:.3g}{how} is estimated at up to {n_bytes} "
        f"bytes; allow as many, or {way_out}"
    )


def _bytes_with(task: CloneTask, adapter: Adapter, part: SourcePart, tune: Distilled | None) -> int:
    if tune is None:
        return thin_bytes(task, adapter) + (0 if part.masks is None else statistics_bytes(part.module))
    return tuned_bytes(task, adapter, part.module, RANK if tune == "low-rank" else None)


def tune_part(
    task: CloneTask,
    fitted: CrossFitted,
    part: SourcePart,
    tune: Distilled,
    steps: Steps = NO_STEPS,
    progress: Progress | None = None,
) -> Tuned:
    """Tune a part and its adapter towards the source's own answers to random views of the support's images.

    Args:
        task: Gives source, target and support.
        fitted: The adapters before the part; an identity adapter has nothing to tune.
        part: From `localize`; not changed.
        tune: "weights": all parameters; "low-rank": changes of rank `RANK` to convolutions and linear layers, and all
            scales and shifts.
        steps: Stores the result, so that a stopped job can continue.
        progress: Called after each step.
    """
    seen = unscored(task)
    kept = steps.get(_STEP)
    if kept is None:
        path, is_scored = _Path(task, fitted.adapter, part, tune, progress), seen is not task
        kept, rate = {}, 1.0
        if path.can_fix_statistics:
            path.walk(seen.samples.images, round(BATCH_STATISTICS_SHARE * N_STEPS), rate)
            path.fix_statistics(seen)
            rate = FIXED_RATE
        if is_scored:
            path.walk(seen.samples.images, round(SCORED_SHARE * N_STEPS) - path.n_done, rate)
            kept |= path.result("scored", seen)
            rate *= LAST_RATE
        path.walk(task.samples.images, N_STEPS - path.n_done, rate)
        kept |= path.result("final", task)
        steps.keep(_STEP, kept)
    module, adapter, deltas = _made(fitted.adapter, part.module, kept, "final")
    held_out, scored = None, adapter
    if seen is not task:
        held_out, scored, _ = _made(fitted.adapter, part.module, kept, "scored")
    n_folds = len(fitted.held_out)
    return Tuned(
        replace(part, module=module, deltas=deltas, held_out=held_out),
        CrossFitted(adapter, (adapter,) * n_folds, fitted.error),
        CrossFitted(scored, (scored,) * n_folds, fitted.error),
    )


def _made(
    adapter: Adapter, part: fx.GraphModule, kept: Mapping[str, Tensor], which: str
) -> tuple[fx.GraphModule, Adapter, Deltas]:
    """Rebuild part, adapter and deltas from the training's result."""
    module, adapter = own_copy(part), copy.deepcopy(adapter)
    own = {name.partition("/")[2]: tensor for name, tensor in kept.items() if name.startswith(f"{which}/")}
    for prefix, buffers in (("adapter", _adapter_buffers(adapter)), ("norms", _norm_buffers(module))):
        for name, buffer in buffers.items():
            buffer.copy_(own[f"{prefix}.{name}"])
    deltas = deltas_of({name: tensor for name, tensor in own.items() if "." not in name})
    merge(module, deltas)
    return module, adapter, deltas


def _adapter_buffers(adapter: Adapter) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in adapter.named_buffers() if buffer.numel()}


def _norm_buffers(part: fx.GraphModule) -> dict[str, Tensor]:
    """The running statistics of a part."""
    layers = enumerate(batch_norms(part))
    return {f"{i}.{name}": buffer for i, layer in layers for name, buffer in layer.named_buffers(recurse=False)}


class _Path:
    """The training of one part with its adapter, in several stretches.

    Args:
        task: Gives the source, whose answers are the aim.
        adapter: The adapter to start from.
        part: The part to start from.
        tune: "weights" or "low-rank".
        progress: Called after each step.
    """

    def __init__(
        self, task: CloneTask, adapter: Adapter, part: SourcePart, tune: str, progress: Progress | None
    ) -> None:
        task = in_training_precision(task)
        self._task, self._tune, self._progress = task, tune, progress
        self._generator = torch.Generator().manual_seed(task.seed)
        few = task.within(8 * task.source.head.features.n_channels)
        self._inner = InnerTensors(few, adapter.source_cut, part)
        self._part, self._aim = self._inner.module, self._inner.aim
        self._prefix = extract(task.target.recording, None, [adapter.target_cut])
        self._adapter, self.n_done = copy.deepcopy(adapter), 0
        self._fixed: FixedNorms | None = None
        of_adapter = _adapter_buffers(self._adapter).values()
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._values: dict[str, Tensor] = {}
        for name, before in self._part.named_parameters():
            if tune == "low-rank" and before.dim() >= 2:
                rows = before.detach().flatten(1)
                shape = rank_of(before, RANK), rows.shape[1]
                right = torch.randn(shape, generator=self._generator).to(rows.device) / rows.shape[1] ** 0.5
                self._factors[name] = rows.new_zeros(len(rows), shape[0]), right
            else:
                self._values[name] = before.detach().clone()
        factors = [factor for pair in self._factors.values() for factor in pair]
        self._leaves = [leaf.requires_grad_() for leaf in (*self._values.values(), *factors, *of_adapter)]

    @property
    def can_fix_statistics(self) -> bool:
        """Whether statistics of BatchNorm layers may be fixed before the training is over.

        Not if only some of the source's classes are cloned: on the few images of these, the part would forget the
        others without the noise of batch statistics, but no longer know its own on other images.
        """
        return bool(batch_norms(self._part)) and self._task.clones_all

    def fix_statistics(self, task: CloneTask) -> None:
        """Fix the statistics of BatchNorm layers to those of the task's images."""
        for name, buffer in self._statistics(task, self._deltas()).items():
            _norm_buffers(self._part)[name].copy_(buffer)
        self._fixed = FixedNorms(self._part)

    @torch.no_grad()
    def _statistics(self, task: CloneTask, deltas: Deltas) -> dict[str, Tensor]:
        """Compute the statistics of the current part, with its changes rounded, on the task's images."""
        part, few = own_copy(self._part), task.reduced(N_STATISTICS)
        merge(part, deltas)
        if batch_norms(part):
            with task.autocast():
                batches = few.samples.batches(few.batch_size)
                inputs = (self._adapter(self._prefix(to_device(images, few.target.device))) for _, images in batches)
                reestimate_statistics(part, inputs, self._task.team)
        return _norm_buffers(part)

    def walk(self, images: Images, n_steps: int, share: float) -> None:
        """Train for `n_steps` on views of the images, from a share of the learning rate down to zero."""
        optimizer = torch.optim.Adam(self._leaves, LEARNING_RATES[self._tune] * share, fused=True)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
        norms = contextlib.nullcontext() if self._fixed else training_norms(self._part, self._task.team)
        with norms:
            for rows, _ in zip(_draws(len(images), self._generator), range(n_steps), strict=False):
                optimizer.zero_grad()
                self._loss(_views(images[rows], self._generator)).backward()
                self._task.team.sum_gradients(self._leaves)
                optimizer.step()
                decay.step()
                self.n_done += 1
                if self._progress is not None:
                    self._progress("tuning the part", self.n_done, N_STEPS)

    @torch.enable_grad()
    def _loss(self, images: Tensor) -> Tensor:
        """Return the loss of one batch; each process of the team runs a part of it."""
        task, n = self._task, len(images)
        place = task.team.part(n)
        with training_autocast(task):
            wanted = self._aim.answers(images[place])
            with torch.no_grad():
                seen = self._prefix(to_device(images[place], task.target.device))
            outputs, *inner = self._outputs(self._adapter(seen))
        rows = torch.arange(n)[place]
        features, logits = (task.team.gather(one, rows, n) for one in (wanted.features, wanted.logits))
        loss = self._aim.loss(task.team.whole(outputs.float(), n), Answers(features, logits))
        return loss + INNER_WEIGHT * self._inner.distance(inner, wanted, n)

    def _outputs(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the part with the current parameters: its output and its inner tensors."""
        module, parameters = self._part, self._parameters()
        if self._fixed is not None:
            module, parameters = self._fixed.module, self._fixed.merged(parameters)
        elif inputs.device.type == "cpu" and torch.get_num_threads() > 1:
            inputs = inputs.contiguous()  # BatchNorm's gradients in channels_last take longer with every thread
        outputs: tuple[Tensor, ...] = functional_call(module, parameters, (inputs,))
        return outputs

    def _parameters(self) -> dict[str, Tensor]:
        changed = {
            name: before.detach() + (self._factors[name][0] @ self._factors[name][1]).reshape(before.shape)
            for name, before in self._part.named_parameters()
            if name in self._factors
        }
        return {**self._values, **changed}

    def result(self, which: str, task: CloneTask) -> dict[str, Tensor]:
        """Return the current adapter, statistics and deltas, by name; statistics that are not fixed are the task's."""
        deltas = self._deltas()
        norms = _norm_buffers(self._part) if self._fixed else self._statistics(task, deltas)
        of_adapter = {f"adapter.{name}": buffer for name, buffer in _adapter_buffers(self._adapter).items()}
        of_norms = {f"norms.{name}": buffer for name, buffer in norms.items()}
        found = {**deltas.tensors, **of_adapter, **of_norms}
        return {f"{which}/{name}": tensor.detach().clone() for name, tensor in found.items()}

    def _deltas(self) -> Deltas:
        if self._factors:
            return low_rank_deltas(self._part, self._factors, self._values, RANK)
        return rounded_deltas(self._part, self._values)


def _draws(n: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Draw row numbers below n endlessly, a batch at a time, each equally often."""
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < BATCH_SIZE:
            left = torch.cat([left, torch.randperm(n, generator=generator)])
        yield left[:BATCH_SIZE]
        left = left[BATCH_SIZE:]


def _views(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop images (B, C, H, W) at random, with reflected edges, and mix them in pairs every other time."""
    n, n_channels, height, width = images.shape
    top, left = (round(CROP * size) if size > 2 else 0 for size in (height, width))
    padded = F.pad(images, (left, left, top, top), mode="reflect")
    rows = torch.randint(0, 2 * top + 1, (n, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(0, 2 * left + 1, (n, 1), generator=generator) + torch.arange(width)
    places = torch.arange(n)[:, None, None, None], torch.arange(n_channels)[:, None, None]
    views = padded[*places, rows[:, None, :, None], columns[:, None, None, :]]
    mixed, share = torch.rand(2, generator=generator).tolist()
    if mixed < MIXED:
        views = share * views + (1 - share) * views[torch.randperm(n, generator=generator)]
    return views
