"""The training loop and the search for settings of all rivals that train parameters of the target.

A rival defines what is trained, on which samples and with which loss in addition to cross-entropy; the rest is the same
for all. A quarter of the support is held out. Every setting of the rival's space is trained for a few steps on the
rest, the best few of them longer and from scratch, the best of these longer still; the setting and number of steps with
the best held-out score are then used on the whole support. Batches hold every class equally often, the learning rate
rises and falls, gradients are clipped: otherwise networks with fixed BatchNorm statistics diverge at every useful
learning rate.
"""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnc.bench.rivals.rival import Budget, Fitted
from pnc.channels.compaction import own_copy
from pnc.foundation.errors import InputError
from pnc.graph.candidate_cuts import candidate_cuts
from pnc.graph.cut_points import LOGITS, CutPoint, extract
from pnc.method.task import CloneTask

WEIGHT_DECAY = 5e-4
ROWS = 1200
"""Samples, mirror images included, up to which the budget is used as given; with more, steps grow in proportion."""
MOST = 4
"""Largest factor by which steps grow."""
_GRADIENT_NORM = 1.0
_VALIDATION_STEP = 4  # every fourth image is held out
_LAST_STAGE = 1 / 3  # smallest share of the multiply-accumulates

Scope = Literal["all", "last stage", "head"]
"""Which part of the target is trained: everything, the part after the last cut with at least a third of the multiply-
accumulates after it, or the classifier alone. The part before it runs once, and its outputs are kept."""


@dataclass(frozen=True)
class Hyperparameters:
    """One setting: learning rate of SGD, whether BatchNorm uses batch statistics, the method's own number, steps."""

    learning_rate: float
    train_norm: bool = True
    strength: float = 0.0
    n_steps: int = 0


@dataclass(frozen=True, eq=False)
class Data:
    """Training data, sample by sample.

    Attributes:
        inputs: Of the trained part, (N, ...): images, or the target's tensors at the cut where it starts.
        labels: (N,), base classes first.
        base_logits: The target's own logits, (N, K_base).
    """

    inputs: Tensor
    labels: Tensor
    base_logits: Tensor

    @property
    def is_base(self) -> Tensor:
        """Whether each sample is of a base class, (N,) bool."""
        return self.labels < self.base_logits.shape[1]

    def select(self, rows: Tensor) -> "Data":
        """Keep the given rows."""
        return Data(*(tensor[rows] for tensor in vars(self).values()))


Term = Callable[[nn.Module, Tensor, Data, float], Tensor]
"""(trained network, its logits, batch, strength of the setting) -> term added to cross-entropy."""


@dataclass(frozen=True, eq=False)
class TuningMethod:
    """A method of tuning.

    Attributes:
        settings: All settings; the first is used if the support is too small for a choice.
        strength: Name of the method's own number; None if it has none.
        scope: Which part is trained.
        replay: Whether base samples of the support are trained on; they help to choose the setting in any case.
        term: Added to cross-entropy.
        begin: Prepares the widened network, given the strength: selects the trained parameters, inserts others.
        finish: Turns the trained network into a classifier, given the samples that it was trained on.
    """

    settings: Sequence[Hyperparameters]
    strength: str | None = None
    scope: Scope = "all"
    replay: bool = True
    term: Term | None = None
    begin: Callable[[nn.Module, float, torch.Generator], None] | None = None
    finish: Callable[[nn.Module, Data], nn.Module] | None = None

    def words(self, setting: Hyperparameters) -> dict[str, Any]:
        """A setting as plain values, with the method's own name of its number."""
        own = {} if self.strength is None else {self.strength: setting.strength}
        return {
            "learning_rate": setting.learning_rate,
            "train_norm": setting.train_norm,
            **own,
            "steps": setting.n_steps,
        }


@dataclass(frozen=True)
class Quality:
    """Results of a setting on held-out samples; a higher score is better."""

    score: float
    accuracy: float
    loss: float

    def facts(self) -> dict[str, Any]:
        """As plain values, with None for infinite ones."""
        return {f"held_out_{name}": value if math.isfinite(value) else None for name, value in vars(self).items()}


def grid(
    learning_rates: Sequence[float], train_norm: Sequence[bool] = (True,), strengths: Sequence[float] = (0.0,)
) -> tuple[Hyperparameters, ...]:
    """All combinations."""
    return tuple(Hyperparameters(*values) for values in itertools.product(learning_rates, train_norm, strengths))


def tune(task: CloneTask, method: TuningMethod, budget: Budget) -> Fitted:
    """Choose the setting on held-out support, then tune a copy of the target on all of it."""
    trainer = _Trainer(task, method, budget)
    held_out = validation_rows(task)
    is_new = task.samples.labels >= task.n_base
    every = torch.ones_like(held_out)
    if not (held_out & is_new).any():
        chosen = replace(method.settings[0], n_steps=trainer.steps(budget.last_steps))
        return Fitted(trainer.whole(trainer.train(chosen, every)), method.words(chosen))
    trials: list[tuple[Quality, Hyperparameters]] = []
    settings = [replace(one, n_steps=trainer.steps(budget.first_steps)) for one in method.settings]
    for n_steps, n_left in ((budget.second_steps, budget.n_second), (budget.last_steps, 1), (0, 0)):
        made = [(trainer.quality(trainer.train(one, ~held_out), held_out), one) for one in settings]
        trials += made
        best = sorted(made, key=lambda trial: trial[0].score, reverse=True)[:n_left]
        settings = [replace(one, n_steps=trainer.steps(n_steps)) for _, one in best]
    long_enough = [trial for trial in trials if trial[1].n_steps >= trainer.steps(budget.second_steps)]
    chosen = max(long_enough, key=lambda trial: trial[0].score)[1]
    rows = [{**method.words(one), **quality.facts()} for quality, one in trials]
    return Fitted(trainer.whole(trainer.train(chosen, every)), method.words(chosen), rows)


def train_once(task: CloneTask, method: TuningMethod, budget: Budget) -> Fitted:
    """Tune a copy of the target on the whole support with the method's first setting, without a search."""
    trainer, setting = _Trainer(task, method, budget), method.settings[0]
    trained = trainer.train(setting, torch.ones_like(task.samples.labels, dtype=torch.bool))
    return Fitted(trainer.whole(trained), method.words(setting))


def validation_rows(task: CloneTask) -> Tensor:
    """Rows of every fourth image of each class with two or more, together with its mirror images."""
    chosen = torch.zeros_like(task.samples.labels, dtype=torch.bool)
    for label in task.samples.labels.unique():
        images = task.samples.groups[task.samples.labels == label].unique()
        if len(images) > 1:
            chosen |= torch.isin(task.samples.groups, images[::_VALIDATION_STEP])
    return chosen


class _Trainer:
    """Trains with one setting after another; holds what they share."""

    def __init__(self, task: CloneTask, method: TuningMethod, budget: Budget) -> None:
        self._task, self._method, self._budget = task, method, budget
        self._device = task.target.device
        self._cut = first_trained(task, method.scope)
        self._data = _data(task, self._cut)

    def steps(self, n_steps: int) -> int:
        """The number of steps, adapted to the size of the support."""
        return round(n_steps * min(MOST, max(1.0, len(self._data.labels) / ROWS)))

    def train(self, setting: Hyperparameters, rows: Tensor) -> nn.Module:
        """Train a copy of the target, or of its last part, on some rows of the support, (N,) bool."""
        method, generator = self._method, torch.Generator().manual_seed(self._task.seed)
        model = extend_classifier(self._task, self._cut, generator)
        if method.begin is not None:
            method.begin(model, setting.strength, generator)
        data = self._data.select((rows & (~self._data.is_base.cpu() | method.replay)).to(self._device))
        self._descend(model, setting, data, generator)
        model.eval().requires_grad_(False)
        return model if method.finish is None else method.finish(model, data)

    def _descend(self, model: nn.Module, setting: Hyperparameters, data: Data, generator: torch.Generator) -> None:
        budget, term = self._budget, self._method.term
        weights = (1 / data.labels.bincount().clamp_min(1).double())[data.labels].cpu()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(
            trained, lr=setting.learning_rate, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, setting.learning_rate, total_steps=max(setting.n_steps, 2)
        )
        model.train(setting.train_norm)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.default_generator.manual_seed(self._task.seed)  # for dropout; torch.manual_seed seeds all devices
            for _ in range(setting.n_steps):
                rows = torch.multinomial(weights, budget.batch_size, replacement=True, generator=generator)
                batch = data.select(rows.to(self._device))
                with torch.autocast(self._device.type, torch.bfloat16, enabled=budget.precision == "bfloat16"):
                    logits = model(batch.inputs)
                logits = logits.float()
                loss = F.cross_entropy(logits, batch.labels)
                if term is not None:
                    loss = loss + term(model, logits, batch, setting.strength)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(trained, _GRADIENT_NORM)
                optimizer.step()
                schedule.step()

    @torch.no_grad()
    def quality(self, model: nn.Module, rows: Tensor) -> Quality:
        """Evaluate a model on held-out samples; base and new samples have equal weight.

        The score is the negative loss, because accuracy on so few samples is mostly noise. Without base samples, the
        loss would favour models that forget; the score is then the accuracy, where agreement with the target about the
        best base class of new samples replaces the accuracy on base samples.
        """
        data = self._data.select(rows.to(self._device))
        logits = torch.cat([model(inputs).float() for inputs in data.inputs.split(self._task.batch_size)])
        n_base, is_base = self._task.n_base, data.is_base
        correct, loss = (
            (logits.argmax(1) == data.labels).double(),
            F.cross_entropy(logits, data.labels, reduction="none"),
        )
        if not loss.isfinite().all():
            return Quality(-math.inf, 0.0, math.inf)
        if not is_base.any():
            kept = (logits[:, :n_base].argmax(1) == data.base_logits.argmax(1)).double()
            accuracy = float(correct.mean() + kept.mean()) / 2
            return Quality(accuracy, accuracy, float(loss.mean()))
        accuracy, losses = (float(values[is_base].mean() + values[~is_base].mean()) / 2 for values in (correct, loss))
        return Quality(-losses, accuracy, losses)

    def whole(self, trained: nn.Module) -> nn.Module:
        """The network from images to logits; its untrained part is the target's."""
        if self._cut is None:
            return trained
        return nn.Sequential(extract(self._task.target.recording, None, [self._cut]), trained).eval()


def first_trained(task: CloneTask, scope: Scope) -> CutPoint | None:
    """The cut where the trained part starts; None for the whole network."""
    if scope == "all":
        return None
    features = task.target.head.features
    if scope == "head":
        return features
    cuts = candidate_cuts(task.target.recording)
    return [cut for cut in cuts if cut.n_macs <= (1 - _LAST_STAGE) * task.target.n_macs][-1]


@torch.no_grad()
def _data(task: CloneTask, cut: CutPoint | None) -> Data:
    device = task.target.device
    network = extract(task.target.recording, None, [cut, LOGITS] if cut is not None else [LOGITS])
    inputs, logits = [], []
    for images in task.samples.images.split(task.batch_size):
        found = network(images.to(device))
        inputs.append(images.to(device) if cut is None else found[0])
        logits.append((found if cut is None else found[1]).float())
    tensors = torch.cat(inputs)
    if tensors.dim() == 4:
        tensors = tensors.contiguous(memory_format=torch.channels_last)  # a quarter faster
    return Data(tensors, task.samples.labels.to(device), torch.cat(logits))


def extend_classifier(task: CloneTask, cut: CutPoint | None, generator: torch.Generator) -> nn.Module:
    """Copy the target, or its part after `cut`, and extend its classifier by small random rows for the new classes.

    Raises:
        InputError: the target's classifier is not a linear layer.
    """
    head, recording = task.target.head, task.target.recording
    model = copy.deepcopy(task.target.model) if cut is None else own_copy(extract(recording, cut, [LOGITS]))
    old = None if head.module is None else model.get_submodule(head.module)
    if not isinstance(old, nn.Linear):
        raise InputError(
            f"tuning needs a linear classifier to extend; the target's is {type(old).__name__ if old else 'no layer'}"
        )
    wide = nn.Linear(old.in_features, old.out_features + len(task.new_classes), device="meta", dtype=old.weight.dtype)
    wide = wide.to_empty(device="cpu")
    with torch.no_grad():
        wide.weight.normal_(0, 0.01, generator=generator)
        wide.bias.zero_()
        wide.weight[: old.out_features] = old.weight
        if old.bias is not None:
            wide.bias[: old.out_features] = old.bias
    wide = wide.to(old.weight.device)
    if head.module:
        model.set_submodule(head.module, wide)
    else:
        model = wide
    model.requires_grad_(True)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return] # not in its stubs
