"""Accuracy and locality of a composite, as pure functions of logits and labels.

Logits over all classes hold the base classes first: column k < n_base is the target's own class k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pnc.foundation.errors import InputError


@dataclass(frozen=True)
class LogitMeasures:
    """Accuracies on base and new classes, and how far predictions moved from the target's.

    Attributes:
        base_accuracy: Accuracy on samples of base classes, in [0, 1], predicting over base and new classes.
        new_accuracy: Accuracy on samples of new classes, likewise.
        average_accuracy: Mean of both.
        conditional_kl: Mean KL divergence, in nats, from the target's distribution to the composite's distribution
            restricted to the base classes, on base samples.
        leak: Mean probability of the new classes on base samples, in [0, 1].
        locality_kl: Mean KL divergence, in nats, from the target's distribution to the composite's over all classes,
            on base samples.
        base_drop: The target's own accuracy among the base classes minus `base_accuracy`.
    """

    base_accuracy: float
    new_accuracy: float
    average_accuracy: float
    conditional_kl: float
    leak: float
    locality_kl: float
    base_drop: float


def measure_logits(logits: Tensor, labels: Tensor, target_logits: Tensor) -> LogitMeasures:
    """Measure logits over base and new classes against labels and against the target's own logits.

    Args:
        logits: Logits of the composite or a rival, (N, K_base + K_new).
        labels: Class ids, (N,), each in [0, K_base + K_new); at least one base and one new sample.
        target_logits: Logits of the target alone on the same samples, (N, K_base).
    Raises:
        InputError: shapes do not match, or there is no base or no new sample.
    """
    n_base = target_logits.shape[1]
    if logits.shape[0] != labels.shape[0] or logits.shape[0] != target_logits.shape[0] or logits.shape[1] <= n_base:
        raise InputError(
            f"logits, labels and target_logits must be (N, K_base + K_new), (N,) and (N, K_base); "
            f"got {tuple(logits.shape)}, {tuple(labels.shape)}, {tuple(target_logits.shape)}"
        )
    base = labels < n_base
    if not base.any() or base.all():
        raise InputError("labels must contain samples of base classes and of new classes; only one kind was given")
    correct = logits.argmax(1) == labels
    base_accuracy, new_accuracy = _mean(correct[base]), _mean(correct[~base])
    own_accuracy = _mean(target_logits[base].argmax(1) == labels[base])
    return LogitMeasures(
        base_accuracy=base_accuracy,
        new_accuracy=new_accuracy,
        average_accuracy=(base_accuracy + new_accuracy) / 2,
        conditional_kl=conditional_kl(logits[base], target_logits[base]),
        leak=leak(logits[base], n_base),
        locality_kl=locality_kl(logits[base], target_logits[base]),
        base_drop=own_accuracy - base_accuracy,
    )


def conditional_kl(logits: Tensor, target_logits: Tensor) -> float:
    """Mean KL(target || composite restricted to the base classes), in nats; 0 where only new columns were added.

    Args:
        logits: (N, K_base + K_new).
        target_logits: (N, K_base).
    """
    return _kl(target_logits, logits[:, : target_logits.shape[1]].double().log_softmax(1))


def locality_kl(logits: Tensor, target_logits: Tensor) -> float:
    """Mean KL(target || composite over all classes), in nats: `conditional_kl` plus the mean of -log(1 - leak).

    Args:
        logits: (N, K_base + K_new).
        target_logits: (N, K_base).
    """
    return _kl(target_logits, logits.double().log_softmax(1)[:, : target_logits.shape[1]])


def leak(logits: Tensor, n_base: int) -> float:
    """Mean probability of the new classes, columns `n_base` and up of `logits` (N, K_base + K_new)."""
    return _mean(logits.double().softmax(1)[:, n_base:].sum(1))


def calibration_error(logits: Tensor, labels: Tensor, n_bins: int = 15) -> float:
    """Expected calibration error: mean gap between confidence and accuracy.

    Samples are binned by confidence, their highest probability, in bins of equal width. A bin's gap is the absolute
    difference between its accuracy and its mean confidence, weighted by its number of samples.

    Args:
        logits: (N, K).
        labels: (N,).
        n_bins: Number of bins, at least 1.
    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017 (arXiv:1706.04599).
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64)[1:-1]
    places = torch.bucketize(confidence, edges)  # a bin includes its upper edge
    gaps = torch.zeros(n_bins, dtype=torch.float64)
    gaps.index_add_(0, places, (predicted == labels).double() - confidence)
    return float(gaps.abs().sum()) / len(labels)


def auroc(logits: Tensor, labels: Tensor, n_base: int) -> float:
    """How well the log-odds of new against base classes tell new samples from base ones, whatever the shift.

    The probability that a new sample has higher log-odds than a base sample; equal ones count half.

    Args:
        logits: (N, K_base + K_new).
        labels: (N,); at least one base and one new sample.
        n_base: K_base.
    """
    odds = logits[:, n_base:].double().logsumexp(1) - logits[:, :n_base].double().logsumexp(1)
    base, new = odds[labels < n_base].sort().values, odds[labels >= n_base]
    below, not_above = (torch.searchsorted(base, new, right=right).double() for right in (False, True))
    return _mean((below + not_above) / 2) / len(base)


def shifted(logits: Tensor, n_base: int, shift: float) -> Tensor:
    """Logits (N, K_base + K_new) with `shift` added to the new ones; below 0 it favours base classes.

    The distributions among the base classes and among the new classes do not change.
    """
    return torch.cat([logits[:, :n_base], logits[:, n_base:] + shift], 1)


def _kl(target_logits: Tensor, log_probabilities: Tensor) -> float:
    reference = target_logits.double().log_softmax(1)
    per_sample = (reference.exp() * (reference - log_probabilities)).sum(1)
    return max(0.0, _mean(per_sample))  # rounding may make it negative for equal distributions


def _mean(values: Tensor) -> float:
    return float(values.to(torch.float64).mean())
