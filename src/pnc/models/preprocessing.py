"""What a network wants done to its images, as a part of the network: colours, size, normalisation."""

import math
from collections.abc import Sequence
from reprlib import repr as shortened
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnc.data.image_store import MAX_IMAGE
from pnc.foundation.argument_checks import check_module
from pnc.foundation.errors import InputError
from pnc.models.reference_networks import Shape

Interpolation = Literal["nearest", "bilinear", "bicubic"]

_LUMA = (0.299, 0.587, 0.114)  # of ITU-R BT.601, as pillow turns colour to grey


class Preprocessed(nn.Module):
    """A network with its own preprocessing in front: takes images in [0, 1], (B, C, H, W), of any size, grey or colour.

    Two networks that are wrapped like this take the same images, whatever each was trained on. In this order, and each
    step only where it changes something:

    1. Colour to grey by the luma weights of ITU-R BT.601, as pillow does.
    2. The whole image resized to the network's height and width; nothing is cropped. Bilinear and bicubic are those of
       pillow: with antialiasing when shrinking. Bicubic results are clamped to [0, 1].
    3. Grey to colour: three equal channels.
    4. Red and blue swapped, for networks that take blue first.
    5. (images - mean) / std for each channel.

    Mean, standard deviation and the rest are in the state dict, and so in the fingerprint: a clone is refused where a
    network comes with another preprocessing than the one that it was made with.

    Args:
        network: Maps what it was trained on, (B, *input_shape), to logits. It becomes a submodule, as it is.
        input_shape: (C, H, W) that the network takes.
        mean: One number, or one for each channel, in units of images in [0, 1].
        std: Likewise; above 0. Pixels from 0 to 255, for example, are what a network gets by ``std=1 / 255``.
        interpolation: "nearest", "bilinear" or "bicubic".
        blue_first: The network takes channels in the order blue, green, red.

    Raises:
        InputError: an argument is not as above. When called: images whose channels are neither the network's number
            nor 1 or 3 where it takes 3 or 1.

    >>> wrapped = Preprocessed(nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2)), (3, 4, 4), mean=0.5, std=0.25)
    >>> wrapped(torch.rand(5, 1, 8, 8)).shape
    torch.Size([5, 2])
    """

    image_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    mean: Tensor | None
    std: Tensor | None
    pipeline: Tensor

    def __init__(
        self,
        network: nn.Module,
        input_shape: Sequence[int],
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        *,
        interpolation: Interpolation = "bilinear",
        blue_first: bool = False,
    ) -> None:
        super().__init__()
        check_module(network, "network")
        known = get_args(Interpolation)
        if interpolation not in known:
            raise InputError(f"interpolation: expected one of {', '.join(known)}; got {interpolation!r}")
        self.network = network
        self.input_shape = checked_shape(input_shape)
        self.interpolation: Interpolation = interpolation
        self.blue_first = blue_first
        means, stds = (_per_channel(v, self.input_shape[0], name) for v, name in ((mean, "mean"), (std, "std")))
        if min(stds) <= 0:
            raise InputError(f"std: expected numbers above 0, got {min(stds):g}")
        like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
        self.register_buffer("mean", _column(means, like) if any(means) else None)
        self.register_buffer("std", _column(stds, like) if set(stds) != {1.0} else None)
        facts = [*self.input_shape, known.index(interpolation), int(blue_first)]
        self.register_buffer("pipeline", torch.tensor(facts, device=like.device))  # for the fingerprint alone

    def forward(self, images: Tensor) -> Any:
        """Give what the network gives for images in [0, 1], (B, C, H, W)."""
        n_channels, *size = self.input_shape
        n_given = images.shape[1]
        if n_given != n_channels and {n_given, n_channels} != {1, 3}:
            raise InputError(f"images: of {n_given} channels cannot be made the {n_channels} that the network takes")
        if n_given > n_channels:
            red, green, blue = images[:, 0:1], images[:, 1:2], images[:, 2:3]
            images = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
        if list(images.shape[2:]) != size:
            images = self._resized(images, size)
        if n_given < n_channels:
            images = images.repeat(1, n_channels, 1, 1)  # a copy: networks may write to their input
        if self.blue_first:
            images = images.flip(1)
        if self.mean is not None:
            images = images - self.mean
        if self.std is not None:
            images = images / self.std
        return self.network(images)

    def _resized(self, images: Tensor, size: list[int]) -> Tensor:
        if self.interpolation == "nearest":
            return F.interpolate(images, size, mode="nearest-exact")
        resized = F.interpolate(images, size, mode=self.interpolation, align_corners=False, antialias=True)
        return resized.clamp(0, 1) if self.interpolation == "bicubic" else resized


def checked_shape(input_shape: Sequence[int]) -> Shape:
    """Return `input_shape` as (C, H, W).

    Raises:
        InputError: it is not three positive whole numbers, or more values than `MAX_IMAGE`.
    """
    if len(input_shape) != 3 or any(type(size) is not int or size < 1 for size in input_shape):
        raise InputError(
            f"input_shape: expected three positive whole numbers (C, H, W), got {shortened(tuple(input_shape))}"
        )
    if math.prod(input_shape) > MAX_IMAGE:
        raise InputError(
            f"input_shape: {shortened(tuple(input_shape))} has {math.prod(input_shape):.3g} values; images may have "
            f"{MAX_IMAGE}"
        )
    return input_shape[0], input_shape[1], input_shape[2]


def shape_text(shape: Sequence[int]) -> str:
    """Write a shape for a message.

    >>> shape_text((3, 32, 32))
    '3x32x32'
    """
    return "x".join(map(str, shape)) or "a scalar"


def _per_channel(values: float | Sequence[float], n_channels: int, argument: str) -> list[float]:
    numbers = [values] * n_channels if isinstance(values, int | float) else list(values)
    fine = all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
    if not fine or len(numbers) != n_channels:
        raise InputError(f"{argument}: expected one number, or one for each of {n_channels} channels; got {values!r}")
    return [float(number) for number in numbers]


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
