"""Scores of other authors for choosing a source, from its answers to the support; higher is better for all of them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

N_STEPS = 50
"""At most so many steps of LogME's fixed point; it takes a handful."""


def logme(features: Tensor, labels: Tensor) -> float:
    """Maximum evidence of a Bayesian linear regression of each class's indicator on the features, per sample, averaged.

    You, Liu, Wang, Long: "LogME", ICML 2021 (arXiv:2102.11005).

    Args:
        features: (N, D).
        labels: Class ids, (N,); classes without samples are left out.
    """
    rows = features.double()
    n, n_features = rows.shape
    left, singular, _ = torch.linalg.svd(rows, full_matrices=False)
    squares = singular.square()
    return sum(_evidence(left, squares, (labels == label).double(), n, n_features) for label in labels.unique()) / len(
        labels.unique()
    )


def _evidence(left: Tensor, squares: Tensor, wanted: Tensor, n: int, n_features: int) -> float:
    """Log-evidence per sample, at the precisions of weights (alpha) and noise (beta) that maximise it."""
    along = (left.T @ wanted).square()
    beside = max(float(wanted.square().sum() - along.sum()), 0.0)
    alpha = beta = 1.0
    ratio = 1.0
    for _ in range(N_STEPS):
        n_effective = float((squares / (squares + ratio)).sum())
        weights = float((squares * along / (squares + ratio).square()).sum())
        missed = float((along / (1 + squares / ratio).square()).sum()) + beside
        alpha, beta = n_effective / (weights + 1e-5), (n - n_effective) / (missed + 1e-5)
        before, ratio = ratio, alpha / beta
        if abs(ratio - before) <= 1e-3 * before:
            break
    n_effective_logs = float((alpha + beta * squares).log().sum()) + (n_features - len(squares)) * math.log(alpha)
    weights = float((squares * along / (squares + ratio).square()).sum())
    missed = float((along / (1 + squares / ratio).square()).sum()) + beside
    total = n_features * math.log(alpha) + n * math.log(beta / (2 * math.pi)) - n_effective_logs
    return (total - beta * missed - alpha * weights) / 2 / n


def leep(probabilities: Tensor, labels: Tensor) -> float:
    """Mean log-likelihood of the labels when each is predicted from the source's own answers.

    Nguyen, Hassner, Seeger, Archambeau: "LEEP", ICML 2020 (arXiv:2002.12462): p(y | x) is the sum over source classes z
    of P(y | z) p(z | x), with P(y | z) = P(y, z) / P(z) counted on the same images.

    Args:
        probabilities: The source's probabilities of its K classes, (N, K): p(z | x).
        labels: Class ids, (N,).
    """
    answers = probabilities.double()
    joint = F.one_hot(labels).double().T @ answers / len(labels)  # P(y, z)
    given = joint / joint.sum(0, keepdim=True).clamp_min(1e-300)  # P(y | z)
    return float((answers @ given.T)[torch.arange(len(labels)), labels].clamp_min(1e-300).log().mean())


def nearest_mean(features: Tensor, labels: Tensor, folds: Tensor) -> Tensor:
    """Which samples are nearest to their own class's mean when held out, (N,) bool; features get length one.

    Args:
        features: (N, D).
        labels: Class ids, (N,).
        folds: The fold in which each is held out, (N,).
    """
    rows, right = F.normalize(features.double(), dim=1), torch.zeros(len(labels), dtype=torch.bool)
    for fold in folds.unique():
        held_out = folds == fold
        known = labels[~held_out].unique()
        means = torch.stack([rows[~held_out & (labels == label)].mean(0) for label in known])
        right[held_out] = known[torch.cdist(rows[held_out], means).argmin(1)] == labels[held_out]
    return right
