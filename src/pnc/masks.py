"""Channel masks: which units of each channel space stay, and how many parameters that keeps."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pnc.channels import KEPT, ChannelSpaces
from pnc.errors import InputError, MismatchError

_DIGEST_BYTES = 8


@dataclass(frozen=True, eq=False)
class ChannelMasks:
    """A choice of units to keep, at least one per space. Made by `channel_masks` or `masks_for_density`.

    Attributes:
        kept: Space name -> bool (size,), for every space, in the order of the forward pass.
        density: Kept share of the prunable parameters: of all those that some choice of units could remove; 1.0 where
            nothing is prunable.
    """

    kept: Mapping[str, Tensor]
    density: float

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
                f"masks: {len(data)} bytes that belong to other channel spaces than the given ones "
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
    full = {name: kept[name].clone() if name in kept else torch.ones(n, dtype=torch.bool) for name, n in sizes.items()}
    masks = ChannelMasks(full, 1.0)
    return ChannelMasks(full, _Budget(spaces).density(masks.flat))


def masks_for_density(spaces: ChannelSpaces, scores: Mapping[str, Tensor], density: float) -> ChannelMasks:
    """Keep the units with the highest score per parameter, so many that the density is met.

    One ranking across all spaces; the best unit of each space always stays. The density reached is the largest one not
    above the wanted density that the ranking allows: one unit more would exceed it.

    Args:
        scores: Space name -> (size,), one for every space; higher means keep.
        density: Share of the prunable parameters to keep, in (0, 1].
    Raises:
        InputError: scores are missing, of another shape or not finite; `density` is outside (0, 1], or below what one
            unit per space costs.
    """
    if not 0 < density <= 1:
        raise InputError(f"density: expected a share in (0, 1], got {density}")
    for space in spaces.spaces:
        score = scores.get(space.name)
        if score is None or tuple(score.shape) != (space.size,) or not bool(score.isfinite().all()):
            what = "nothing" if score is None else f"shape {tuple(score.shape)} or values that are not finite"
            raise InputError(f"scores[{space.name!r}]: expected {space.size} finite numbers, got {what}")
    kept = torch.ones(spaces.n_units, dtype=torch.bool)
    if spaces.n_units == 0:
        return channel_masks(spaces, {})
    budget = _Budget(spaces)
    per_parameter = torch.cat([scores[s.name].double() for s in spaces.spaces]) / unit_params(spaces).clamp(min=1)
    order = torch.argsort(per_parameter, stable=True)
    best = torch.stack([per_parameter[s.start : s.start + s.size].argmax() + s.start for s in spaces.spaces])
    order = order[~torch.isin(order, best)]
    fewest, most = 0, len(order)
    while fewest < most:  # density falls with every removed unit: the smallest number that meets it
        middle = (fewest + most) // 2
        kept.fill_(True)[order[:middle]] = False
        fewest, most = (fewest, middle) if budget.density(kept) <= density else (middle + 1, most)
    kept.fill_(True)[order[:fewest]] = False
    reached = budget.density(kept)
    if reached > density:
        raise InputError(f"density: {density} cannot be reached, one unit of each space makes {reached:.4f} already")
    return ChannelMasks(_split(spaces, kept), reached)


def unit_params(spaces: ChannelSpaces) -> Tensor:
    """Parameters that removing one unit alone, and nothing else, would save; (n_units,), float64."""
    params = torch.zeros(spaces.n_units, dtype=torch.float64)
    for s in spaces.slices:
        if not s.is_parameter:
            continue
        units = s.units[s.units != KEPT]
        per_index = float(np.prod(s.shape)) / s.shape[s.dim]
        params.index_add_(0, units, torch.full((len(units),), per_index, dtype=torch.float64))
    return params


def _split(spaces: ChannelSpaces, flat: Tensor) -> dict[str, Tensor]:
    return {space.name: flat[space.start : space.start + space.size].clone() for space in spaces.spaces}


def _digest(kept: Mapping[str, Tensor]) -> bytes:
    text = "\n".join(f"{name} {len(mask)}" for name, mask in kept.items())
    return hashlib.sha256(text.encode()).digest()[:_DIGEST_BYTES]


class _Budget:
    """Counts the kept share of the prunable parameters."""

    def __init__(self, spaces: ChannelSpaces) -> None:
        self._weights: dict[tuple[str, str], tuple[tuple[int, ...], list[tuple[int, Tensor]]]] = {}
        for s in (s for s in spaces.slices if s.is_parameter):
            self._weights.setdefault((s.tensor, s.user), (s.shape, []))[1].append((s.dim, s.units))
        everything = torch.ones(spaces.n_units, dtype=torch.bool)
        self._total, self._never = self._count(everything), self._count(~everything)

    def _count(self, kept: Tensor) -> int:
        """Entries of all weights that follow units, of which only the kept ones are there."""
        flags = torch.cat([kept, torch.ones(1, dtype=torch.bool)])  # KEPT, -1, is the last entry
        total = 0
        for shape, cuts in self._weights.values():
            sizes = list(shape)
            for dim, units in cuts:
                sizes[dim] = int(flags[units].sum())
            total += int(np.prod(sizes))
        return total

    def density(self, kept: Tensor) -> float:
        prunable = self._total - self._never
        return (self._count(kept) - self._never) / prunable if prunable else 1.0
