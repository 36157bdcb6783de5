"""Heads without base samples, from the means that the target's BatchNorm layers keep of its training images.

A BatchNorm layer keeps the mean of its input over training images and positions: exactly the mean, over images, of the
input pooled over positions. So the mean of one feature vector of the base classes is known without any of their images;
of the new classes there are samples. Together they give a linear discriminant between both kinds.
"""

import math

import torch
from torch import Tensor

from pnc.clones.heads import DiscriminantHead, SourceHead, StackedHead, in_half_precision
from pnc.method.discriminants import ABSENT
from pnc.method.head_fitting import HeadSamples

SHRINKAGE, TRUST, DOUBT = 0.7, 0.5, 3.0
"""Shrinkage of the covariance; largest weight of the discriminant, which models all base classes by one Gaussian;
weight for each unit of probability that both networks side by side give to base classes on new samples. Chosen on
small networks for digits, MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 with 20 and 100 images per class, so that it
is nowhere worse than both networks side by side; `pnc bench compare` with supports like 100/0 measures it."""


def remembering_head(samples: HeadSamples, mean: Tensor, own: SourceHead) -> StackedHead | SourceHead:
    """Make a head without base samples: the source's own logits, and a discriminant against the remembered mean.

    The log-odds of new against base are those of an ensemble of both networks plus a share of the discriminant's. The
    discriminant has one Gaussian for each kind, with the covariance of the new samples. Its share shrinks with the gap
    between samples that it was fitted on and held-out ones, and where the ensemble knows new samples for new: there it
    could only do harm. Among the new classes, only the source decides.

    Args:
        samples: Of new classes only; `target_features` are those whose mean is known.
        mean: Of the base classes' images, (D_t,).
        own: The source's classifier of the new classes; returned alone if no sample can be held out.
    """
    rows, base = samples.target_features.double(), mean.double()
    if int(samples.folds.max()) == 0:
        return own
    weight, bias = _discriminant(rows, base)
    held_out = torch.empty(len(rows), dtype=torch.float64)
    for fold in samples.folds.unique():
        other_weight, other_bias = _discriminant(rows[samples.folds != fold], base)
        held_out[samples.folds == fold] = rows[samples.folds == fold] @ other_weight + other_bias
    odds = samples.own_logits.double().logsumexp(1) - samples.base_logits.double().logsumexp(1)
    trust = min(TRUST, DOUBT * float(odds.neg().sigmoid().mean()))
    share = trust * float((held_out.mean() / (rows @ weight + bias).mean().clamp_min(1e-12)).clamp(0, 1))
    n_new = samples.n_classes - samples.n_base
    fitted = DiscriminantHead(samples.n_base, samples.n_classes, rows.shape[1] + samples.clone_features.shape[1])
    fitted.weight[samples.n_base :, : rows.shape[1]] = weight
    fitted.bias[1 : samples.n_base] = ABSENT  # the first base class, with score zero, represents all of them
    fitted.bias[samples.n_base :] = bias - math.log(n_new)
    head = StackedHead(in_half_precision(fitted), own)
    head.odds_weight.copy_(torch.tensor([share, 1.0, -1.0, 0.0]))
    head.class_weight.copy_(torch.tensor([0.0, 1.0]))
    return head


def _discriminant(rows: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (D,) and bias () of the log-odds of samples like `rows` (N, D) against others with mean `base` (D,)."""
    centre, scale = rows.mean(0), rows.std(0, correction=0)
    scale = scale.clamp_min(1e-6 * float(scale.max()) + 1e-12)  # constant features carry no information
    centred = (rows - centre) / scale
    identity = torch.eye(len(scale), dtype=torch.float64)
    correlation = (1 - SHRINKAGE) * centred.T @ centred / len(rows) + SHRINKAGE * identity
    weight = torch.linalg.solve(correlation, (centre - base) / scale) / scale
    return weight, -weight @ (centre + base) / 2
