"""Stacking in scikit-learn: a logistic regression on both networks' features, mixed with both networks' own answers.

What a good engineer builds in an afternoon, and the strongest rival at the cost of both networks: out-of-fold logits of
the regression, the log-sum-exps of both networks' logits, and a second logistic regression that separates new from base
by these three (stacking: Wolpert, Neural Networks 5, 1992). One form keeps the target's logits.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from pnc.bench.rivals.frozen_features import Linear
from pnc.bench.rivals.linear_probe import PENALTIES, chosen_regression
from pnc.bench.rivals.rival import Budget, Fitted, Rival, need_base_samples
from pnc.clones.position_grids import pool
from pnc.graph.cut_points import LOGITS, CutPoint, extract
from pnc.method.head_fitting import balanced_weights
from pnc.method.task import CloneTask, Network

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Weights of the regression among the base or the new classes; the network trained on them has the rest."""


class FeaturesAndLogits(nn.Module):
    """A network's penultimate features (B, D), float32, and its logits (B, K), in one pass."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.features: CutPoint = network.head.features
        self.network = extract(network.recording, None, [self.features, LOGITS])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network on images (B, C, H, W)."""
        features, logits = self.network(images)
        return pool(features, self.features).float(), logits.float()


class Stacked(nn.Module):
    """Both networks, a linear classifier of their features, and a mixture of all three.

    Args:
        task: Has both networks.
        classifier: Maps both networks' features, the target's first, to logits (B, K_base + K_new).
        odds: Weights of the log-odds of new against base: those of the classifier, the log-sum-exps of source and
            target, and a constant, (4,).
        share_base: Weight of the classifier among the base classes; None keeps the target's logits.
        share_new: Weight of the classifier among the new classes.
    """

    def __init__(
        self, task: CloneTask, classifier: Linear, odds: Tensor, share_base: float | None, share_new: float
    ) -> None:
        super().__init__()
        self.target, self.source = FeaturesAndLogits(task.target), FeaturesAndLogits(task.source)
        self.classifier, self.source_ids = classifier, task.source_ids
        self.share_base, self.share_new = share_base, share_new
        self.register_buffer("odds", odds)
        self.odds: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K_base + K_new) for images (B, C, H, W)."""
        (own, base), (other, new) = self.target(images), self.source(images)
        answers = Answers(self.classifier(torch.cat([own, other], 1)), base, new[:, self.source_ids])
        return answers.mixed(self.odds, self.share_base, self.share_new)


@dataclass(frozen=True, eq=False)
class Answers:
    """Logits of some images: of the regression (B, K_base + K_new), the target (B, K_base), the source (B, K_new)."""

    fitted: Tensor
    target: Tensor
    source: Tensor

    def terms(self) -> Tensor:
        """Inputs of the regression that separates new from base, (B, 3)."""
        n_base = self.target.shape[1]
        fitted = self.fitted[:, n_base:].logsumexp(1) - self.fitted[:, :n_base].logsumexp(1)
        return torch.stack([fitted, self.source.logsumexp(1), self.target.logsumexp(1)], 1)

    def within(self, share_base: float, share_new: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities among the base classes, and among the new ones."""
        n_base = self.target.shape[1]
        base = share_base * self.fitted[:, :n_base] + (1 - share_base) * self.target
        new = share_new * self.fitted[:, n_base:] + (1 - share_new) * self.source
        return base.log_softmax(1), new.log_softmax(1)

    def mixed(self, odds: Tensor, share_base: float | None, share_new: float) -> Tensor:
        """Logits (B, K_base + K_new); arguments as in `Stacked`."""
        base, new = self.within(share_base or 0.0, share_new)
        level = self.target.logsumexp(1, keepdim=True)
        log_odds = (self.terms() @ odds[:3] + odds[3])[:, None]
        return torch.cat([self.target if share_base is None else base + level, new + log_odds + level], 1)


def fit(task: CloneTask, budget: Budget, keep_logits: bool) -> Fitted:
    """Choose penalty and mixture on held-out folds; base and new samples have equal weight, as in average accuracy."""
    from sklearn.linear_model import LogisticRegression

    need_base_samples(task, "stacked features of both networks")
    labels, n_base = task.samples.labels, task.n_base
    weights, is_new = balanced_weights(labels, n_base), labels >= n_base
    rows, target, source = _seen(task)
    regression = chosen_regression(rows, labels, weights, task.samples.folds)
    held_out = Answers(regression.held_out, target, source)
    second = LogisticRegression(max_iter=1000)
    second.fit(held_out.terms().numpy(), is_new.numpy(), weights.numpy())
    odds = torch.from_numpy(np.concatenate([second.coef_[0], second.intercept_])).float()

    def loss(share: float, new: bool) -> float:
        mine = is_new if new else ~is_new
        found = held_out.within(share, share)[int(new)][mine]
        right = found.gather(1, (labels[mine] - n_base * int(new))[:, None])[:, 0]
        return -float((right * weights[mine]).sum())

    share_new = min(SHARES, key=lambda share: loss(share, True))
    share_base = None if keep_logits else min(SHARES, key=lambda share: loss(share, False))
    module = Stacked(task, Linear(regression.weight, regression.bias), odds, share_base, share_new)
    chosen = {"penalty": regression.penalty, "share_base": share_base, "share_new": share_new, "odds": odds.tolist()}
    return Fitted(module.to(task.target.device).eval(), chosen, regression.trials)


@torch.no_grad()
def _seen(task: CloneTask) -> tuple[Tensor, Tensor, Tensor]:
    """Features of both networks (N, D), logits of the target (N, K_base) and the source (N, K_new), float64."""
    networks, found = [FeaturesAndLogits(one) for one in (task.target, task.source)], []
    for batch in task.samples.images.split(task.batch_size):
        (own, base), (other, new) = (network(batch.to(task.target.device)) for network in networks)
        found.append((torch.cat([own, other], 1), base, new[:, task.source_ids]))
    rows, target, source = (torch.cat(part).double().cpu() for part in zip(*found, strict=True))
    return rows, target, source


SPACE = {"penalty": PENALTIES, "share": SHARES}
RIVALS = (
    Rival("stacked features of both networks", "ensemble", partial(fit, keep_logits=True), SPACE),
    Rival("stacked features (free base logits)", "ensemble", partial(fit, keep_logits=False), SPACE),
)
