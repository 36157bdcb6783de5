"""Adapters: affine maps, fitted in closed form, from a tensor of the target to the one that a source has at a cut.

Every cut tensor is read as a grid of positions with channels, (B, C, H, W), plus prefix tokens (B, P, C): a map
is its own grid, tokens form a square grid where their number is a square, a vector is a grid of one position. The
adapter resizes the grid and maps channels by one matrix, the same at every position (a 1x1 convolution); each prefix
token of the source has a matrix of its own, fed by the target's class token or, where it has none, by the mean of its
grid. So every kind fits to every other kind.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnc.cuts import CutPoint

_RIDGE_GRID = tuple(10.0**exponent for exponent in range(-7, 2))


def grid_size(cut: CutPoint) -> tuple[int, int]:
    """Height and width, in positions, of the grid that the tensor at `cut` is read as."""
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
    rows = tensor.movedim(cut.channel_dim, 1).flatten(2) if tensor.dim() > 2 else tensor.unsqueeze(2)  # (B, C, P + H*W)
    prefix, positions = rows[:, :, : cut.n_prefix_tokens], rows[:, :, cut.n_prefix_tokens :]
    return positions.unflatten(2, grid_size(cut)), prefix.transpose(1, 2)


def from_grid(grid: Tensor, prefix: Tensor, cut: CutPoint) -> Tensor:
    """Inverse of `to_grid`: the tensor at `cut` from its grid (B, C, H, W) and prefix tokens (B, P, C)."""
    if len(cut.shape) == 1:
        return grid.flatten(1)
    if len(cut.shape) == 2:
        tokens = torch.cat([prefix.transpose(1, 2), grid.flatten(2)], 2) if cut.n_prefix_tokens else grid.flatten(2)
        return tokens.movedim(1, cut.channel_dim)
    return grid.movedim(1, cut.channel_dim)


def resize(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, C, H, W) to `size`: exact area means where it shrinks, bilinear where it grows."""
    height, width = grid.shape[-2:]
    if (height, width) == size:
        return grid
    if size[0] <= height and size[1] <= width:
        return F.adaptive_avg_pool2d(grid, size)
    return F.interpolate(grid, size, mode="bilinear", align_corners=False)


class Adapter(nn.Module):
    """Turn the target's tensor at one cut into what the source expects at another.

    Args:
        target_cut: Where the input comes from.
        source_cut: Which tensor the output stands for.
        rectify: Clamp the grid at zero, as the source does with this tensor.
    """

    def __init__(self, target_cut: CutPoint, source_cut: CutPoint, rectify: bool) -> None:
        super().__init__()
        self.target_cut, self.source_cut, self.rectify = target_cut, source_cut, rectify
        n_in, n_out = n_channels(target_cut), n_channels(source_cut)
        self.register_buffer("weight", torch.zeros(n_out, n_in))
        self.register_buffer("bias", torch.zeros(n_out))
        self.register_buffer("prefix_weight", torch.zeros(source_cut.n_prefix_tokens, n_out, n_in))
        self.register_buffer("prefix_bias", torch.zeros(source_cut.n_prefix_tokens, n_out))
        self.weight: Tensor
        self.bias: Tensor
        self.prefix_weight: Tensor
        self.prefix_bias: Tensor

    @property
    def n_macs(self) -> int:
        """Multiply-accumulates for one sample."""
        height, width = grid_size(self.source_cut)
        if self._maps_before_resizing():
            height, width = grid_size(self.target_cut)
        return self.weight.numel() * height * width + self.prefix_weight.numel()

    @property
    def n_params(self) -> int:
        """Number of fitted values."""
        return sum(buffer.numel() for buffer in self.buffers())

    def forward(self, tensor: Tensor) -> Tensor:
        """Map the target's tensor, (B, *target_cut.shape), to (B, *source_cut.shape)."""
        grid, prefix = to_grid(tensor, self.target_cut)
        summary = prefix_summary(grid, prefix)
        size = grid_size(self.source_cut)
        weight = self.weight[:, :, None, None]
        if self._maps_before_resizing():
            grid = resize(F.conv2d(grid, weight, self.bias), size)
        else:
            grid = F.conv2d(resize(grid, size), weight, self.bias)
        if self.rectify:
            grid = F.relu(grid)
        made = torch.einsum("bi,poi->bpo", summary, self.prefix_weight) + self.prefix_bias
        return from_grid(grid, made, self.source_cut)

    def _maps_before_resizing(self) -> bool:
        # A matrix over channels and a resize whose weights sum to one commute: the smaller grid is the cheaper one.
        return math.prod(grid_size(self.target_cut)) < math.prod(grid_size(self.source_cut))


class Stitched(nn.Module):
    """A part of the source behind an adapter: the target's tensor at one cut in, the source's penultimate features out.

    Args:
        adapter: From the target's cut to the source's.
        body: The source from its cut to its penultimate features.
        features: The cut of those features.
    """

    def __init__(self, adapter: Adapter, body: nn.Module, features: CutPoint) -> None:
        super().__init__()
        self.adapter, self.body, self.features = adapter, body, features

    def forward(self, tensor: Tensor) -> Tensor:
        """Map (B, *target_cut.shape) to pooled features (B, D_s)."""
        return pool(self.body(self.adapter(tensor)), self.features)


def pool(tensor: Tensor, cut: CutPoint) -> Tensor:
    """One feature vector per sample, (B, C), from the tensor at `cut`: as it is, its class token, or its mean."""
    return tensor if tensor.dim() == 2 else prefix_summary(*to_grid(tensor, cut))


def n_channels(cut: CutPoint) -> int:
    """Number of channels of the tensor at `cut`."""
    return cut.shape[cut.channel_dim - 1]


def prefix_summary(grid: Tensor, prefix: Tensor) -> Tensor:
    """One vector (B, C) for each sample: its class token, or the mean of its grid where there is none."""
    return prefix[:, 0] if prefix.shape[1] else grid.mean((2, 3))


class AdapterFitter:
    """Streaming least squares between every target cut and every source cut.

    One pass over the support feeds `update`; `solve` then gives the ridge regression of any pair. Second moments of a
    target cut are kept once for each grid size that source cuts have and shared by all source cuts of that size.

    Args:
        target_cuts: Cuts whose tensors are mapped from.
        source_cuts: Cuts whose tensors are mapped to.
        max_positions: Positions used of each image and grid, drawn at random where there are more.
        generator: CPU generator for that draw.
    """

    def __init__(
        self,
        target_cuts: Sequence[CutPoint],
        source_cuts: Sequence[CutPoint],
        max_positions: int,
        generator: torch.Generator,
    ) -> None:
        self._target_cuts, self._source_cuts = list(target_cuts), list(source_cuts)
        self._max_positions, self._generator = max_positions, generator
        self._moments: dict[tuple[str, object], _Moments] = {}
        self._columns = self._assign_columns()
        self._lowest = dict.fromkeys((cut.name for cut in source_cuts), math.inf)

    def update(self, target_tensors: Mapping[str, Tensor], source_tensors: Mapping[str, Tensor]) -> None:
        """Add one batch: the tensors of all cuts, by name of the cut, for the same B images."""
        outputs: dict[object, list[Tensor]] = {part: [] for part in self._columns}
        for cut in self._source_cuts:
            grid, prefix = to_grid(source_tensors[cut.name], cut)
            self._lowest[cut.name] = min(self._lowest[cut.name], float(grid.min()))
            outputs[grid_size(cut)].append(grid)
            for p in range(cut.n_prefix_tokens):
                outputs["prefix"].append(prefix[:, p])
        for part, tensors in outputs.items():
            chosen = self._draw(part)
            y = torch.cat([_rows(tensor, chosen) for tensor in tensors], 1)
            for cut in self._target_cuts:
                grid, prefix = to_grid(target_tensors[cut.name], cut)
                x = prefix_summary(grid, prefix) if part == "prefix" else resize(grid, part)  # type: ignore[arg-type]
                self._moments.setdefault((cut.name, part), _Moments()).update(_rows(x, chosen), y)

    def solve(self, target_cut: CutPoint, source_cut: CutPoint) -> tuple[Adapter, float]:
        """Fit the adapter of one pair; also give the share of the source tensor's variance that it misses, in [0, 1]."""
        adapter = Adapter(target_cut, source_cut, rectify=self._lowest[source_cut.name] >= 0)
        part = grid_size(source_cut)
        columns = self._columns[part][source_cut.name, -1]
        weight, bias, error = self._moments[target_cut.name, part].ridge(columns)
        adapter.weight.copy_(weight)
        adapter.bias.copy_(bias)
        for p in range(source_cut.n_prefix_tokens):
            columns = self._columns["prefix"][source_cut.name, p]
            weight, bias, _ = self._moments[target_cut.name, "prefix"].ridge(columns)
            adapter.prefix_weight[p].copy_(weight)
            adapter.prefix_bias[p].copy_(bias)
        return adapter, error

    def _assign_columns(self) -> dict[object, dict[tuple[str, int], slice]]:
        columns: dict[object, dict[tuple[str, int], slice]] = {}
        used: dict[object, int] = {}
        for cut in self._source_cuts:
            parts: list[tuple[object, int]] = [(grid_size(cut), -1)]
            parts += [("prefix", p) for p in range(cut.n_prefix_tokens)]
            for part, p in parts:
                start = used.get(part, 0)
                used[part] = start + n_channels(cut)
                columns.setdefault(part, {})[cut.name, p] = slice(start, used[part])
        return columns

    def _draw(self, part: object) -> Tensor | None:
        n_positions = 1 if part == "prefix" else math.prod(part)  # type: ignore[call-overload]
        if n_positions <= self._max_positions:
            return None
        return torch.randperm(n_positions, generator=self._generator)[: self._max_positions]


def _rows(tensor: Tensor, chosen: Tensor | None) -> Tensor:
    """Positions as rows: (B, C, H, W) or (B, C) to (B * positions, C)."""
    if tensor.dim() == 2:
        return tensor
    flat = tensor.flatten(2)
    if chosen is not None:
        flat = flat[:, :, chosen.to(flat.device)]
    return flat.transpose(1, 2).flatten(0, 1)


@dataclass(eq=False)
class _Moments:
    """First and second moments of rows x (n, C) and y (n, D), summed about a pivot to keep differences exact."""

    n: int = 0

    def update(self, x: Tensor, y: Tensor) -> None:
        x, y = x.float(), y.float()
        if self.n == 0:
            self.x_pivot, self.y_pivot = x.mean(0), y.mean(0)
            self.x, self.y, self.xx, self.xy, self.yy = (0.0,) * 5
            self._spectrum = None
        x, y = x - self.x_pivot, y - self.y_pivot
        self.n += x.shape[0]
        self.x = self.x + x.sum(0).cpu().double()
        self.y = self.y + y.sum(0).cpu().double()
        self.xx = self.xx + (x.T @ x).cpu().double()
        self.xy = self.xy + (x.T @ y).cpu().double()
        self.yy = self.yy + y.square().sum(0).cpu().double()

    def ridge(self, columns: slice) -> tuple[Tensor, Tensor, float]:
        """Ridge regression of the chosen columns of y on x; the penalty is chosen by generalised cross-validation.

        Returns:
            Weight (D, C), bias (D,), and the share of variance not explained.
        Source: generalised cross-validation, Golub, Heath and Wahba, Technometrics 21 (1979).
        """
        x_mean = self.x / self.n
        y_mean = self.y[columns] / self.n
        scale, eigenvalues, eigenvectors = self._eigen(x_mean)
        xy = (self.xy[:, columns] / self.n - torch.outer(x_mean, y_mean)) / scale[:, None]
        total = float((self.yy[columns] / self.n - y_mean.square()).sum().clamp_min(1e-300))
        rotated = eigenvectors.T @ xy
        energy = rotated.square().sum(1)
        best = (math.inf, 0.0, 0.0)
        for penalty in _RIDGE_GRID:
            shrunk = eigenvalues + penalty
            missed = total - float((energy * (2 / shrunk - eigenvalues / shrunk.square())).sum())
            freedom = 1 - (1 + float((eigenvalues / shrunk).sum())) / self.n
            score = max(missed, 0.0) / freedom**2 if freedom > 0 else math.inf
            best = min(best, (score, penalty, missed / total))
        _, penalty, error = best
        weight = ((eigenvectors / (eigenvalues + penalty)) @ rotated / scale[:, None]).T
        bias = y_mean + self.y_pivot[columns].cpu().double() - weight @ (x_mean + self.x_pivot.cpu().double())
        return weight, bias, min(1.0, max(0.0, error))

    def _eigen(self, x_mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._spectrum is None:
            covariance = self.xx / self.n - torch.outer(x_mean, x_mean)
            scale = covariance.diagonal().clamp_min(1e-12).sqrt()
            eigenvalues, eigenvectors = torch.linalg.eigh(covariance / torch.outer(scale, scale))
            self._spectrum = (scale, eigenvalues.clamp_min(0), eigenvectors)
        return self._spectrum
