"""Localize: chooses which channels of the source's part a clone keeps, by any method.

`taylor`, `magnitude` and `random` score the part once (`channel_scores`). `gates` starts from `taylor`, learns ranks
and norms by gradient behind the adapter, where the clone will run, and tunes the remaining norms. `local-surrogate`
learns ranks on the source alone, as the paper does in our reading (`paper_surrogate`).
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, fx

from pnc.channels.channel_masks import ChannelMasks
from pnc.channels.channel_spaces import channel_spaces
from pnc.channels.compaction import compact, own_copy
from pnc.channels.mac_budget import Costs, least_macs, masks_within
from pnc.clones.adapter import Adapter
from pnc.foundation.errors import InputError
from pnc.foundation.resumable_steps import NO_STEPS, Steps
from pnc.graph.cut_points import LOGITS, extract
from pnc.method.held_out import source_body, unscored
from pnc.method.localization.aim import Aim
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

_STEP = "localized"
_TINY = 1e-30  # keeps the logarithm of effects finite


def localize(
    task: CloneTask,
    adapter: Adapter,
    density: float,
    method: Method = "gates",
    *,
    norms: bool = False,
    hold_out: bool = True,
    round_to: int = 1,
    steps: Steps = NO_STEPS,
    progress: Progress | None = None,
) -> SourcePart:
    """Cut the source behind an adapter and keep the given share of it.

    Channels are chosen without the fold that scores the clone. Statistics and norms are computed twice: without this
    fold, for the score, and on all images, for the clone.

    Args:
        task: Gives source and support.
        adapter: The part begins at its source cut.
        density: Share of the prunable multiply-accumulates to keep, in (0, 1]; if no channel can be removed, all stay.
        method: How channels are chosen.
        norms: Tune scales and shifts of BatchNorm layers; otherwise only recompute their statistics.
        hold_out: Leave out the fold that scores the clone; otherwise use all images throughout.
        round_to: Keep channels in multiples of this number, see `masks_within`.
        steps: Stores the part, so that a stopped job can continue.
        progress: Called after each training step.
    Raises:
        InputError: the method is unknown, or the density cannot be met.
    """
    density = Removal(density, method, round_to).fixed_density
    task = task.within(4 * adapter.source_cut.size + task.samples.images.n_bytes)
    body = source_body(task, adapter.source_cut)
    if density == 1 or not (spaces := channel_spaces(body)).spaces:
        return SourcePart(own_copy(body))
    costs = Costs(body, spaces)
    seen = unscored(task) if hold_out else task
    kept = steps.get(_STEP)
    if kept is not None:
        masks = ChannelMasks.from_bytes(kept["masks"].numpy().tobytes(), spaces.sizes)
        modules = [compact(body, spaces, masks) for _ in range(1 if seen is task else 2)]
        for place, module in enumerate(modules):
            module.load_state_dict({name: kept[f"{place}.{name}"] for name in module.state_dict()})
        return SourcePart(
            modules[0], masks, costs.density(masks.flat), held_out=modules[1] if len(modules) > 1 else None
        )
    _check_rounding(costs, density, round_to)
    choice = _Choice(seen, adapter, body, costs, progress)
    with task.autocast():
        ranking, learned = choice.ranking(density, method)
    masks = masks_within(choice.costs, ranking, choice.costs.bound(density), round_to)
    module = compact(body, spaces, masks)
    start = module if learned is None else compact(learned, spaces, masks)
    held_out = None
    if seen is not task:
        held_out = own_copy(module)
        choice.settle(held_out, start, norms)
        choice = _Choice(task, adapter, body, costs, progress)
    choice.settle(module, start, norms)
    own = {f"0.{name}": tensor for name, tensor in module.state_dict().items()}
    if held_out is not None:
        own |= {f"1.{name}": tensor for name, tensor in held_out.state_dict().items()}
    steps.keep(_STEP, {"masks": torch.frombuffer(bytearray(masks.to_bytes()), dtype=torch.uint8), **own})
    return SourcePart(module, masks, costs.density(masks.flat), held_out=held_out)


def _check_rounding(costs: Costs, density: float, round_to: int) -> None:
    """Refuse multiples of a number of channels so large that even the fewest exceed the density.

    Raises:
        InputError: the message names the lowest density that has room for them.
    """
    least = least_macs(costs, round_to)
    if least > costs.bound(density):
        lowest = math.ceil(1000 * (least - costs.least) / (costs.most - costs.least)) / 1000
        way_out = f", or a density of at least {lowest:g}" if lowest < 1 else ""
        raise InputError(
            f"round_to={round_to}: at density {density:g} not even so few channels can stay; use a smaller "
            f"number{way_out}"
        )


class _Choice:
    """One choice of channels: the part's inputs for the support, and the batches to learn from."""

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
        """Rank all units by a method; also return the part with the norms learned along with them, if any."""
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
        """Draw endless batches of the part's inputs, each with its loss."""
        inputs, aim = self._whole, Aim(self._task)
        for rows in _draws(len(inputs), BATCH_SIZE, self._generator):
            yield inputs[rows], partial(aim.loss, wanted=aim.support.select(rows))

    def settle(self, module: fx.GraphModule, start: fx.GraphModule, norms: bool) -> None:
        """Recompute a compacted part's statistics in place, with `norms` after tuning them from those of `start`."""
        with self._task.autocast():
            if norms:
                batches = self.counted(self.batches(), "tuning norms", NORMS_STEPS)
                tune_norms(module, batches, NORMS_STEPS, self.inputs, start=start, team=self._task.team)
            else:
                reestimate_statistics(module, self.inputs, self._task.team)

    def counted(self, batches: Iterator[Batch], what: str, n_steps: int) -> Iterator[Batch]:
        """Yield the batches and report progress after each."""
        for step, batch in enumerate(batches, start=1):
            yield batch
            if self._progress is not None:
                self._progress(what, step, n_steps)

    def _surrogate_batches(self) -> Iterator[Batch]:
        """Draw endless neighbourhoods of samples of the new classes, each with the distance of its explanations."""
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


def _laid_out(tensor: Tensor) -> Tensor:
    """Return maps in channels_last, in which convolutions train a third faster."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _draws(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Draw row numbers below n endlessly, `size` at a time (or all n, if fewer), each equally often."""
    while True:
        for rows in torch.randperm(n, generator=generator).split(min(size, n)):
            if len(rows) == min(size, n):
                yield rows
