"""Linear discriminant analysis with a shrunk covariance: any shrinkage from one eigendecomposition.

Source: Friedman, Regularized Discriminant Analysis, JASA 84 (1989), with one pooled covariance and equal class priors;
features are scaled to unit within-class variance before shrinking.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

SHRINKAGES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 0.9)
ABSENT = -1e6
"""Bias of the discriminant of a class without samples, which excludes it."""


def fit_discriminants(features: Tensor, labels: Tensor, n_classes: int, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Fit linear discriminants.

    Args:
        features: (N, D).
        labels: Class ids, (N,), in [0, K); a class without samples is excluded.
        n_classes: K.
        shrinkage: Weight of the identity against the within-class correlation matrix, in (0, 1].
    Returns:
        Weight (K, D) and bias (K,), float32.
    """
    weight, bias = _Spectrum.of(features.double(), labels, n_classes).discriminants(shrinkage)
    return weight.float(), bias.float()


def choose_shrinkage(features: Tensor, labels: Tensor, folds: Tensor, n_rest: int) -> tuple[float, Tensor]:
    """Choose the shrinkage that best separates some classes from the rest, and from each other, on held-out samples.

    Args:
        features: (N, D).
        labels: Class ids, (N,); those of the rest come first.
        folds: (N,), the fold in which each sample is held out; with a single fold, the strongest shrinkage is used and
            nothing is held out.
        n_rest: Number of classes in the rest.
    Returns:
        The shrinkage with the lowest log-loss, where the rest and the other samples have equal weight; and the held-out
        log-odds of each other class against the rest, (N, K - n_rest), float64.
    """
    n_folds, n_classes = int(folds.max()) + 1, int(labels.max()) + 1
    tried = SHRINKAGES if n_folds > 1 else SHRINKAGES[-1:]
    rows = features.double()
    odds = rows.new_zeros(len(tried), len(labels), n_classes - n_rest)
    for fold in range(n_folds):
        held_out = folds == fold
        seen = ~held_out if n_folds > 1 else held_out
        spectrum = _Spectrum.of(rows[seen], labels[seen], n_classes)
        for index, shrinkage in enumerate(tried):
            weight, bias = spectrum.discriminants(shrinkage)
            scores = rows[held_out] @ weight.T + bias
            odds[index, held_out] = scores[:, n_rest:] - scores[:, :n_rest].logsumexp(1, keepdim=True)
    is_rest, places = labels < n_rest, (labels - n_rest + 1).clamp_min(0)
    losses = [F.cross_entropy(F.pad(one, (1, 0)), places, reduction="none") for one in odds]
    best = min(range(len(tried)), key=lambda i: float(losses[i][is_rest].mean() + losses[i][~is_rest].mean()))
    return tried[best], odds[best]


@dataclass(frozen=True)
class _Spectrum:
    """Class means and within-class correlation of one training set, ready for any shrinkage.

    Attributes:
        means: (K, D); zeros for a class without samples.
        present: Whether each class has samples, (K,) bool.
        scale: Standard deviations within classes, (D,).
        eigenvalues: Of the correlation matrix, (R,).
        eigenvectors: (D, R).
    """

    means: Tensor
    present: Tensor
    scale: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, n_classes: int) -> Self:
        """Read features (N, D), float64, of samples with `labels` (N,)."""
        counts = labels.bincount(minlength=n_classes)
        means = features.new_zeros(n_classes, features.shape[1]).index_add(0, labels, features)
        means = means / counts.clamp_min(1)[:, None]
        centred = features - means[labels]
        scale = centred.square().mean(0).sqrt()
        scale = scale.clamp_min(1e-6 * float(scale.max()) + 1e-12)  # constant features carry no information
        eigenvalues, eigenvectors = _eigen(centred / scale)
        return cls(means, counts > 0, scale, eigenvalues, eigenvectors)

    def discriminants(self, shrinkage: float) -> tuple[Tensor, Tensor]:
        """Weight (K, D) and bias (K,) of the linear discriminants."""
        centre = self.means[self.present].mean(0)
        means = torch.where(self.present[:, None], (self.means - centre) / self.scale, 0.0)
        gain = 1 / (shrinkage + (1 - shrinkage) * self.eigenvalues) - 1 / shrinkage
        weight = means / shrinkage + (means @ self.eigenvectors * gain) @ self.eigenvectors.T
        bias = -0.5 * (means * weight).sum(1)
        weight = weight / self.scale
        return weight, torch.where(self.present, bias - weight @ centre, ABSENT)


def _eigen(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues above rounding, and eigenvectors (columns), of the rows' covariance, from the smaller Gram matrix."""
    n, n_features = rows.shape
    if n_features <= n:
        eigenvalues, vectors = torch.linalg.eigh(rows.T @ rows / n)
    else:
        eigenvalues, left = torch.linalg.eigh(rows @ rows.T / n)
        vectors = rows.T @ (left / (eigenvalues.clamp_min(1e-12) * n).sqrt())
    kept = eigenvalues > 1e-10
    return eigenvalues[kept], vectors[:, kept]
