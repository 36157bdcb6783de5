"""A network's preprocessing as a part of the network: colours, size, normalisation."""

import math
from collections.abc import Sequence
from reprlib import repr as shortened
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnc.data.image_store import MAX_IMAGE
from pnc.data.normalization import Normalization
from pnc.foundation.argument_checks import check_module
from pnc.foundation.errors import InputError
from pnc.models.reference_networks import Shape

Interpolation = Literal["nearest", "bilinear", "bicubic"]

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in pillow


class Preprocessed(nn.Module):
    """A network with its preprocessing, which takes images in [0, 1], (B, C, H, W), of any size, grey or colour.

    Two networks that are wrapped like this take the same images, whatever each was trained on. The steps are, in this
    order and each only if it changes something:

    1. Colour to grey with the luma weights of ITU-R BT.601, as in pillow.
    2. Resize the whole image, without cropping, to the network's height and width. Bilinear and bicubic are as in
       pillow, with antialiasing when shrinking. Bicubic results are clamped to [0, 1].
    3. Grey to colour: three equal channels.
    4. Swap red and blue, for networks that take blue first.
    5. (images - mean) / std for each channel.

    With `given`, the images are not in [0, 1] but normalized by another network's loader, which is undone first. So a
    target in production keeps its own loader, and only the source is wrapped:
    ``Preprocessed(source, (3, 128, 128), mean, std, given=Normalization(target_mean, target_std))``. If both
    normalizations are equal and neither colours nor size change, images pass unchanged.

    Mean, standard deviation and the other settings are in the state dict, and so in the fingerprint: a clone is refused
    for a network with another preprocessing than the one it was made with.

    Args:
        network: Maps the images it was trained on, ``(B, *input_shape)``, to logits. It becomes a submodule, unchanged.
        input_shape: (C, H, W) that the network takes.
        mean: One number, or one for each channel, in units of images in [0, 1].
        std: Likewise; above 0. For example, ``std=1 / 255`` gives the network pixels from 0 to 255.
        interpolation: "nearest", "bilinear" or "bicubic".
        blue_first: The network takes channels in the order blue, green, red.
        given: How the input images are already normalized, if they are, with values for their own channels.

    Raises:
        InputError: an argument is not as above. When called: the number of channels is not the network's (or 1 or 3,
            for a network that takes 3 or 1), or not that of `given`.

    >>> wrapped = Preprocessed(nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2)), (3, 4, 4), mean=0.5, std=0.25)
    >>> wrapped(torch.rand(5, 1, 8, 8)).shape
    torch.Size([5, 2])
    """

    image_range: tuple[float, float] | None = (0.0, 1.0)
    mean: Tensor | None
    std: Tensor | None
    given_mean: Tensor | None
    given_std: Tensor | None
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
        given: Normalization | None = None,
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
        means, stds = Normalization(mean, std).per_channel(self.input_shape[0])
        if given is not None and not isinstance(given, Normalization):
            raise InputError(f"given: expected pnc.Normalization(mean, std), got {type(given).__name__}")
        if given is not None:
            self.image_range = None  # another loader's interpolation may overshoot the range a little
        self._alike = given is not None and _same(given, means, stds)
        like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
        self.register_buffer("mean", _column(means, like) if any(means) else None)
        self.register_buffer("std", _column(stds, like) if set(stds) != {1.0} else None)
        for name, values in (("given_mean", given and given.mean), ("given_std", given and given.std)):
            # Absent without `given`, so that the state dict, and so the fingerprint, is as in earlier versions.
            self.register_buffer(name, None if given is None else _column(_numbers(values), like))
        facts = [*self.input_shape, known.index(interpolation), int(blue_first)]
        self.register_buffer("pipeline", torch.tensor(facts, device=like.device))  # only for the fingerprint

    def forward(self, images: Tensor) -> Any:
        """Return the network's output for images (B, C, H, W), in [0, 1] or normalized as in `given`."""
        n_channels, *size = self.input_shape
        n_given = images.shape[1]
        if self._alike and list(images.shape[1:]) == [n_channels, *size] and not self.blue_first:
            return self.network(images)
        if self.given_mean is not None and self.given_std is not None:
            images = self._undone(images, self.given_mean, self.given_std)
        if n_given != n_channels and {n_given, n_channels} != {1, 3}:
            raise InputError(f"images: {n_given} channels cannot be turned into the network's {n_channels}")
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

    def _undone(self, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        if len(mean) not in (1, images.shape[1]) or len(std) not in (1, images.shape[1]):
            raise InputError(
                f"images: they have {images.shape[1]} channels, but given= normalizes {max(len(mean), len(std))}"
            )
        return images * std + mean

    def _resized(self, images: Tensor, size: list[int]) -> Tensor:
        if self.interpolation == "nearest":
            return F.interpolate(images, size, mode="nearest-exact")
        resized = F.interpolate(images, size, mode=self.interpolation, align_corners=False, antialias=True)
        return resized.clamp(0, 1) if self.interpolation == "bicubic" else resized


def checked_shape(input_shape: Sequence[int]) -> Shape:
    """Return `input_shape` as (C, H, W).

    Raises:
        InputError: it is not three positive whole numbers, or images would have more than `MAX_IMAGE` values.
    """
    if len(input_shape) != 3 or any(type(size) is not int or size < 1 for size in input_shape):
        raise InputError(
            f"input_shape: expected three positive whole numbers (C, H, W), got {shortened(tuple(input_shape))}"
        )
    if math.prod(input_shape) > MAX_IMAGE:
        raise InputError(
            f"input_shape: {shortened(tuple(input_shape))} has {math.prod(input_shape):.3g} values; the maximum is "
            f"{MAX_IMAGE}"
        )
    return input_shape[0], input_shape[1], input_shape[2]


def shape_text(shape: Sequence[int]) -> str:
    """Format a shape for a message.

    >>> shape_text((3, 32, 32))
    '3x32x32'
    """
    return "x".join(map(str, shape)) or "a scalar"


def _same(given: Normalization, means: Sequence[float], stds: Sequence[float]) -> bool:
    """Whether the given normalization equals the network's own, channel by channel."""
    pairs = ((_numbers(given.mean), means), (_numbers(given.std), stds))
    return all(tuple(own) in (tuple(wanted), tuple(wanted)[:1] * (len(set(wanted)) == 1)) for own, wanted in pairs)


def _numbers(values: Any) -> Sequence[float]:
    return [values] if isinstance(values, int | float) else list(values)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
