"""Direct ensemble with a temperature for each network and an offset of the new logits, fitted on the support."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pnc.bench.rivals.ensemble import DirectEnsemble
from pnc.bench.rivals.rival import Budget, Fitted, Rival, need_base_samples
from pnc.method.head_fitting import balanced_weights
from pnc.method.task import CloneTask

_STEPS = 100


def fit(task: CloneTask, budget: Budget) -> Fitted:
    """Fit three numbers by cross-entropy; base and new samples have equal weight, as in average accuracy."""
    need_base_samples(task, "an ensemble with temperatures")
    raw = DirectEnsemble(task.target.recording.module, task.source.recording.module, task.source_ids)
    with torch.no_grad():
        batches = task.samples.images.split(task.batch_size)
        logits = torch.cat([raw(images.to(task.target.device)).double().cpu() for images in batches])
    scales, offset = fit_scales(logits, task.samples.labels, task.n_base)
    raw.scales, raw.offset = scales, offset
    return Fitted(raw, {"target_scale": scales[0], "source_scale": scales[1], "offset": offset})


def fit_scales(logits: Tensor, labels: Tensor, n_base: int) -> tuple[tuple[float, float], float]:
    """Scales of base and new logits, and the offset of the new ones, with the lowest balanced cross-entropy.

    Args:
        logits: (N, K_base + K_new), float64.
        labels: (N,), of all classes.
        n_base: K_base.
    """
    weights = balanced_weights(labels, n_base)
    weights = weights / weights.sum()
    values = torch.zeros(3, dtype=torch.float64, requires_grad=True)  # logarithms of both scales; offset
    optimizer = torch.optim.LBFGS([values], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scaled = torch.cat([logits[:, :n_base] * values[0].exp(), logits[:, n_base:] * values[1].exp() + values[2]], 1)
        value = (F.cross_entropy(scaled, labels, reduction="none") * weights).sum()
        torch.autograd.backward(value)
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    target, source, offset = values.detach().tolist()
    return (float(torch.tensor(target).exp()), float(torch.tensor(source).exp())), offset


RIVAL = Rival("ensemble with temperatures", "ensemble", fit)
