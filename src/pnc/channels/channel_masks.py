"""Channel masks: which units of each channel space stay."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pnc.channels.channel_spaces import ChannelSpaces
from pnc.foundation.errors import InputError, MismatchError

_DIGEST_BYTES = 8


@dataclass(frozen=True, eq=False)
class ChannelMasks:
    """A choice of units to keep, at least one per space. Made by `channel_masks` or `masks_within`.

    Attributes:
        kept: Space name -> bool (size,), for every space, in the order of the forward pass.
    """

    kept: Mapping[str, Tensor]

    def keep(self, name: str) -> Tensor:
        """Indices of the kept units of a space, ascending, int64."""
        return self.kept[name].nonzero().reshape(-1)

    @property
    def flat(self) -> Tensor:
        """Kept flags of all units of all spaces in a row, bool."""
        return torch.cat(list(self.kept.values())) if self.kept else torch.zeros(0, dtype=torch.bool)

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each channel space by name, in order."""
        return {name: len(mask) for name, mask in self.kept.items()}

    def to_bytes(self) -> bytes:
        """Eight bytes that identify the spaces, then one bit per unit; the same masks give the same bytes."""
        return _digest(self.sizes) + np.packbits(self.flat.numpy()).tobytes()

    @staticmethod
    def from_bytes(data: bytes, sizes: Mapping[str, int]) -> "ChannelMasks":
        """Read what `to_bytes` wrote.

        Args:
            data: The bytes.
            sizes: Size of each channel space by name, in order.
        Raises:
            MismatchError: the bytes were written for other channel spaces.
        """
        n_units = sum(sizes.values())
        n_bytes = _DIGEST_BYTES + (n_units + 7) // 8
        if len(data) != n_bytes or data[:_DIGEST_BYTES] != _digest(sizes):
            raise MismatchError(
                f"masks: {len(data)} bytes for other channel spaces than the given ones "
                f"({len(sizes)} spaces, {n_units} units, {n_bytes} bytes); use the network that the "
                "masks were made for, and the same version of pnc"
            )
        bits = np.unpackbits(np.frombuffer(data, np.uint8, offset=_DIGEST_BYTES), count=n_units)
        parts = torch.from_numpy(bits.astype(bool)).split(list(sizes.values()))
        return _checked({name: part.clone() for name, part in zip(sizes, parts, strict=True)}, sizes)


def channel_masks(spaces: ChannelSpaces, kept: Mapping[str, Tensor]) -> ChannelMasks:
    """Masks from the kept units of some spaces; the other spaces keep all.

    Args:
        kept: Space name -> bool (size,).
    Raises:
        InputError: an unknown space, a mask of another shape or type, or one that keeps nothing.
    """
    return _checked(kept, spaces.sizes)


def _checked(kept: Mapping[str, Tensor], sizes: Mapping[str, int]) -> ChannelMasks:
    for name, mask in kept.items():
        if name not in sizes:
            raise InputError(f"kept: no channel space {name!r}; there are {', '.join(sizes) or 'none'}")
        if mask.dtype != torch.bool or tuple(mask.shape) != (sizes[name],):
            raise InputError(
                f"kept[{name!r}]: expected a bool mask of shape ({sizes[name]},), got {mask.dtype} {tuple(mask.shape)}"
            )
        if not bool(mask.any()):
            raise InputError(f"kept[{name!r}]: keeps no unit of the space; at least one must stay")
    return ChannelMasks(
        {name: kept[name].clone() if name in kept else torch.ones(n, dtype=torch.bool) for name, n in sizes.items()}
    )


def _digest(sizes: Mapping[str, int]) -> bytes:
    text = "\n".join(f"{name} {size}" for name, size in sizes.items())
    return hashlib.sha256(text.encode()).digest()[:_DIGEST_BYTES]
