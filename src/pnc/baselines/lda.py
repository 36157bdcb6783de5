"""Shrinkage LDA on the target's penultimate features: what the target alone offers, without the source."""

import numpy as np
import torch

from pnc.baselines.features import Linear, on_target, target_features
from pnc.baselines.protocol import Budget, Fitted, Rival, need_base_samples
from pnc.errors import InputError
from pnc.task import CloneTask


def fit(task: CloneTask, budget: Budget) -> Fitted:
    """Fit scikit-learn's LDA with the Ledoit-Wolf shrinkage and equal priors on all classes of the support."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    need_base_samples(task, "LDA on the target's features")
    n_classes = task.n_base + len(task.new_classes)
    if task.samples.labels.bincount(minlength=n_classes).min() < 2:  # it estimates one covariance for each class
        raise InputError("LDA on the target's features needs two samples of every class; the support has one of some")
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=np.full(n_classes, 1 / n_classes))
    model.fit(target_features(task).double().numpy(), task.samples.labels.numpy())
    return Fitted(on_target(task, Linear(torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_))))


RIVAL = Rival("LDA on target features", "features", fit)
