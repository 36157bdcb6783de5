"""Normalization of images by a network's loader, with a mean and a standard deviation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pnc.foundation.errors import InputError


@dataclass(frozen=True)
class Normalization:
    """What a loader does to images in [0, 1] before a network sees them: (images - mean) / std.

    Attributes:
        mean: One number, or one for each channel, in units of images in [0, 1].
        std: Likewise; above 0.

    Raises:
        InputError: a number is not finite, a standard deviation not above 0, or the two have different lengths.

    >>> imagenet = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    >>> Normalization(0.5, 0.5).apply(torch.ones(1, 3, 2, 2)).unique()
    tensor([1.])
    """

    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        means, stds = _numbers(self.mean, "mean"), _numbers(self.std, "std")
        if min(stds) <= 0:
            raise InputError(f"std: expected numbers above 0, got {min(stds):g}")
        if len(means) != len(stds) and 1 not in (len(means), len(stds)):
            raise InputError(f"std: expected as many numbers as mean has, {len(means)}, or one; got {len(stds)}")
        for name, values in (("mean", means), ("std", stds)):
            object.__setattr__(self, name, values[0] if len(values) == 1 else values)

    def per_channel(self, n_channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The means and the standard deviations of `n_channels` channels.

        Raises:
            InputError: there are values for another number of channels.
        """
        found = []
        for name, value in (("mean", self.mean), ("std", self.std)):
            values = _numbers(value, name)
            if len(values) not in (1, n_channels):
                raise InputError(
                    f"{name}: expected one number, or one for each of {n_channels} channels; got {value!r}"
                )
            found.append(values * n_channels if len(values) == 1 else values)
        return found[0], found[1]

    def apply(self, images: Tensor) -> Tensor:
        """Normalize images in [0, 1], (B, C, H, W), floating point."""
        mean, std = self._columns(images)
        return (images - mean) / std

    def undo(self, images: Tensor) -> Tensor:
        """Return normalized images (B, C, H, W) to [0, 1], up to rounding."""
        mean, std = self._columns(images)
        return images * std + mean

    def _columns(self, images: Tensor) -> list[Tensor]:
        values = self.per_channel(images.shape[1])
        return [torch.tensor(one, dtype=images.dtype, device=images.device)[:, None, None] for one in values]


def _numbers(values: float | Sequence[float], argument: str) -> tuple[float, ...]:
    numbers = [values] if isinstance(values, int | float) else list(values)
    fine = all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
    if not fine or not numbers:
        raise InputError(f"{argument}: expected one number, or one for each channel, all finite; got {values!r}")
    return tuple(float(number) for number in numbers)
