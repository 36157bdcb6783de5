"""Fine-tuning with balanced replay: all of the target's parameters are trained on the new and the kept base samples.

Learning rate and treatment of BatchNorm are chosen on a validation quarter of the support; then the target is tuned on
all of it. Batches hold every class equally often.
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
BATCH_SIZE = 64
WEIGHT_DECAY = 5e-4
_VALIDATION_SHARE = 4  # one image in so many


@dataclass(frozen=True)
class Setting:
    """One point of the search: learning rate of SGD, and whether BatchNorm uses and updates batch statistics."""

    learning_rate: float
    train_norm: bool


def fit(task: CloneTask) -> nn.Module:
    """Choose the setting on held-out support, then tune a copy of the target on all of it."""
    if not task.has_base:
        raise InputError("fine-tuning with replay needs samples of the base classes; the support has none")
    held_out = _validation(task)
    settings = [Setting(*values) for values in itertools.product(LEARNING_RATES, (False, True))]
    best = max(settings, key=lambda setting: _average(_tune(task, ~held_out, setting), task, held_out))
    return _tune(task, torch.ones_like(held_out), best)


def _validation(task: CloneTask) -> Tensor:
    """Rows of every fourth image of each class, at least one of each; flipped copies go with their original."""
    chosen = torch.zeros_like(task.samples.labels, dtype=torch.bool)
    for label in task.samples.labels.unique():
        images = task.samples.groups[task.samples.labels == label].unique()
        chosen |= torch.isin(task.samples.groups, images[::_VALIDATION_SHARE])
    return chosen


def _tune(task: CloneTask, rows: Tensor, setting: Setting) -> nn.Module:
    generator = torch.Generator().manual_seed(task.seed)
    model = extend_classifier(task, generator)
    images, labels = task.samples.images[rows], task.samples.labels[rows]
    weights = (1 / labels.bincount().clamp_min(1).double())[labels]
    steps = EPOCHS * max(1, len(labels) // BATCH_SIZE)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=setting.learning_rate, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, setting.learning_rate, total_steps=steps)
    model.train(setting.train_norm)
    for _ in range(steps):
        batch = torch.multinomial(weights, BATCH_SIZE, replacement=True, generator=generator)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
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
    wide = nn.utils.skip_init(nn.Linear, old.in_features, old.out_features + len(task.new_classes))
    with torch.no_grad():
        wide.weight.normal_(0, 0.01, generator=generator)
        wide.bias.zero_()
        wide.weight[: old.out_features] = old.weight
        if old.bias is not None:
            wide.bias[: old.out_features] = old.bias
    model.set_submodule(head.module or "", wide)
    return model


@torch.no_grad()
def _average(model: nn.Module, task: CloneTask, rows: Tensor) -> float:
    labels = task.samples.labels[rows]
    logits = torch.cat([model(images) for images in task.samples.images[rows].split(task.batch_size)])
    correct, base = (logits.argmax(1) == labels).double(), labels < task.n_base
    return float(correct[base].mean() + correct[~base].mean()) / 2
