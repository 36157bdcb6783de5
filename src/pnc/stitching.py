"""Adapters: affine maps, fitted in closed form, from a tensor of the target to the one that a source has at a cut.

Every cut tensor is read as a grid of positions with channels, (B, C, H, W), plus prefix tokens (B, P, C): a map
is its own grid, tokens form a square grid where their number is a square, a vector is a grid of one position. The
adapter is one convolution with resizing: 3x3 where neighbours help and cost little (`kernel_size`), 1x1 elsewhere.
Each prefix token of the source has a matrix of its own, fed by the target's class token or, where it has none, by the
mean of its grid. So every kind fits to every other kind.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnc.cuts import CutPoint

Form = tuple[int, int]
"""A grid size, or `PREFIX`."""

PREFIX: Form = (0, 0)
"""Stands for a prefix token where grid sizes are listed."""

MAX_CHANNELS_3X3 = 128

N_ROWS = 80_000
"""Rows that one regression is made from, about; more take time and give no accuracy."""

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


def kernel_size(target_cut: CutPoint, size: Form) -> int:
    """Side of the convolution that maps the tensor at `target_cut` to a grid of `size`.

    3 where the grid does not grow and the channels are few, else 1. On ResNets of CIFAR size, 3x3 adapters halve the
    error of 1x1 ones and gain 1 to 6 points of accuracy for 5% of the source's MACs; beyond `MAX_CHANNELS_3X3` channels
    their file and their fit would no longer be small.
    """
    grid = grid_size(target_cut)
    grows = size[0] > grid[0] or size[1] > grid[1]
    return 1 if grows or min(size) < 3 or target_cut.n_channels > MAX_CHANNELS_3X3 else 3


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
        self.kernel_size = kernel_size(target_cut, grid_size(source_cut))
        n_in, n_out, n_prefix = target_cut.n_channels, source_cut.n_channels, source_cut.n_prefix_tokens
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
        """Number of fitted values."""
        return sum(buffer.numel() for buffer in self.buffers())

    def forward(self, tensor: Tensor) -> Tensor:
        """Map the target's tensor, (B, *target_cut.shape), to (B, *source_cut.shape)."""
        grid, prefix = to_grid(tensor, self.target_cut)
        summary = prefix_summary(grid, prefix)
        size = grid_size(self.source_cut)
        if math.prod(size) <= math.prod(grid_size(self.target_cut)):
            grid = self._convolve(resize(grid, size))
        else:  # 1x1: commutes with a resize, whose weights sum to one, and is cheaper on the smaller grid
            grid = resize(self._convolve(grid), size)
        if self.rectify:
            grid = F.relu(grid)
        made = torch.einsum("bi,poi->bpo", summary, self.prefix_weight) + self.prefix_bias
        return from_grid(grid, made, self.source_cut)

    def _convolve(self, grid: Tensor) -> Tensor:
        return F.conv2d(grid, self.weight, self.bias, padding=self.kernel_size // 2)


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


def prefix_summary(grid: Tensor, prefix: Tensor) -> Tensor:
    """One vector (B, C) for each sample: its class token, or the mean of its grid where there is none."""
    return prefix[:, 0] if prefix.shape[1] else grid.mean((2, 3))


class AdapterFitter:
    """Streaming least squares between every target cut and every source cut.

    One pass over the support feeds `update`; `solve` then gives the ridge regression of any pair. Second moments of a
    target cut are kept once for each form in which source cuts need it (a grid size, or a prefix token), and are shared
    by all source cuts of that form.

    Args:
        target_cuts: Cuts whose tensors are mapped from.
        source_cuts: Cuts whose tensors are mapped to.
        n_images: How many images `update` will see in all: of large grids only some positions are used.
        generator: CPU generator for the choice of positions.
    """

    def __init__(
        self,
        target_cuts: Sequence[CutPoint],
        source_cuts: Sequence[CutPoint],
        n_images: int,
        generator: torch.Generator,
    ) -> None:
        self._target_cuts, self._source_cuts = list(target_cuts), list(source_cuts)
        self._max_positions, self._generator = max(4, N_ROWS // n_images), generator
        self._moments: dict[tuple[str, Form], _Moments] = {}
        self._columns = self._assign_columns()
        self._lowest = dict.fromkeys((cut.name for cut in source_cuts), math.inf)

    def update(self, target_tensors: Mapping[str, Tensor], source_tensors: Mapping[str, Tensor]) -> None:
        """Add one batch: the tensors of all cuts, by name of the cut, for the same B images."""
        outputs: dict[Form, list[Tensor]] = {form: [] for form in self._columns}
        for cut in self._source_cuts:
            grid, prefix = to_grid(source_tensors[cut.name], cut)
            self._lowest[cut.name] = min(self._lowest[cut.name], float(grid.min()))
            outputs[grid_size(cut)].append(grid)
            for p in range(cut.n_prefix_tokens):
                outputs[PREFIX].append(prefix[:, p])
        for form, tensors in outputs.items():
            chosen = self._draw(form)
            y = torch.cat([_rows(tensor, chosen) for tensor in tensors], 1)
            for cut in self._target_cuts:
                x = _rows(_inputs(target_tensors[cut.name], cut, form), chosen)
                if (cut.name, form) not in self._moments:
                    self._moments[cut.name, form] = _Moments(x, y)
                self._moments[cut.name, form].update(x, y)

    def solve(self, target_cut: CutPoint, source_cut: CutPoint) -> tuple[Adapter, float]:
        """Fit the adapter of a pair; also give the share of the source tensor's variance that it misses, in [0, 1]."""
        adapter = Adapter(target_cut, source_cut, rectify=self._lowest[source_cut.name] >= 0)
        form = grid_size(source_cut)
        weight, bias, error = self._moments[target_cut.name, form].ridge(self._columns[form][source_cut.name, -1])
        adapter.weight.copy_(weight.reshape(adapter.weight.shape))
        adapter.bias.copy_(bias)
        for p in range(source_cut.n_prefix_tokens):
            columns = self._columns[PREFIX][source_cut.name, p]
            weight, bias, _ = self._moments[target_cut.name, PREFIX].ridge(columns)
            adapter.prefix_weight[p].copy_(weight)
            adapter.prefix_bias[p].copy_(bias)
        return adapter, error

    def _assign_columns(self) -> dict[Form, dict[tuple[str, int], slice]]:
        """Where the channels of each source cut stand among the outputs of its form: its grid (-1), prefix token p."""
        columns: dict[Form, dict[tuple[str, int], slice]] = {}
        used: dict[Form, int] = {}
        for cut in self._source_cuts:
            for form, p in [(grid_size(cut), -1), *((PREFIX, p) for p in range(cut.n_prefix_tokens))]:
                start = used.get(form, 0)
                used[form] = start + cut.n_channels
                columns.setdefault(form, {})[cut.name, p] = slice(start, used[form])
        return columns

    def _draw(self, form: Form) -> Tensor | None:
        """The positions of a grid that are used for one batch; None for all."""
        n_positions = math.prod(form)
        if n_positions <= self._max_positions:
            return None
        return torch.randperm(n_positions, generator=self._generator)[: self._max_positions]


def _inputs(tensor: Tensor, cut: CutPoint, form: Form) -> Tensor:
    """What a regression onto one form reads of the target's tensor: (B, C), or (B, C * kernel * kernel, H, W)."""
    grid, prefix = to_grid(tensor, cut)
    if form == PREFIX:
        return prefix_summary(grid, prefix)
    grid, size = resize(grid, form), kernel_size(cut, form)
    return grid if size == 1 else F.unfold(grid, size, padding=size // 2).unflatten(2, form)


def _rows(tensor: Tensor, chosen: Tensor | None) -> Tensor:
    """Positions as rows: (B, C, H, W) or (B, C) to (B * positions, C)."""
    if tensor.dim() == 2:
        return tensor
    flat = tensor.flatten(2)
    if chosen is not None:
        flat = flat[:, :, chosen.to(flat.device)]
    return flat.transpose(1, 2).flatten(0, 1)


class _Moments:
    """First and second moments of rows x (n, C) and y (n, D), summed about a pivot to keep differences exact."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.n = 0
        self.x_pivot, self.y_pivot = x.float().mean(0), y.float().mean(0)
        n_in, n_out = x.shape[1], y.shape[1]
        self.x, self.y = torch.zeros(n_in, dtype=torch.float64), torch.zeros(n_out, dtype=torch.float64)
        self.xx = torch.zeros(n_in, n_in, dtype=torch.float64)
        self.xy = torch.zeros(n_in, n_out, dtype=torch.float64)
        self.yy = torch.zeros(n_out, dtype=torch.float64)
        self._spectrum: tuple[Tensor, Tensor, Tensor] | None = None

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows; not after `ridge`."""
        x, y = x.float() - self.x_pivot, y.float() - self.y_pivot
        self.n += x.shape[0]
        self.x += x.sum(0).cpu()
        self.y += y.sum(0).cpu()
        self.xx += (x.T @ x).cpu()
        self.xy += (x.T @ y).cpu()
        self.yy += y.square().sum(0).cpu()

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
