"""The selection function: which channels of the source's part a clone keeps, by every method, for a task.

`taylor`, `magnitude` and `random` look at the part once (`channel_scores`). `gates` starts from `taylor`, learns
ranks and norms by gradient where the clone will work, behind the adapter, and tunes the norms of what is left.
`local-surrogate` learns ranks on the source alone, as the paper does in our reading (`paper_surrogate`).
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from pnc.channels.channel_masks import ChannelMasks
from pnc.channels.channel_spaces import channel_spaces
from pnc.channels.compaction import compact, own_copy
from pnc.channels.mac_budget import Costs, masks_within
from pnc.clones.adapter import Adapter
from pnc.clones.position_grids import pool
from pnc.foundation.resumable_steps import NO_STEPS, Steps
from pnc.graph.cut_points import LOGITS, extract
from pnc.method.discriminants import fit_discriminants
from pnc.method.held_out import source_body
from pnc.method.localization.channel_scores import one_shot_ranking
from pnc.method.localization.gates import learn_gates
from pnc.method.localization.norms import Batch, reestimate_statistics, tune_norms
from pnc.method.localization.paper_surrogate import Neighbourhoods, neighbourhoods, surrogate_loss
from pnc.method.settings import Method, Removal
from pnc.method.source_part import SourcePart
from pnc.method.task import CloneTask, Progress

GATES_STEPS = 200
NORMS_STEPS = 300
SURROGATE_STEPS = 200
BATCH_SIZE = 32
SURROGATE_IMAGES = 4
"""Images in a batch of `local-surrogate`, each with its neighbours."""

MARGIN = 3.0
"""Nats by which the logits of classes that are not cloned shall stay below those of the cloned ones."""
LOGITS_WEIGHT = 0.3
"""Of the cloned classes' logits, beside the features, in what a part shall give."""
SHRINKAGE = 0.2

_STEP = "localized"
_TINY = 1e-30  # for the logarithm of effects


def localize(
    task: CloneTask,
    adapter: Adapter,
    density: float,
    method: Method = "gates",
    *,
    round_to: int = 1,
    steps: Steps = NO_STEPS,
    progress: Progress | None = None,
) -> SourcePart:
    """Localize: take the source's part behind an adapter, at the density that is wanted.

    Args:
        task: Whose source and support.
        adapter: The part begins at its source cut.
        density: Share of the prunable multiply-accumulates to keep, in (0, 1]. Where nothing can go all is kept.
        method: How channels are chosen.
        round_to: Keep multiples of so many channels, see `masks_within`.
        steps: Where the part is kept, and found again.
        progress: Called after each step of learning.
    Raises:
        InputError: an unknown method, or a density that cannot be met.
    """
    density = Removal(density, method, round_to).fixed_density
    task = task.within(4 * adapter.source_cut.size + task.samples.images.n_bytes)
    body = source_body(task, adapter.source_cut)
    if density == 1 or not (spaces := channel_spaces(body)).spaces:
        return SourcePart(own_copy(body))
    costs = Costs(body, spaces)
    kept = steps.get(_STEP)
    if kept is not None:
        masks = ChannelMasks.from_bytes(kept["masks"].numpy().tobytes(), spaces)
        module = compact(body, spaces, masks)
        module.load_state_dict({name: kept[f"module.{name}"] for name in module.state_dict()})
        return SourcePart(module, masks, costs.density(masks.flat))
    choice = _Choice(task, adapter, body, costs, progress)
    with task.autocast():
        ranking, learned = choice.ranking(density, method)
    masks = masks_within(choice.costs, ranking, choice.costs.bound(density), round_to)
    module = compact(body, spaces, masks)
    if learned is None:
        with task.autocast():
            reestimate_statistics(module, choice.inputs, task.team)
    else:
        batches = choice.counted(choice.batches(), "tuning norms", NORMS_STEPS)
        start = compact(learned, spaces, masks)
        with task.autocast():
            tune_norms(module, batches, NORMS_STEPS, choice.inputs, start=start, team=task.team)
    own = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    steps.keep(_STEP, {"masks": torch.frombuffer(bytearray(masks.to_bytes()), dtype=torch.uint8), **own})
    return SourcePart(module, masks, costs.density(masks.flat))


class _Choice:
    """One choice of channels: what the part sees of the support, and what it should make of it."""

    def __init__(
        self, task: CloneTask, adapter: Adapter, body: fx.GraphModule, costs: Costs, progress: Progress | None
    ) -> None:
        self._task, self._adapter, self._body, self.costs, self._progress = task, adapter, body, costs, progress
        self._generator = torch.Generator().manual_seed(task.seed)
        prefix = extract(task.target.recording, None, [adapter.target_cut])
        (whole,), places = task.run(lambda images: (adapter(prefix(images)),), task.target.device)
        self._whole = _laid_out(whole)
        self.inputs = [self._whole[place] for place in places]

    def ranking(self, density: float, method: Method) -> tuple[dict[str, Tensor], fx.GraphModule | None]:
        """Ranks of all units by a method, and the part with the norms that were learned along with them, if any."""
        if method == "local-surrogate":
            start = {space.name: torch.zeros(space.size) for space in self.costs.spaces.spaces}
            batches = self.counted(self._surrogate_batches(), "learning gates", SURROGATE_STEPS)
            learned = learn_gates(
                self._body, self.costs, start, density, batches, SURROGATE_STEPS, tune=False, team=self._task.team
            )
            return learned[0], None
        inputs = self._whole
        if method != "gates":
            return one_shot_ranking(self._body, self.costs, inputs, self._generator, method), None
        effects = one_shot_ranking(self._body, self.costs, inputs, self._generator, "taylor")
        start = {name: 0.5 * effect.clamp_min(_TINY).log() for name, effect in effects.items()}
        batches = self.counted(self.batches(), "learning gates", GATES_STEPS)
        return learn_gates(
            self._body, self.costs, start, density, batches, GATES_STEPS, tune=True, team=self._task.team
        )

    def batches(self) -> Iterator[Batch]:
        """Draws of the support without end: what the part sees, and how far its outputs are from the aim."""
        inputs, aim = self._whole, _Aim(self._task)
        for rows in _draws(len(inputs), BATCH_SIZE, self._generator):
            yield inputs[rows], partial(aim.loss, rows=rows)

    def counted(self, batches: Iterator[Batch], what: str, n_steps: int) -> Iterator[Batch]:
        """The same batches, with a report of progress for each."""
        for step, batch in enumerate(batches, start=1):
            yield batch
            if self._progress is not None:
                self._progress(what, step, n_steps)

    def _surrogate_batches(self) -> Iterator[Batch]:
        """Neighbourhoods of samples of the new classes, without end, and the distance of their explanations."""
        task = self._task
        cut, features = self._adapter.source_cut, task.source.head.features
        prefix = extract(task.source.recording, None, [cut])
        classifier = extract(task.source.recording, features, [LOGITS])
        new = task.samples.images.select(task.samples.labels >= task.n_base)
        for rows in _draws(len(new), SURROGATE_IMAGES, self._generator):
            around = neighbourhoods(new[rows].to(task.source.device), self._generator)
            with torch.no_grad():
                inputs = prefix(around.images)
                expected = classifier(self._body(inputs.clone()))[:, task.source_ids]

            def distance(outputs: Tensor, around: Neighbourhoods = around, expected: Tensor = expected) -> Tensor:
                return surrogate_loss(around, classifier(outputs)[:, task.source_ids], expected)

            yield _laid_out(inputs), distance


class _Aim:
    """What a part shall give for the support: the source's features, where they matter, and no class but the cloned.

    Four terms: the squared distance from the source's own features in units of their variance, but for a shift that all
    samples share, which heads make up for; the same along the discriminants of the classes at hand; the squared
    distance of the cloned classes' logits, likewise in units; and, where the source knows classes that are not cloned,
    what their logits lack to stay by `MARGIN` below what the source itself says of the cloned ones. The last one makes
    the part forget the others, for which the free shift leaves it room: where the shift counts, the part keeps
    less and forgets less.
    """

    def __init__(self, task: CloneTask) -> None:
        self._features = task.source.head.features
        teacher = extract(task.source.recording, None, [self._features, LOGITS])

        def answers(images: Tensor) -> tuple[Tensor, Tensor]:
            features, logits = teacher(images)
            return pool(features, self._features), logits[:, task.source_ids]

        (self._wanted, self._logits), _ = task.run(answers, task.source.device)
        self._scale = _above_zero(self._wanted.var(0, correction=0)).sqrt()
        self._logit_scale = _above_zero(self._logits.var(0, correction=0)).mean().sqrt()
        discriminants = _discriminants(self._wanted, task.samples.labels)
        self._discriminants = discriminants / _above_zero((self._wanted @ discriminants).var(correction=0)).sqrt()
        self._cloned = task.source_ids
        self._others = [place for place in range(len(task.source.classes)) if place not in self._cloned]
        self._classifier = extract(task.source.recording, self._features, [LOGITS])

    def loss(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """The mean over a batch of outputs, for these rows of the support."""
        missed = pool(outputs, self._features) - self._wanted[rows]
        missed = missed - missed.mean(0)
        logits, wanted = self._classifier(outputs), self._logits[rows]
        loss: Tensor = (missed / self._scale).square().mean() + (missed @ self._discriminants).square().mean()
        loss = loss + LOGITS_WEIGHT * ((logits[:, self._cloned] - wanted) / self._logit_scale).square().mean()
        if self._others:
            others = logits[:, self._others].logsumexp(1)
            loss = loss + F.softplus(others + MARGIN - wanted.logsumexp(1)).mean()
        return loss


def _discriminants(features: Tensor, labels: Tensor) -> Tensor:
    """Directions of features (N, D) that tell classes apart, one for each class that there is, (D, K)."""
    classes, places = labels.unique(return_inverse=True)
    weight, _ = fit_discriminants(features.cpu(), places, len(classes), SHRINKAGE)
    return (weight - weight.mean(0)).T.to(features)


def _above_zero(variance: Tensor) -> Tensor:
    """Variances, those of what never moves replaced by something small."""
    return variance.clamp_min(1e-6 * float(variance.max()) + 1e-12)


def _laid_out(tensor: Tensor) -> Tensor:
    """Maps in channels_last, in which convolutions train a third faster."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _draws(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers below n, `size` at a time (all, where there are fewer), each as often as any other; without end."""
    while True:
        for rows in torch.randperm(n, generator=generator).split(min(size, n)):
            if len(rows) == min(size, n):
                yield rows
