"""Logistic regression on the penultimate features of one network; its penalty is chosen by cross-validation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pnc.bench.rivals.frozen_features import Linear, Role, features_of, on_features
from pnc.bench.rivals.rival import Budget, Fitted, Rival, need_base_samples
from pnc.method.head_fitting import balanced_weights
from pnc.method.task import CloneTask

PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
_STEPS = 2000


@dataclass(frozen=True, eq=False)
class Regression:
    """A logistic regression with its penalty.

    Attributes:
        weight: (K, D).
        bias: (K,).
        penalty: The chosen one.
        held_out: Logits of each sample by the regression without its fold, (N, K), float64; by the regression on all
            samples if there is only one fold.
        trials: Each penalty with its score on held-out folds.
    """

    weight: Tensor
    bias: Tensor
    penalty: float
    held_out: Tensor
    trials: Sequence[Mapping[str, float]]


def fit(task: CloneTask, budget: Budget, role: Role = "target") -> Fitted:
    """Choose the penalty with the lowest held-out loss over the folds of the support, then fit on all of it."""
    need_base_samples(task, f"a linear probe of the {role}'s features")
    labels = task.samples.labels
    weights = balanced_weights(labels, task.n_base)
    found = chosen_regression(features_of(task, role).double(), labels, weights, task.samples.folds)
    classifier = Linear(found.weight, found.bias)
    return Fitted(on_features(task, classifier, role), {"penalty": found.penalty}, found.trials)


def chosen_regression(rows: Tensor, labels: Tensor, weights: Tensor, folds: Tensor) -> Regression:
    """Fit a regression on standardized features, with the penalty of lowest held-out cross-entropy.

    Args:
        rows: (N, D), float64.
        labels: (N,), of all K classes.
        weights: Of the samples, (N,), float64.
        folds: (N,); all zero if nothing can be held out.
    """
    mean, scale = rows.mean(0), rows.std(0).clamp_min(1e-6)
    rows = (rows - mean) / scale
    n_classes, n_folds = int(labels.max()) + 1, int(folds.max()) + 1
    trials, held_out = [], {}
    for penalty in PENALTIES if n_folds > 1 else ():
        logits = torch.zeros(len(labels), n_classes, dtype=torch.float64)
        for fold in range(n_folds):
            rest = folds != fold
            weight, bias = regression(rows[rest], labels[rest], weights[rest], penalty)
            logits[~rest] = rows[~rest] @ weight.T + bias
        losses = F.cross_entropy(logits, labels, reduction="none")
        trials.append({"penalty": penalty, "score": -float((losses * weights).sum() / weights.sum())})
        held_out[penalty] = logits
    penalty = max(trials, key=lambda trial: trial["score"])["penalty"] if trials else PENALTIES[0]
    weight, bias = regression(rows, labels, weights, penalty)
    seen = held_out.get(penalty, rows @ weight.T + bias)
    weight = weight / scale
    return Regression(weight, bias - weight @ mean, penalty, seen, trials)


def regression(rows: Tensor, labels: Tensor, weights: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight (K, D) and bias (K,) that minimize weighted mean cross-entropy plus `penalty` / 2 times squared weights.

    Args:
        rows: (N, D), float64.
        labels: (N,), of all K classes.
        weights: Of the samples, (N,), float64.
        penalty: Above 0.
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    model = LogisticRegression(C=1 / (penalty * float(weights.sum())), max_iter=_STEPS)
    with threadpool_limits(torch.get_num_threads(), user_api="blas"):  # more threads than cores take 20 times as long
        model.fit(rows.numpy(), labels.numpy(), weights.numpy())
    if len(model.classes_) == 2:  # scikit-learn returns one row for two classes
        weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
        return torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)


ON_TARGET = Rival("linear probe", "features", fit, {"penalty": PENALTIES})
ON_SOURCE = Rival("linear probe of source features", "features", partial(fit, role="source"), {"penalty": PENALTIES})
