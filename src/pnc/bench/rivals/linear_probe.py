"""Logistic regression on the penultimate features of one network; its penalty is chosen by cross-validation."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pnc.bench.rivals.frozen_features import Linear, Role, features_of, on_features
from pnc.bench.rivals.rival import Budget, Fitted, Rival, need_base_samples
from pnc.method.task import CloneTask

PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
_STEPS = 2000


def fit(task: CloneTask, budget: Budget, role: Role = "target") -> Fitted:
    """Choose the penalty of the lowest held-out loss over the folds of the support, then fit on all of it."""
    need_base_samples(task, f"a linear probe of the {role}'s features")
    rows, labels, folds = features_of(task, role).double(), task.samples.labels, task.samples.folds
    mean, scale = rows.mean(0), rows.std(0).clamp_min(1e-6)
    rows, weights = (rows - mean) / scale, 1 / labels.bincount().double()
    trials = []
    for penalty in PENALTIES if task.samples.n_folds > 1 else ():
        logits = torch.zeros(len(labels), len(weights), dtype=torch.float64)
        for fold in range(task.samples.n_folds):
            held_out = folds == fold
            weight, bias = regression(rows[~held_out], labels[~held_out], penalty)
            logits[held_out] = rows[held_out] @ weight.T + bias
        trials.append({"penalty": penalty, "score": -float(F.cross_entropy(logits, labels, weight=weights))})
    penalty = max(trials, key=lambda trial: trial["score"])["penalty"] if trials else PENALTIES[0]
    weight, bias = regression(rows, labels, penalty)
    weight = weight / scale
    classifier = Linear(weight, bias - weight @ mean)
    return Fitted(on_features(task, classifier, role), {"penalty": penalty}, trials)


def regression(rows: Tensor, labels: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight (K, D) and bias (K,) of the lowest cross-entropy plus `penalty` / 2 times the squared weights.

    The cross-entropy is a mean in which every class weighs the same.

    Args:
        rows: (N, D), float64.
        labels: (N,), of all K classes.
        penalty: Above 0.
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    weights = (1 / labels.bincount().double())[labels]
    model = LogisticRegression(C=1 / (penalty * float(weights.sum())), max_iter=_STEPS)
    with threadpool_limits(torch.get_num_threads(), user_api="blas"):  # more than a free core each: 20 times as long
        model.fit(rows.numpy(), labels.numpy(), weights.numpy())
    if len(model.classes_) == 2:  # scikit-learn gives one row for two classes
        weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
        return torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)


ON_TARGET = Rival("linear probe", "features", fit, {"penalty": PENALTIES})
ON_SOURCE = Rival("linear probe of source features", "features", partial(fit, role="source"), {"penalty": PENALTIES})
