"""Several multinomial logistic regressions on the same features at once, each with its own sample weights."""

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTY = 50.0
"""Half of it times the squared weights (for features of unit variance) is added to the sum of the samples' log-losses.
On Fashion-MNIST and CIFAR-10 (JPEG), with supports of 10/3 to 100/20, values from 20 to 100 differ little; 10 is too
small."""
LEAST_SPREAD = 1e-4
"""Smallest standard deviation assumed for a feature, as a share of its mean; float32 has seven digits."""
N_STEPS = 30
"""Steps of L-BFGS: on few samples, more steps only fit noise."""


def logistic_regressions(features: Tensor, labels: Tensor, weights: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Fit linear classifiers with a ridge penalty.

    Args:
        features: (N, D).
        labels: Class ids, (N,), in [0, K).
        weights: Of each sample in each of R regressions, (N, R), non-negative, with a mean of about 1.
        present: Whether each class takes part, (K,) bool; all classes of the labels must. The others have zero weights.
    Returns:
        Weight (R, K, D) and bias (R, K), float32; scores are features @ weight.T + bias.
    """
    (n, n_features), n_fits, n_classes = features.shape, weights.shape[1], int(present.sum())
    mean, scale = features.mean(0), features.std(0, correction=0)
    # Constant features carry no information, and weights of nearly constant ones would only magnify rounding.
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
