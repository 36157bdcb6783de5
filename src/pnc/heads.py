"""Heads that extend the target by new classes and leave its own logits as they are.

A head sees the target's penultimate features, the clone's, and the target's logits, and gives the logits of the new
classes only. From any posterior over base and new classes it makes

    z_new[k] = log p(k | new, x) + log-odds(new against base | x) + logsumexp(z_base),

so that softmax([z_base, z_new]) gives the new classes exactly that posterior and keeps, among the base classes, exactly
the target's own distribution.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHRINKAGES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 0.9)


@dataclass(frozen=True)
class HeadSamples:
    """What heads are fitted on, sample by sample.

    Attributes:
        target_features: The target's penultimate features, (N, D_t).
        clone_features: The clone's penultimate features, (N, D_s).
        base_logits: The target's logits, (N, K_base).
        labels: Class ids, (N,): base classes first, then the new ones.
        folds: (N,), the fold in which each is held out; all zero for no cross-validation.
        n_classes: K_base + K_new.
    """

    target_features: Tensor
    clone_features: Tensor
    base_logits: Tensor
    labels: Tensor
    folds: Tensor
    n_classes: int

    @property
    def n_base(self) -> int:
        """Number of base classes."""
        return self.base_logits.shape[1]

    @property
    def has_base(self) -> bool:
        """Whether there is any sample of a base class."""
        return bool((self.labels < self.n_base).any())

    def select(self, rows: Tensor) -> "HeadSamples":
        """Keep the given rows, a bool mask or indices."""
        return HeadSamples(
            self.target_features[rows],
            self.clone_features[rows],
            self.base_logits[rows],
            self.labels[rows],
            self.folds[rows],
            self.n_classes,
        )


class DiscriminantHead(nn.Module):
    """Linear discriminants over the features of both networks, for when base samples are at hand.

    Args:
        n_base: K_base.
        n_classes: K_base + K_new.
        n_features: D_t + D_s.
    """

    kind = "discriminant"

    def __init__(self, n_base: int, n_classes: int, n_features: int) -> None:
        super().__init__()
        self.n_base = n_base
        self.register_buffer("weight", torch.zeros(n_classes, n_features))
        self.register_buffer("bias", torch.zeros(n_classes))
        self.weight: Tensor
        self.bias: Tensor

    def forward(self, target_features: Tensor, clone_features: Tensor, base_logits: Tensor) -> Tensor:
        """Give the logits of the new classes, (B, K_new), in the dtype of `base_logits` (B, K_base)."""
        features = torch.cat([target_features, clone_features], 1).to(self.weight.dtype)
        scores = F.linear(features, self.weight, self.bias)
        against_base = scores[:, self.n_base :] - scores[:, : self.n_base].logsumexp(1, keepdim=True)
        return (against_base + base_logits.to(scores.dtype).logsumexp(1, keepdim=True)).to(base_logits.dtype)


class SourceHead(nn.Module):
    """The source's own logits of the new classes, for when no base sample is at hand.

    Softmax over both networks' logits then is the direct ensemble.

    Args:
        n_new: K_new.
        n_features: D_s.
    """

    kind = "source"

    def __init__(self, n_new: int, n_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(n_new, n_features))
        self.register_buffer("bias", torch.zeros(n_new))
        self.weight: Tensor
        self.bias: Tensor

    def forward(self, target_features: Tensor, clone_features: Tensor, base_logits: Tensor) -> Tensor:
        """Give the logits of the new classes, (B, K_new), in the dtype of `base_logits` (B, K_base)."""
        logits = F.linear(clone_features.to(self.weight.dtype), self.weight, self.bias)
        return logits.to(base_logits.dtype)


Head = DiscriminantHead | SourceHead


def fit_discriminant(samples: HeadSamples, shrinkage: float) -> DiscriminantHead:
    """Fit linear discriminant analysis with one pooled, shrunk covariance and equal class priors.

    Args:
        samples: With at least one sample of every class.
        shrinkage: Weight of the identity against the within-class correlation matrix, in (0, 1].
    Source: Friedman, Regularized Discriminant Analysis, JASA 84 (1989); features are scaled to unit within-class
        variance before shrinking.
    """
    spectrum = _within_class_spectrum(samples)
    weight, bias = spectrum.discriminants(shrinkage)
    head = DiscriminantHead(samples.n_base, samples.n_classes, weight.shape[1])
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    return head


def source_head(weight: Tensor, bias: Tensor) -> SourceHead:
    """Make the head of a support without base samples from the source's classifier: (K_new, D_s) and (K_new,)."""
    head = SourceHead(*weight.shape)
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    return head


def choose_shrinkage(samples: HeadSamples) -> tuple[float, Tensor]:
    """Choose the shrinkage of `fit_discriminant` by cross-validation over the samples' folds.

    Args:
        samples: Of every class, in every fold; where there is one fold only, the strongest shrinkage is taken and
            nothing is held out.
    Returns:
        The shrinkage of lowest held-out log-loss, base and new samples weighing the same, and the composite's logits
        (N, K_base + K_new) of each sample when it was held out.
    """
    features = torch.cat([samples.target_features, samples.clone_features], 1).double()
    base_logits, n_base = samples.base_logits.double(), samples.n_base
    n_folds = int(samples.folds.max()) + 1
    tried = SHRINKAGES if n_folds > 1 else SHRINKAGES[-1:]
    logits = torch.zeros(len(tried), len(samples.labels), samples.n_classes, dtype=torch.float64)
    for fold in range(n_folds):
        held_out = samples.folds == fold
        spectrum = _within_class_spectrum(samples.select(~held_out if n_folds > 1 else held_out))
        for index, shrinkage in enumerate(tried):
            weight, bias = spectrum.discriminants(shrinkage)
            scores = features[held_out] @ weight.T + bias
            new = scores[:, n_base:] - scores[:, :n_base].logsumexp(1, keepdim=True)
            new = new + base_logits[held_out].logsumexp(1, keepdim=True)
            logits[index, held_out] = torch.cat([base_logits[held_out], new], 1)
    is_base = samples.labels < n_base
    losses = [F.cross_entropy(one, samples.labels, reduction="none") for one in logits]
    best = min(range(len(tried)), key=lambda i: float(losses[i][is_base].mean() + losses[i][~is_base].mean()))
    return tried[best], logits[best]


def _class_means(features: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    sums = features.new_zeros(n_classes, features.shape[1]).index_add(0, labels, features)
    counts = labels.bincount(minlength=n_classes).clamp_min(1)
    return sums / counts[:, None]


@dataclass(frozen=True)
class _Spectrum:
    """Class means and within-class correlation of one training set, ready for any shrinkage."""

    means: Tensor
    scale: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    def discriminants(self, shrinkage: float) -> tuple[Tensor, Tensor]:
        """Weight (K, D) and bias (K,) of the linear discriminants."""
        centre = self.means.mean(0)
        means = (self.means - centre) / self.scale
        gain = 1 / (shrinkage + (1 - shrinkage) * self.eigenvalues) - 1 / shrinkage
        weight = means / shrinkage + (means @ self.eigenvectors * gain) @ self.eigenvectors.T
        bias = -0.5 * (means * weight).sum(1)
        weight = weight / self.scale
        return weight, bias - weight @ centre


def _within_class_spectrum(samples: HeadSamples) -> _Spectrum:
    features = torch.cat([samples.target_features, samples.clone_features], 1).double()
    means = _class_means(features, samples.labels, samples.n_classes)
    centred = features - means[samples.labels]
    scale = centred.square().mean(0).sqrt()
    scale = scale.clamp_min(1e-6 * float(scale.max()) + 1e-12)  # features that never move carry no information
    eigenvalues, eigenvectors = _eigen(centred / scale)
    return _Spectrum(means, scale, eigenvalues, eigenvectors)


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
