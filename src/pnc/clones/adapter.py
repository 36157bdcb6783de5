"""Adapters: affine maps, fitted in closed form, from the target's tensor at one cut to the source's at another.

Every cut tensor is read as a grid of positions with channels, (B, C, H, W), plus prefix tokens (B, P, C): a map is
already a grid, tokens form a square grid if their number is a square, a vector is a grid of one position. The adapter
is one convolution with resizing: 3x3 where neighbours help and cost little (`kernel_size`), otherwise 1x1. Each prefix
token of the source has its own matrix, applied to the target's class token or, if there is none, to the mean of its
grid. So any kind of tensor maps to any other. If both networks have the same tensor, as at the input or after a shared
trunk, the adapter is the identity.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnc.clones.position_grids import from_grid, grid_size, pool, prefix_summary, resize, to_grid
from pnc.graph.cut_points import CutPoint

MAX_CHANNELS_3X3 = 128


def kernel_size(target_cut: CutPoint, size: tuple[int, int]) -> int:
    """Side of the convolution that maps the tensor at `target_cut` to a grid of `size`.

    3 if the grid does not grow and has few channels, otherwise 1. On ResNets of CIFAR size, 3x3 adapters halve the
    error of 1x1 ones and gain 1 to 6 points of accuracy for 5% of the source's MACs; with more than
    `MAX_CHANNELS_3X3` channels, the file would be large and the fit slow.
    """
    grid = grid_size(target_cut)
    grows = size[0] > grid[0] or size[1] > grid[1]
    return 1 if grows or min(size) < 3 or target_cut.n_channels > MAX_CHANNELS_3X3 else 3


class Adapter(nn.Module):
    """Map the target's tensor at one cut to the source's tensor at another.

    Args:
        target_cut: Where the input comes from.
        source_cut: Where the output replaces the source's tensor.
        rectify: Clamp the grid at zero, because the source's tensor is never negative.
        is_identity: Return the input and hold no weights; the cuts must be alike.
    """

    def __init__(
        self, target_cut: CutPoint, source_cut: CutPoint, rectify: bool = False, is_identity: bool = False
    ) -> None:
        super().__init__()
        self.target_cut, self.source_cut, self.rectify = target_cut, source_cut, rectify
        self.is_identity = is_identity
        self.kernel_size = kernel_size(target_cut, grid_size(source_cut))
        n_in, n_out, n_prefix = target_cut.n_channels, source_cut.n_channels, source_cut.n_prefix_tokens
        if is_identity:
            n_in = n_out = n_prefix = 0
        self.register_buffer("weight", torch.zeros(n_out, n_in, self.kernel_size, self.kernel_size))
        self.register_buffer("bias", torch.zeros(n_out))
        self.register_buffer("prefix_weight", torch.zeros(n_prefix, n_out, n_in))
        self.register_buffer("prefix_bias", torch.zeros(n_prefix, n_out))
        self.weight: Tensor
        self.bias: Tensor
        self.prefix_weight: Tensor
        self.prefix_bias: Tensor

    @property
    def n_macs(self) -> int:
        """Multiply-accumulates for one sample."""
        sizes = grid_size(self.target_cut), grid_size(self.source_cut)
        return self.weight.numel() * min(map(math.prod, sizes)) + self.prefix_weight.numel()

    @property
    def n_params(self) -> int:
        """Number of weights and biases."""
        return sum(buffer.numel() for buffer in self.buffers())

    def forward(self, tensor: Tensor) -> Tensor:
        """Map the target's tensor, (B, *target_cut.shape), to (B, *source_cut.shape)."""
        if self.is_identity:
            return tensor
        grid, prefix = to_grid(tensor, self.target_cut)
        source_prefix = self.prefix_tokens(grid, prefix)
        size = grid_size(self.source_cut)
        if math.prod(size) <= math.prod(grid_size(self.target_cut)):
            grid = self._convolve(resize(grid, size))
        else:  # a 1x1 convolution commutes with resizing (its weights sum to one) and is cheaper on the smaller grid
            grid = resize(self._convolve(grid), size)
        if self.rectify:
            grid = F.relu(grid)
        return from_grid(grid, source_prefix, self.source_cut)

    def prefix_tokens(self, grid: Tensor, prefix: Tensor) -> Tensor | None:
        """Return the source's prefix tokens (B, P, C); None if it has none."""
        if not self.source_cut.n_prefix_tokens:
            return None
        return torch.einsum("bi,poi->bpo", prefix_summary(grid, prefix), self.prefix_weight) + self.prefix_bias

    def _convolve(self, grid: Tensor) -> Tensor:
        return F.conv2d(grid, self.weight, self.bias, padding=self.kernel_size // 2)


class Stitched(nn.Module):
    """An adapter and a part of the source: maps the target's tensor at a cut to the source's penultimate features.

    Args:
        adapter: Maps the target's tensor to the source's.
        body: The source from its cut to its penultimate features.
        features: The cut of those features.
    """

    def __init__(self, adapter: Adapter, body: nn.Module, features: CutPoint) -> None:
        super().__init__()
        self.adapter, self.body, self.features = adapter, body, features

    def forward(self, tensor: Tensor) -> Tensor:
        """Map (B, *target_cut.shape) to pooled features (B, D_s)."""
        return pool(self.body(self.adapter(tensor)), self.features)
