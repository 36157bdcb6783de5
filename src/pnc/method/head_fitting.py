"""Heads fitted on the support."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pnc.clones.heads import DiscriminantHead, SourceHead, StackedHead, in_half_precision, mixed_logits, odds_terms
from pnc.method.discriminants import ABSENT
from pnc.method.logistic import logistic_regressions

LEAST_SPREAD = 0.01
"""Least standard deviation of a term, in nats: one that varies less, as from a source with constant logits, gets no
large weight, which would only magnify rounding errors."""


@dataclass(frozen=True)
class Prior:
    """Expected mixing weights, before any sample is seen.

    Attributes:
        odds: Weights of the `odds_terms`.
        classes: Weights of fitted scores and the source's own logits, among the new classes.
        ridge: Penalty on the squared distance from these weights (terms scaled to unit variance), against the sum of
            all samples' log-losses.
        offset_ridge: The same penalty for the constant; 0 leaves it free.
    """

    odds: tuple[float, float, float]
    classes: tuple[float, float]
    ridge: float
    offset_ridge: float


NOTHING = Prior((0.0, 0.0, 0.0), (0.0, 0.0), ridge=1.0, offset_ridge=0.0)
ENSEMBLE = Prior((0.0, 1.0, -1.0), (0.0, 1.0), ridge=3.0, offset_ridge=0.3)
"""`NOTHING` expects small weights; `ENSEMBLE` expects those of the direct ensemble, which leave both networks' logits
unchanged. Chosen with one to five images per class, on CIFAR-10 (JPEG), where the ensemble is good, and Fashion-MNIST,
where it is bad; `pnc bench few` measures it."""


@dataclass(frozen=True)
class HeadSamples:
    """Samples to fit heads on.

    Attributes:
        target_features: The target's penultimate features, (N, D_t); without base samples, the input of its last
            BatchNorm layer, whose mean is known.
        clone_features: The clone's penultimate features, (N, D_s).
        base_logits: The target's logits, (N, K_base).
        own_logits: The source's own logits of the new classes, from the clone's features, (N, K_new); all zeros if its
            classifier is not a linear map of them.
        labels: Class ids, (N,): base classes first, then the new ones.
        folds: The fold in which each sample is held out, (N,); all zero without cross-validation.
        n_classes: K_base + K_new.
        few: Whether some new class has few images, see `CloneTask.has_few_images`.
    """

    target_features: Tensor
    clone_features: Tensor
    base_logits: Tensor
    own_logits: Tensor
    labels: Tensor
    folds: Tensor
    n_classes: int
    few: bool = False

    @property
    def n_base(self) -> int:
        """Number of base classes."""
        return self.base_logits.shape[1]

    @property
    def has_base(self) -> bool:
        """Whether there are samples of base classes."""
        return bool((self.labels < self.n_base).any())

    def select(self, rows: Tensor) -> "HeadSamples":
        """Keep the given rows, a bool mask or indices."""
        return HeadSamples(
            self.target_features[rows],
            self.clone_features[rows],
            self.base_logits[rows],
            self.own_logits[rows],
            self.labels[rows],
            self.folds[rows],
            self.n_classes,
            self.few,
        )

    def joined(self, others: "HeadSamples", rows: Tensor) -> "HeadSamples":
        """Merge with other samples: these go to the given rows, (N,) bool, the others to the rest."""
        order = torch.cat([rows.nonzero().flatten(), (~rows).nonzero().flatten()]).argsort()

        def whole(name: str) -> Tensor:
            return torch.cat([getattr(self, name), getattr(others, name)])[order]

        return HeadSamples(
            whole("target_features"),
            whole("clone_features"),
            whole("base_logits"),
            whole("own_logits"),
            whole("labels"),
            whole("folds"),
            self.n_classes,
            self.few,
        )


@dataclass(frozen=True, eq=False)
class Stacking:
    """Mixing weights of a `StackedHead`, chosen on held-out samples.

    Attributes:
        odds_weight: (4,), as in `StackedHead`.
        class_weight: (2,), as in `StackedHead`.
        logits: The composite's held-out logits, (N, K_base + K_new): scores are fitted without the sample's fold.
        n_base: K_base.
        fold_heads: Weight and bias of the scores fitted without each fold, (F, K, D) and (F, K).
    """

    odds_weight: Tensor
    class_weight: Tensor
    logits: Tensor
    n_base: int
    fold_heads: tuple[Tensor, Tensor]

    def on(self, samples: HeadSamples) -> "Stacking":
        """Return the same heads with their logits on other features of the same samples."""
        logits = _stacked_logits(samples, _odds(samples, self.fold_heads), self.odds_weight, self.class_weight)
        return replace(self, logits=logits)

    def lowered(self, nats: float) -> "Stacking":
        """Return the same with log-odds of new against base lowered by so many nats."""
        logits, odds = self.logits.clone(), self.odds_weight.clone()
        logits[:, self.n_base :] -= nats
        odds[3] -= nats
        return replace(self, odds_weight=odds, logits=logits)


def choose_stacking(samples: HeadSamples) -> Stacking:
    """Choose mixing weights by cross-validation over the samples' folds.

    With few images of a class, two priors are tried, and the weights of both are averaged by how well each explains the
    samples: that the networks' own logits need no change, as in the direct ensemble, and that nothing is known. With
    more images only the second one is used: on separable data the first costs accuracy (digits 20/5: .957 for .975).

    The log-loss gives base and new samples equal weight, as in the average accuracy, and within each kind every class.
    With a single fold, fitted scores cannot be judged, so only both networks' own classifiers are mixed, unless the
    source's is not linear.

    Args:
        samples: At least one sample of every new class and of some base class; base classes without samples are left
            out.
    """
    n_base, is_new = samples.n_base, samples.labels >= samples.n_base
    base, own = samples.base_logits.double(), samples.own_logits.double()
    level = base.logsumexp(1, keepdim=True)
    heads = _fold_heads(samples)
    fitted = _odds(samples, heads)
    odds, classes = odds_terms(fitted, own, level), torch.stack([fitted, own], 2)
    if int(samples.folds.max()) == 0 and bool(own.any()):
        odds[:, 0], classes[:, :, 0] = 0, 0
    weights = balanced_weights(samples.labels, samples.n_base)
    own_labels = samples.labels[is_new] - n_base
    made = []
    for prior in (NOTHING, ENSEMBLE) if samples.few and bool(own.any()) else (NOTHING,):
        odds_weight, odds_cost = _fit_odds(odds, is_new, weights, prior)
        class_weight, class_cost = _fit_classes(classes[is_new], own_labels, weights[is_new], prior)
        made.append((odds_weight, class_weight, odds_cost + class_cost))
    likely = torch.tensor([-cost for *_, cost in made]).double().softmax(0)
    odds_weight, class_weight = (sum(p * one[i] for p, one in zip(likely, made, strict=True)) for i in (0, 1))
    logits = _stacked_logits(samples, fitted, odds_weight, class_weight)
    return Stacking(odds_weight, class_weight, logits, n_base, heads)


def _stacked_logits(samples: HeadSamples, fitted: Tensor, odds_weight: Tensor, class_weight: Tensor) -> Tensor:
    """Return the composite's logits, given the `fitted` log-odds of new classes (N, K_new)."""
    base, own = samples.base_logits.double(), samples.own_logits.double()
    level = base.logsumexp(1, keepdim=True)
    return torch.cat([base, mixed_logits(fitted, own, level, odds_weight, class_weight)], 1)


def balanced_weights(labels: Tensor, n_base: int) -> Tensor:
    """Return weights of samples, (N,), float64: equal totals for base and new, and for the classes within each.

    Args:
        labels: Class ids, (N,), base classes first.
        n_base: Number of base classes.
    """
    counts = labels.bincount().double()
    is_new = torch.arange(len(counts)) >= n_base
    n_present = torch.stack([(counts[kind] > 0).sum() for kind in (~is_new, is_new)]).clamp_min(1)
    return (1 / (counts.clamp_min(1) * n_present[is_new.long()]))[labels]


def _fit_odds(terms: Tensor, is_new: Tensor, weights: Tensor, prior: Prior) -> tuple[Tensor, float]:
    """Fit a ridge logistic regression of new against base on terms (N, 3).

    Returns:
        Weights (4,), the last one a constant; and the sum of losses and penalties.
    """
    mean, scale = terms.mean(0), terms.std(0, correction=0).clamp_min(LEAST_SPREAD)
    rows, labels = (terms - mean) / scale, is_new.double()
    usual = torch.tensor(prior.odds).double()
    start = torch.cat([usual * scale, (usual * mean).sum()[None]])
    penalties = torch.tensor([prior.ridge] * 3 + [prior.offset_ridge]).double() / len(rows)

    def loss(weight: Tensor) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(rows @ weight[:3] + weight[3], labels, reduction="none")
        return (losses * weights).sum() / weights.sum() + (penalties * (weight - start).square()).sum()

    found = _minimize(loss, start)
    slopes = found[:3] / scale
    return torch.cat([slopes, found[3:] - (slopes * mean).sum()]), float(loss(found)) * len(rows)


def _fit_classes(terms: Tensor, labels: Tensor, weights: Tensor, prior: Prior) -> tuple[Tensor, float]:
    """Fit the weights of a sum of logits (N, K_new, 2) to the new classes (N,), with a ridge penalty.

    Returns:
        The two weights; and the sum of losses and penalties.
    """
    terms = terms - terms.mean(1, keepdim=True)
    scale = terms.square().mean((0, 1)).sqrt().clamp_min(LEAST_SPREAD)
    start = torch.tensor(prior.classes).double() * scale

    def loss(weight: Tensor) -> Tensor:
        losses = F.cross_entropy(terms / scale @ weight, labels, reduction="none")
        penalty = prior.ridge / len(terms) * (weight - start).square().sum()
        return (losses * weights).sum() / weights.sum() + penalty

    found = _minimize(loss, start)
    return found / scale, float(loss(found)) * len(terms)


def _minimize(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Minimise a smooth convex function of a few variables."""
    point = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([point], max_iter=200, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss(point)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(step)
    return point.detach()


def fit_stacked(samples: HeadSamples, stacking: Stacking, own: SourceHead) -> StackedHead:
    """Fit scores on all samples, and mix them with the source's own classifier by the chosen weights."""
    head = StackedHead(in_half_precision(fit_scores(samples)), own)
    head.odds_weight.copy_(stacking.odds_weight)
    head.class_weight.copy_(stacking.class_weight)
    return head


def fit_scores(samples: HeadSamples) -> DiscriminantHead:
    """Fit a logistic regression on all samples, weighted by `balanced_weights`."""
    weight, bias = _regressions(samples, torch.ones(len(samples.labels), 1))
    head = DiscriminantHead(samples.n_base, samples.n_classes, weight.shape[2])
    head.weight.copy_(weight[0])
    head.bias.copy_(bias[0])
    return head


def _fold_heads(samples: HeadSamples) -> tuple[Tensor, Tensor]:
    """Fit scores without each fold in turn; with a single fold, on all samples."""
    n_folds = int(samples.folds.max()) + 1
    others = 1 - F.one_hot(samples.folds, n_folds) if n_folds > 1 else torch.ones(len(samples.folds), 1)
    return _regressions(samples, others)


def _odds(samples: HeadSamples, fold_heads: tuple[Tensor, Tensor]) -> Tensor:
    """Return log-odds of each new class against the base by the head of each sample's fold, (N, K_new), float64."""
    n_base = samples.n_base
    odds = torch.empty(len(samples.folds), samples.n_classes - n_base)
    for fold, (weight, bias) in enumerate(zip(*fold_heads, strict=True)):
        rows = samples.folds == fold
        scores = F.linear(_features(samples)[rows], weight, bias)
        odds[rows] = scores[:, n_base:] - scores[:, :n_base].logsumexp(1, keepdim=True)
    return odds.double()


def _regressions(samples: HeadSamples, taking_part: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression for each column of `taking_part` (N, R); classes without samples score `ABSENT`."""
    present = samples.labels.bincount(minlength=samples.n_classes) > 0
    weights = balanced_weights(samples.labels, samples.n_base)
    weights = (weights / weights.mean())[:, None] * taking_part
    weight, bias = logistic_regressions(_features(samples), samples.labels, weights, present)
    return weight, torch.where(present, bias, ABSENT)


def _features(samples: HeadSamples) -> Tensor:
    return torch.cat([samples.target_features, samples.clone_features], 1).float()
