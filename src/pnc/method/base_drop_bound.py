"""The operating point: how much of the target's accuracy a clone may cost, as a number that its user sets."""

import math

import torch
from torch import Tensor

from pnc.foundation.errors import InputError

_ROUNDING = 1e-9


def check_promise(max_base_drop: float, n_images: int) -> None:
    """Refuse a bound that so few base images cannot show.

    Raises:
        InputError: the message says how many it takes.
    """
    if _n_allowed(max_base_drop, n_images) < 0:
        raise InputError(
            f"max_base_drop={max_base_drop}: {n_images} base images cannot show that; give at least "
            f"{math.ceil(1 / max_base_drop - 1 - _ROUNDING)} (labelled, or as background), or allow "
            f"{1 / (n_images + 1):.3f} or more"
        )


def least_priority(logits: Tensor, labels: Tensor, groups: Tensor, n_base: int, max_base_drop: float) -> float:
    """Nats to take off all new logits, as few as possible, so that base images lose no more accuracy than is allowed.

    An image is lost where the target alone is right and the composite is not. The number is chosen such that the bound
    holds for one lost image more than were seen: then it holds on new images like the held-out ones, about and on
    average over supports.

    Args:
        logits: Of the composite, (N, K_base + K_new), of each sample by a head that was fitted without it.
        labels: Places among them, (N,).
        groups: Which image each sample shows, (N,): mirror images share their original's.
        n_base: K_base.
        max_base_drop: In (0, 1).
    Returns:
        Nats, at least 0.
    Raises:
        InputError: so few base images cannot show that.
    Source: Angelopoulos et al., Conformal Risk Control, 2022 (arXiv:2208.02814), with cross-validation in place of a
        calibration set of its own.
    """
    base, labels, groups = logits[labels < n_base], labels[labels < n_base], groups[labels < n_base]
    images, places = groups.unique(return_inverse=True)
    check_promise(max_base_drop, len(images))
    right = base[:, :n_base].argmax(1) == labels
    margins = base[:, n_base:].amax(1) - base[:, :n_base].amax(1)
    margins = torch.where(right, margins, -math.inf)
    weight = 1 / places.bincount()[places].double()  # copies of one image are one image
    order = margins.argsort(descending=True)
    lost = weight[order].cumsum(0) - weight[order]  # images lost if the priority is this sample's margin
    allowed = margins[order][lost <= _n_allowed(max_base_drop, len(images)) + _ROUNDING]
    return max(0.0, float(allowed[-1]))


def _n_allowed(max_base_drop: float, n_images: int) -> int:
    """How many held-out images may be lost; below 0 where even none would be too many."""
    return math.floor(max_base_drop * (n_images + 1) - 1 + _ROUNDING)
