"""Shrinkage LDA on the target's penultimate features: what the target alone offers, without the source."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnc.cuts import CutPoint, extract
from pnc.errors import InputError
from pnc.stitching import pool
from pnc.task import CloneTask


class FeatureClassifier(nn.Module):
    """A linear classifier on the pooled features of a frozen network."""

    def __init__(self, network: nn.Module, features: CutPoint, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.network, self.features = network, features
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.weight: Tensor
        self.bias: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Give logits (B, K) for images (B, C, H, W)."""
        return F.linear(pool(self.network(images), self.features).float(), self.weight, self.bias)


def fit(task: CloneTask) -> nn.Module:
    """Fit scikit-learn's LDA with the Ledoit-Wolf shrinkage and equal priors on all classes of the support."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    if not task.has_base:
        raise InputError("LDA on the target's features needs samples of the base classes; the support has none")
    n_classes = task.n_base + len(task.new_classes)
    if task.samples.labels.bincount(minlength=n_classes).min() < 2:  # it estimates one covariance for each class
        raise InputError("LDA on the target's features needs two samples of every class; the support has one of some")
    features = task.target.head.features
    network = extract(task.target.recording, None, [features])
    with torch.no_grad():
        rows = torch.cat([pool(network(x), features).float() for x in task.samples.images.split(task.batch_size)])
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=np.full(n_classes, 1 / n_classes))
    model.fit(rows.double().numpy(), task.samples.labels.numpy())
    weight, bias = (torch.from_numpy(values).float() for values in (model.coef_, model.intercept_))
    return FeatureClassifier(network, features, weight, bias)
