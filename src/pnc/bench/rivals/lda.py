"""Shrinkage LDA on the penultimate features of one network: what the target, or the source, offers alone."""

from functools import partial

import numpy as np
import torch

from pnc.bench.rivals.frozen_features import Linear, Role, features_of, on_features
from pnc.bench.rivals.rival import Budget, Fitted, Rival, need_base_samples
from pnc.foundation.errors import InputError
from pnc.method.task import CloneTask


def fit(task: CloneTask, budget: Budget, role: Role = "target") -> Fitted:
    """Fit scikit-learn's LDA with Ledoit-Wolf shrinkage; base and new classes have equal total weight."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    need_base_samples(task, f"LDA on the {role}'s features")
    n_classes = task.n_base + len(task.new_classes)
    if task.samples.labels.bincount(minlength=n_classes).min() < 2:  # it estimates a covariance per class
        raise InputError(f"LDA on the {role}'s features needs two samples of every class; the support has fewer of one")
    priors = np.repeat([0.5 / task.n_base, 0.5 / len(task.new_classes)], [task.n_base, len(task.new_classes)])
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=priors)
    model.fit(features_of(task, role).double().numpy(), task.samples.labels.numpy())
    classifier = Linear(torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_))
    return Fitted(on_features(task, classifier, role))


ON_TARGET = Rival("LDA on target features", "features", fit)
ON_SOURCE = Rival("LDA on source features", "features", partial(fit, role="source"))
