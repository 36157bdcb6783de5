"""What a target remembers of its training images: means in its BatchNorm layers, for when there is no base sample.

A BatchNorm layer keeps the mean of its input over training images and positions. That is exactly the mean, over images,
of the input pooled over positions. So of one feature vector of the base classes' images the mean is known, without any
of these images; of the new classes' images there are samples. That makes a linear discriminant between both kinds.
"""

import math

import torch
from torch import Tensor

from pnc.clones.heads import DiscriminantHead, SourceHead, StackedHead, in_half_precision
from pnc.method.discriminants import ABSENT
from pnc.method.head_fitting import HeadSamples

SHRINKAGE, TRUST = 0.7, 0.5
"""Of the covariance; and the weight of the discriminant, which knows one Gaussian where there are several base classes.
Chosen on small networks for digits, MNIST, Fashion-MNIST and CIFAR-10 with 5, 20 and 100 images per class, as what lost
nowhere against the source's own logits; `pnc bench compare` with supports like 100/0 measures it."""


def remembering_head(samples: HeadSamples, mean: Tensor, own: SourceHead) -> StackedHead | SourceHead:
    """Make a head without base samples: the source's own logits, and a discriminant against the remembered mean.

    To the log-odds of new against base that an ensemble of both networks has, a share of those of the discriminant is
    added. It has one Gaussian for either kind, with the covariance of the new samples. Its share is smaller the more it
    promises on the samples that it was fitted on than on others. Among the new classes the source decides alone.

    Args:
        samples: Of new classes alone; `target_features` are those of which the mean is known.
        mean: Of the base classes' images, (D_t,).
        own: The source's classifier of the new classes; it is all there is where no sample can be held out.
    """
    rows, base = samples.target_features.double(), mean.double()
    if int(samples.folds.max()) == 0:
        return own
    weight, bias = _discriminant(rows, base)
    held_out = torch.empty(len(rows), dtype=torch.float64)
    for fold in samples.folds.unique():
        other_weight, other_bias = _discriminant(rows[samples.folds != fold], base)
        held_out[samples.folds == fold] = rows[samples.folds == fold] @ other_weight + other_bias
    share = TRUST * float((held_out.mean() / (rows @ weight + bias).mean().clamp_min(1e-12)).clamp(0, 1))
    n_new = samples.n_classes - samples.n_base
    fitted = DiscriminantHead(samples.n_base, samples.n_classes, rows.shape[1] + samples.clone_features.shape[1])
    fitted.weight[samples.n_base :, : rows.shape[1]] = weight
    fitted.bias[1 : samples.n_base] = ABSENT  # all base classes together are the first one, whose score is zero
    fitted.bias[samples.n_base :] = bias - math.log(n_new)
    head = StackedHead(in_half_precision(fitted), own)
    head.odds_weight.copy_(torch.tensor([share, 1.0, -1.0, 0.0]))
    head.class_weight.copy_(torch.tensor([0.0, 1.0]))
    return head


def _discriminant(rows: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (D,) and bias () of the log-odds of rows (N, D) like these against others with the mean `base` (D,)."""
    centre, scale = rows.mean(0), rows.std(0, correction=0)
    scale = scale.clamp_min(1e-6 * float(scale.max()) + 1e-12)  # features that never move carry no information
    centred = (rows - centre) / scale
    identity = torch.eye(len(scale), dtype=torch.float64)
    correlation = (1 - SHRINKAGE) * centred.T @ centred / len(rows) + SHRINKAGE * identity
    weight = torch.linalg.solve(correlation, (centre - base) / scale) / scale
    return weight, -weight @ (centre + base) / 2
