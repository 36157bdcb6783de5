"""Cut tensors read as grids of positions with channels, plus prefix tokens."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pnc.graph.cut_points import CutPoint


def grid_size(cut: CutPoint) -> tuple[int, int]:
    """Height and width, in positions, of the tensor at `cut` read as a grid."""
    if len(cut.shape) == 1:
        return 1, 1
    sizes = [size for dim, size in enumerate(cut.shape, start=1) if dim != cut.channel_dim]
    if len(sizes) == 2:
        return sizes[0], sizes[1]
    n_positions = sizes[0] - cut.n_prefix_tokens
    side = math.isqrt(n_positions)
    return (side, side) if side * side == n_positions else (n_positions, 1)


def to_grid(tensor: Tensor, cut: CutPoint) -> tuple[Tensor, Tensor]:
    """Read the tensor at `cut` as a grid (B, C, H, W) and its prefix tokens (B, P, C)."""
    if cut.kind == "map":
        grid = tensor if cut.channel_dim == 1 else tensor.movedim(cut.channel_dim, 1)
        return grid, tensor.new_empty(tensor.shape[0], 0, cut.n_channels)
    rows = tensor.movedim(cut.channel_dim, 1).flatten(2) if tensor.dim() > 2 else tensor.unsqueeze(2)  # (B, C, P + H*W)
    prefix, positions = rows[:, :, : cut.n_prefix_tokens], rows[:, :, cut.n_prefix_tokens :]
    return positions.unflatten(2, grid_size(cut)), prefix.transpose(1, 2)


def from_grid(grid: Tensor, prefix: Tensor | None, cut: CutPoint) -> Tensor:
    """Inverse of `to_grid`: the tensor at `cut` from its grid (B, C, H, W) and its prefix tokens (B, P, C), if any."""
    if len(cut.shape) == 1:
        return grid.flatten(1)
    if len(cut.shape) == 2:
        tokens = grid.flatten(2) if prefix is None else torch.cat([prefix.transpose(1, 2), grid.flatten(2)], 2)
        return tokens.movedim(1, cut.channel_dim)
    return grid.movedim(1, cut.channel_dim)


def resize(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, C, H, W) to `size`: area means if it shrinks, bilinear if it grows."""
    height, width = grid.shape[-2:]
    if (height, width) == size:
        return grid
    if grows_to(grid, size):
        return F.interpolate(grid, size, mode="bilinear", align_corners=False)
    return F.adaptive_avg_pool2d(grid, size)


def grows_to(grid: Tensor, size: tuple[int, int]) -> bool:
    """Whether `resize` to `size` makes a grid taller or wider."""
    return size[0] > grid.shape[2] or size[1] > grid.shape[3]


def pool(tensor: Tensor, cut: CutPoint) -> Tensor:
    """Reduce the tensor at `cut` to one vector per sample, (B, C): a vector itself, the class token, or the mean."""
    return tensor if tensor.dim() == 2 else prefix_summary(*to_grid(tensor, cut))


def prefix_summary(grid: Tensor, prefix: Tensor) -> Tensor:
    """Return one vector per sample, (B, C): its class token, or the mean of its grid if there is none."""
    return prefix[:, 0] if prefix.shape[1] else grid.mean((2, 3))
