"""Heads that add logits of new classes and leave the target's own logits unchanged.

A head reads the target's penultimate features, the clone's, and the target's logits, and returns only the logits of
the new classes. From a posterior over base and new classes it computes

    z_new[k] = log p(k | new, x) + log-odds(new against base | x) + logsumexp(z_base),

so that softmax([z_base, z_new]) gives the new classes exactly that posterior and keeps exactly the target's
distribution among the base classes.

There are two posteriors: a logistic regression fitted on the support, and the networks' own classifiers. The first
compares base with new samples, but was fitted on few; the others were trained on many, but never on both kinds. A few
weights that mix them are fitted on held-out samples (stacking: Wolpert, Neural Networks 5, 1992).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DiscriminantHead(nn.Module):
    """Linear scores of all classes over the features of both networks.

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
        """Return the logits of the new classes, (B, K_new), in the dtype of `base_logits` (B, K_base)."""
        odds = self.log_odds(target_features, clone_features)
        return (odds + base_logits.to(odds.dtype).logsumexp(1, keepdim=True)).to(base_logits.dtype)

    def log_odds(self, target_features: Tensor, clone_features: Tensor) -> Tensor:
        """Log-odds of each new class against all base classes together, (B, K_new), in the weights' dtype."""
        features = torch.cat([target_features, clone_features], 1).to(self.weight.dtype)
        scores = F.linear(features, self.weight, self.bias)
        return scores[:, self.n_base :] - scores[:, : self.n_base].logsumexp(1, keepdim=True)


class SourceHead(nn.Module):
    """The source's own logits of the new classes, used without base samples.

    The softmax over both networks' logits is then the direct ensemble.

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
        """Return the logits of the new classes, (B, K_new), in the dtype of `base_logits` (B, K_base)."""
        logits = F.linear(clone_features.to(self.weight.dtype), self.weight, self.bias)
        return logits.to(base_logits.dtype)


class StackedHead(nn.Module):
    """A mixture of fitted scores and both networks' own logits.

    The log-odds of new against base are a constant plus a weighted sum of three terms: the log-odds of the fitted
    scores, the logsumexp of the source's logits, and that of the target's. Among the new classes, the fitted scores and
    the source's logits are summed with two other weights.

    Args:
        discriminants: The scores fitted on the support.
        own: The source's classifier of the new classes; zeros if it has no linear one.
    """

    kind = "stacked"

    def __init__(self, discriminants: DiscriminantHead, own: SourceHead) -> None:
        super().__init__()
        self.discriminants, self.own = discriminants, own
        self.register_buffer("odds_weight", torch.zeros(4))
        self.register_buffer("class_weight", torch.zeros(2))
        self.odds_weight: Tensor
        self.class_weight: Tensor

    def forward(self, target_features: Tensor, clone_features: Tensor, base_logits: Tensor) -> Tensor:
        """Return the logits of the new classes, (B, K_new), in the dtype of `base_logits` (B, K_base)."""
        base = base_logits.to(self.odds_weight.dtype)
        fitted = self.discriminants.log_odds(target_features, clone_features)
        own = self.own(target_features, clone_features, base)
        level = base.logsumexp(1, keepdim=True)
        return mixed_logits(fitted, own, level, self.odds_weight, self.class_weight).to(base_logits.dtype)


def mixed_logits(fitted: Tensor, own: Tensor, level: Tensor, odds_weight: Tensor, class_weight: Tensor) -> Tensor:
    """Return the logits of the new classes, (B, K_new), as in `StackedHead`.

    Args:
        fitted: Log-odds of each new class against the base from the fitted scores, (B, K_new).
        own: The source's logits, (B, K_new).
        level: The logsumexp of the target's logits, (B, 1).
        odds_weight: Weights of the three `odds_terms`, and the constant, (4,).
        class_weight: Weights of `fitted` and `own`, (2,).
    """
    log_odds = (odds_terms(fitted, own, level) * odds_weight[:3]).sum(1, keepdim=True) + odds_weight[3]
    within = (fitted * class_weight[0] + own * class_weight[1]).log_softmax(1)
    return within + (log_odds + level)


def odds_terms(fitted: Tensor, own: Tensor, level: Tensor) -> Tensor:
    """Return the terms of the log-odds of new against base, (B, 3); arguments as in `mixed_logits`."""
    return torch.cat([fitted.logsumexp(1, keepdim=True), own.logsumexp(1, keepdim=True), level], 1)


Head = DiscriminantHead | SourceHead | StackedHead


def in_half_precision(head: DiscriminantHead) -> DiscriminantHead:
    """Round the weights to half precision, in place: a fit on few samples is no more precise than eleven bits."""
    short = head.weight.half()
    if bool(short.isfinite().all()):
        head.weight.copy_(short)
    return head


def source_head(weight: Tensor, bias: Tensor) -> SourceHead:
    """Make the head for a support without base samples from the source's weight (K_new, D_s) and bias (K_new,)."""
    head = SourceHead(*weight.shape)
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    return head
