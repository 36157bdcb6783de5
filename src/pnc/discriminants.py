"""Linear discriminants of one training set at any shrinkage, from one eigendecomposition."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

ABSENT = -1e6
"""Bias of the discriminant of a class without any sample: it takes no part."""


@dataclass(frozen=True)
class WithinClassSpectrum:
    """Class means and within-class correlation of one training set, ready for any shrinkage.

    Attributes:
        means: (K, D); zeros for a class without samples.
        present: Which classes have samples, (K,) bool.
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
        scale = scale.clamp_min(1e-6 * float(scale.max()) + 1e-12)  # features that never move carry no information
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
    """Eigenvalues above rounding and eigenvectors (columns) of the rows' covariance, by the smaller Gram matrix."""
    n, n_features = rows.shape
    if n_features <= n:
        eigenvalues, vectors = torch.linalg.eigh(rows.T @ rows / n)
    else:
        eigenvalues, left = torch.linalg.eigh(rows @ rows.T / n)
        vectors = rows.T @ (left / (eigenvalues.clamp_min(1e-12) * n).sqrt())
    kept = eigenvalues > 1e-10
    return eigenvalues[kept], vectors[:, kept]
