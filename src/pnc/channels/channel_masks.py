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

    def to_bytes(self) -> bytes:
        """Eight bytes that identify the spaces, then one bit per unit; the same masks give the same bytes."""
        return _digest(self.kept) + np.packbits(self.flat.numpy()).tobytes()

    @staticmethod
    def from_bytes(data: bytes, spaces: ChannelSpaces) -> "ChannelMasks":
        """Read what `to_bytes` wrote.

        Raises:
            MismatchError: the bytes were written for other channel spaces.
        """
        empty = {space.name: torch.ones(space.size, dtype=torch.bool) for space in spaces.spaces}
        n_bytes = _DIGEST_BYTES + (spaces.n_units + 7) // 8
        if len(data) != n_bytes or data[:_DIGEST_BYTES] != _digest(empty):
            raise MismatchError(
                f"masks: {len(data)} bytes for other channel spaces than the given ones "
                f"({len(spaces.spaces)} spaces, {spaces.n_units} units, {n_bytes} bytes); use the network that the "
                "masks were made for, and the same version of pnc"
            )
        bits = np.unpackbits(np.frombuffer(data, np.uint8, offset=_DIGEST_BYTES), count=spaces.n_units)
        return channel_masks(spaces, _split(spaces, torch.from_numpy(bits.astype(bool))))


def channel_masks(spaces: ChannelSpaces, kept: Mapping[str, Tensor]) -> ChannelMasks:
    """Masks from the kept units of some spaces; the other spaces keep all.

    Args:
        kept: Space name -> bool (size,).
    Raises:
        InputError: an unknown space, a mask of another shape or type, or one that keeps nothing.
    """
    sizes = {space.name: space.size for space in spaces.spaces}
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


def _split(spaces: ChannelSpaces, flat: Tensor) -> dict[str, Tensor]:
    return {space.name: flat[space.start : space.start + space.size].clone() for space in spaces.spaces}


def _digest(kept: Mapping[str, Tensor]) -> bytes:
    text = "\n".join(f"{name} {len(mask)}" for name, mask in kept.items())
    return hashlib.sha256(text.encode()).digest()[:_DIGEST_BYTES]
