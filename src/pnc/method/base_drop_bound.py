"""The operating point: a bound on the accuracy that base images may lose, set by the user."""

import math

import torch
from torch import Tensor

from pnc.foundation.errors import InputError

_ROUNDING = 1e-9


def check_promise(max_base_drop: float, n_given: int, n_kept: int) -> None:
    """Refuse a bound that cannot be verified with so few base images.

    Args:
        max_base_drop: In (0, 1).
        n_given: Number of base images in the support and the background.
        n_kept: How many of them fit into memory for fitting heads.
    Raises:
        InputError: there are too few; the message says how many are needed.
    """
    if _n_allowed(max_base_drop, n_kept) >= 0:
        return
    n_needed = math.ceil(1 / max_base_drop - 1 - _ROUNDING)
    if n_given >= n_needed:
        problem = f"only {n_kept} of {n_given} base images fit into memory=, too few to verify that; allow more memory"
    else:
        problem = (
            f"{n_given} base images are too few to verify that; give at least {n_needed} (labelled, or as background)"
        )
    less = f", or allow {1 / (n_kept + 1):.3f} or more" if n_kept else ""
    raise InputError(f"max_base_drop={max_base_drop}: {problem}{less}")


def least_priority(logits: Tensor, labels: Tensor, groups: Tensor, n_base: int, max_base_drop: float) -> float:
    """The smallest number of nats to subtract from all new logits so that base images lose no more than allowed.

    An image is lost if the target alone is right and the composite is wrong. The bound must hold with one more lost
    image than observed; then it holds approximately, on average over supports, on new images like the held-out ones.

    Args:
        logits: Of the composite, (N, K_base + K_new), for each sample by a head that was fitted without it.
        labels: Indices among the classes, (N,).
        groups: Number of the image that each sample shows, (N,); mirror images have that of their original.
        n_base: K_base.
        max_base_drop: In (0, 1).
    Returns:
        Nats, at least 0; `check_promise` says whether there are enough images.
    Source: Angelopoulos et al., Conformal Risk Control, 2022 (arXiv:2208.02814), with cross-validation instead of a
        separate calibration set.
    """
    base, labels, groups = logits[labels < n_base], labels[labels < n_base], groups[labels < n_base]
    images, places = groups.unique(return_inverse=True)
    right = base[:, :n_base].argmax(1) == labels
    margins = base[:, n_base:].amax(1) - base[:, :n_base].amax(1)
    margins = torch.where(right, margins, -math.inf)
    weight = 1 / places.bincount()[places].double()  # views of one image count as one image
    order = margins.argsort(descending=True)
    lost = weight[order].cumsum(0) - weight[order]  # images lost if this sample's margin is subtracted
    allowed = margins[order][lost <= _n_allowed(max_base_drop, len(images)) + _ROUNDING]
    return max(0.0, float(allowed[-1]))


def _n_allowed(max_base_drop: float, n_images: int) -> int:
    """Number of held-out images that may be lost; below 0 if even none would be too many."""
    return math.floor(max_base_drop * (n_images + 1) - 1 + _ROUNDING)
