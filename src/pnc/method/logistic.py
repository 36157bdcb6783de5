"""Multinomial logistic regressions on one set of features, several at once: each with weights of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTY = 50.0
"""Half of it times the squared weights, of features of unit variance, against the sum of the samples' log-losses. Tried
on Fashion-MNIST and CIFAR-10 (JPEG), supports of 10/3 to 100/20: from 20 to 100 little changes, 10 is too small."""
LEAST_SPREAD = 1e-4
"""Standard deviation that a feature is taken to have at least, as a share of its mean; float32 has seven digits."""
N_STEPS = 30
"""Of L-BFGS: after that, what a support of few samples still teaches is noise."""


def logistic_regressions(features: Tensor, labels: Tensor, weights: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Fit linear classifiers with a ridge penalty.

    Args:
        features: (N, D).
        labels: Class ids, (N,), in [0, K).
        weights: Of each sample in each of R regressions, (N, R), not negative, about 1 in the mean.
        present: Which classes take part, (K,) bool: those of the labels at least. The others get no weights.
    Returns:
        Weight (R, K, D) and bias (R, K), float32; scores are features @ weight.T + bias.
    """
    (n, n_features), n_fits, n_classes = features.shape, weights.shape[1], int(present.sum())
    mean, scale = features.mean(0), features.std(0, correction=0)
    # Features that never move carry no information, and weights for what hardly moves would only magnify rounding.
    scale = scale.clamp_min(1e-6 * float(scale.max()) + 1e-12).maximum(LEAST_SPREAD * mean.abs())
    rows = torch.cat([(features - mean) / scale, features.new_ones(n, 1)], 1).float()
    places = (present.cumsum(0) - 1)[labels].repeat_interleave(n_fits)  # (N * R,)
    importance = weights.float().flatten()
    point = torch.zeros(n_features + 1, n_fits * n_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([point], max_iter=N_STEPS, history_size=10, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        losses = F.cross_entropy((rows @ point).view(-1, n_classes), places, reduction="none")
        loss = (losses @ importance + PENALTY / 2 * point[:-1].square().sum()) / n
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(step)
    found = point.detach().view(n_features + 1, n_fits, n_classes).permute(1, 2, 0)  # (R, K present, D + 1)
    weight = found[..., :-1] / scale.float()
    every = torch.zeros(n_fits, len(present), n_features), torch.zeros(n_fits, len(present))
    every[0][:, present] = weight
    every[1][:, present] = found[..., -1] - weight @ mean.float()
    return every
