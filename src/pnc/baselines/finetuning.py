"""Fine-tuning with balanced replay: all of the target's parameters are trained on the new and the kept base samples.

Learning rate and treatment of BatchNorm are chosen on a validation quarter of the support; then the target is tuned on
all of it. Batches hold every class equally often. Gradients are clipped: without that, networks whose BatchNorm keeps
its statistics diverge at every learning rate that is worth trying.
"""

import copy
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnc.errors import InputError
from pnc.task import CloneTask

LEARNING_RATES = (0.003, 0.01, 0.03)
EPOCHS = 30
MIN_STEPS = 300  # of small supports; on digits, 5 + 20 images per class, 30 steps give .80 on average, 300 give .95
BATCH_SIZE = 64
WEIGHT_DECAY = 5e-4
_GRADIENT_NORM = 1.0
_VALIDATION_SHARE = 4  # one image in so many


@dataclass(frozen=True)
class Setting:
    """One point of the search: learning rate of SGD, and whether BatchNorm uses and updates batch statistics."""

    learning_rate: float
    train_norm: bool


DEFAULT = Setting(LEARNING_RATES[0], train_norm=True)  # where the support is too small to choose


def fit(task: CloneTask) -> nn.Module:
    """Choose the setting on held-out support, then tune a copy of the target on all of it."""
    if not task.has_base:
        raise InputError("fine-tuning with replay needs samples of the base classes; the support has none")
    return _tune(task, torch.ones_like(task.samples.labels, dtype=torch.bool), choose_setting(task))


def choose_setting(task: CloneTask) -> Setting:
    """Give the setting that classifies held-out images best; of several such the one of the lowest loss."""
    held_out = _validation(task)
    is_base = task.samples.labels[held_out] < task.n_base
    if not is_base.any() or is_base.all():
        return DEFAULT
    settings = [Setting(*values) for values in itertools.product(LEARNING_RATES, (False, True))]
    return max(settings, key=lambda setting: _quality(_tune(task, ~held_out, setting), task, held_out))


def _validation(task: CloneTask) -> Tensor:
    """Rows of every fourth image of each class that has two or more; flipped copies go with their original."""
    chosen = torch.zeros_like(task.samples.labels, dtype=torch.bool)
    for label in task.samples.labels.unique():
        images = task.samples.groups[task.samples.labels == label].unique()
        if len(images) > 1:
            chosen |= torch.isin(task.samples.groups, images[::_VALIDATION_SHARE])
    return chosen


def _tune(task: CloneTask, rows: Tensor, setting: Setting) -> nn.Module:
    generator = torch.Generator().manual_seed(task.seed)
    model = extend_classifier(task, generator)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # a quarter faster; not in its stubs
    images, labels = task.samples.images[rows].to(task.target.device), task.samples.labels[rows]
    weights = (1 / labels.bincount().clamp_min(1).double())[labels]
    labels = labels.to(task.target.device)
    steps = max(MIN_STEPS, EPOCHS * (len(labels) // BATCH_SIZE))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=setting.learning_rate, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, setting.learning_rate, total_steps=steps)
    model.train(setting.train_norm)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(task.seed)  # what dropout draws from; torch.manual_seed seeds every device
        for _ in range(steps):
            batch = torch.multinomial(weights, BATCH_SIZE, replacement=True, generator=generator)
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), _GRADIENT_NORM)
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def extend_classifier(task: CloneTask, generator: torch.Generator) -> nn.Module:
    """Copy the target and widen its classifier by the new classes, with small random rows."""
    head = task.target.head
    model = copy.deepcopy(task.target.model).requires_grad_(True)
    old = model.get_submodule(head.module or "")
    if not isinstance(old, nn.Linear):
        raise InputError(f"fine-tuning needs a linear classifier to widen; the target's is {type(old).__name__}")
    wide = nn.Linear(old.in_features, old.out_features + len(task.new_classes), device="meta", dtype=old.weight.dtype)
    wide = wide.to_empty(device="cpu")
    with torch.no_grad():
        wide.weight.normal_(0, 0.01, generator=generator)
        wide.bias.zero_()
        wide.weight[: old.out_features] = old.weight
        if old.bias is not None:
            wide.bias[: old.out_features] = old.bias
    model.set_submodule(head.module or "", wide.to(old.weight.device))
    return model


@torch.no_grad()
def _quality(model: nn.Module, task: CloneTask, rows: Tensor) -> tuple[float, float]:
    """Average accuracy on `rows`, and minus the loss; base and new samples weigh the same."""
    labels, images = task.samples.labels[rows], task.samples.images[rows]
    logits = torch.cat([model(batch.to(task.target.device)).cpu() for batch in images.split(task.batch_size)])
    correct, base = (logits.argmax(1) == labels).double(), labels < task.n_base
    loss = F.cross_entropy(logits, labels, reduction="none")
    return float(correct[base].mean() + correct[~base].mean()) / 2, -float(loss[base].mean() + loss[~base].mean())
