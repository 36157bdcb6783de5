"""Elastic weight consolidation: fine-tuning that restrains the parameters that the target's answers depend on.

Kirkpatrick et al., 2017 (arXiv:1612.00796). The importance of a parameter is its diagonal entry in the Fisher
information of the target's predictive distribution, divided by the mean over all parameters, so that a penalty means
the same for every network. Deviations: without the target's training data, the Fisher information is measured on the
base samples of the support, or on the new ones if there are none; base samples are also trained on.
"""

import torch
from torch import Tensor, nn

from pnc.bench.rivals.rival import Budget, Fitted, Rival
from pnc.bench.rivals.tuning import Data, TuningMethod, grid, tune, validation_rows
from pnc.method.task import CloneTask

LEARNING_RATES = (0.1, 0.3, 0.03, 1.0)
WEIGHTS = (0.01, 0.1, 0.001)
MOST_SAMPLES = 100
LARGEST = 100.0
"""Upper bound on the importance of a parameter: beyond it, steps would overshoot."""


def fit(task: CloneTask, budget: Budget) -> Fitted:
    """Tune everything, with a quadratic penalty on the distance from the target's parameters."""
    importance = fisher_information(task)
    origin = {name: tensor.detach() for name, tensor in task.target.model.named_parameters()}

    def penalty(model: nn.Module, logits: Tensor, batch: Data, strength: float) -> Tensor:
        # The first rows of the widened classifier are the target's.
        moved = [
            (importance[name] * (parameter[: len(origin[name])] - origin[name]).square()).sum()
            for name, parameter in model.named_parameters()
            if name in importance
        ]
        return strength / 2 * torch.stack(moved).sum()

    settings = grid(LEARNING_RATES, strengths=WEIGHTS)
    return tune(task, TuningMethod(settings, strength="penalty", term=penalty), budget)


def fisher_information(task: CloneTask) -> dict[str, Tensor]:
    """Diagonal of the Fisher information by parameter, divided by its mean; from samples that are not held out.

    Each sample adds its squared gradient for a class drawn from the target's predictive distribution.
    """
    samples, generator = task.samples, torch.Generator().manual_seed(task.seed)
    rows = ((samples.labels < task.n_base) == task.has_base) & ~validation_rows(task)
    if not rows.any():
        rows = torch.ones_like(rows)
    chosen = rows.nonzero().flatten()
    chosen = chosen[torch.randperm(len(chosen), generator=generator)[:MOST_SAMPLES]]
    model = task.target.recording.module
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    copies = {name: parameter.detach().clone().requires_grad_() for name, parameter in parameters.items()}
    with torch.enable_grad():
        for image in samples.images[chosen]:
            logits = torch.func.functional_call(model, copies, image[None].to(task.target.device))[0]
            drawn = torch.multinomial(logits.detach().softmax(0).cpu(), 1, generator=generator)
            gradients = torch.autograd.grad(
                logits.log_softmax(0)[drawn].sum(), list(copies.values()), allow_unused=True
            )
            for name, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient.square()
    mean = sum(float(values.sum()) for values in total.values()) / sum(values.numel() for values in total.values())
    return {name: (values / max(mean, 1e-30)).clamp_max(LARGEST) for name, values in total.items()}


RIVAL = Rival("EWC", "tuning", fit, {"learning_rate": LEARNING_RATES, "penalty": WEIGHTS})
