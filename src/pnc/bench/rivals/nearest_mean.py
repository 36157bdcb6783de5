"""Nearest class mean on the target's penultimate features, all of length one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnc.bench.rivals.frozen_features import features_of, on_features
from pnc.bench.rivals.rival import Budget, Fitted, Rival, need_base_samples
from pnc.method.task import CloneTask

SCALES = tuple(2.0**power for power in range(-2, 11))


class NearestMean(nn.Module):
    """Negative scaled squared distances of normalised features from the class means, without their common term."""

    def __init__(self, means: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("means", means)
        self.means: Tensor
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, K) for features (B, D)."""
        return self.scale * F.linear(F.normalize(features.float(), dim=1), 2 * self.means, -self.means.square().sum(1))


def best_scale(features: Tensor, means: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """The means, and the scale with the lowest balanced cross-entropy; the scale changes no prediction.

    Args:
        features: (N, D), of length one.
        means: (K, D).
        labels: (N,).
    """
    weights = 1 / labels.bincount(minlength=len(means)).clamp_min(1).to(features.dtype)
    squares = torch.cdist(features, means).square()
    losses = [float(F.cross_entropy(-scale * squares, labels, weight=weights)) for scale in SCALES]
    return means, SCALES[losses.index(min(losses))]


def fit(task: CloneTask, budget: Budget) -> Fitted:
    """Compute the means of the support's features; only the scale of the logits is chosen."""
    need_base_samples(task, "the nearest mean of the target's features")
    features, labels = F.normalize(features_of(task), dim=1), task.samples.labels
    means = torch.stack([features[labels == label].mean(0) for label in range(task.n_base + len(task.new_classes))])
    means, scale = best_scale(features, means, labels)
    return Fitted(on_features(task, NearestMean(means, scale)), {"scale": scale})


RIVAL = Rival("nearest mean", "features", fit)
