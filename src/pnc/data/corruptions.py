"""Corrupted images: noise, blur and low contrast at three severities, as in Hendrycks and Dietterich (ICLR 2019).

The strengths are those of severities 1, 3 and 5 of their benchmark for images of 32x32 (arXiv:1903.12261).
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pnc.foundation.argument_checks import check_choice
from pnc.foundation.errors import InputError

STRENGTHS: Mapping[str, tuple[float, float, float]] = {
    "noise": (0.04, 0.08, 0.10),
    "blur": (0.4, 0.7, 1.0),
    "contrast": (0.75, 0.4, 0.15),
}
"""By kind: standard deviation of Gaussian noise, or of a blur in pixels; factor of the distance to the mean."""


def corrupted(images: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupt images (N, C, H, W) in [0, 1]; the result is in [0, 1] too.

    Args:
        images: Floating point.
        kind: One of `STRENGTHS`.
        severity: 1, 2 or 3.
        seed: Of the noise.
    Raises:
        InputError: a kind or severity is unknown.
    """
    check_choice(kind, "kind", tuple(STRENGTHS))
    if severity not in (1, 2, 3):
        raise InputError(f"severity: expected 1, 2 or 3, got {severity!r}")
    strength = STRENGTHS[kind][severity - 1]
    if kind == "noise":
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        return (images + strength * noise).clamp(0, 1)
    if kind == "blur":
        return _blurred(images, strength)
    mean = images.mean((2, 3), keepdim=True)
    return (mean + strength * (images - mean)).clamp(0, 1)


def _blurred(images: Tensor, sigma: float) -> Tensor:
    """Convolve with a Gaussian that is cut off after four standard deviations; the border is mirrored."""
    radius = math.ceil(4 * sigma)
    places = torch.arange(-radius, radius + 1, dtype=images.dtype)
    weights = (-places.square() / (2 * sigma**2)).exp()
    weights = weights / weights.sum()
    n_channels = images.shape[1]
    row = weights.expand(n_channels, 1, 1, -1)
    padded = F.pad(images, (radius, radius, radius, radius), mode="reflect")
    return F.conv2d(F.conv2d(padded, row, groups=n_channels), row.transpose(2, 3), groups=n_channels).clamp(0, 1)
