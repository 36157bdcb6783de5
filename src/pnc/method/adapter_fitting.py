"""Adapters fitted in closed form: streaming ridge regressions from the target's tensors to the source's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pnc.clones.adapter import Adapter, kernel_size
from pnc.clones.position_grids import grid_size, grows_to, prefix_summary, resize, to_grid
from pnc.foundation.process_team import Team
from pnc.foundation.tensor_bits import same_bits
from pnc.graph.cut_points import CutPoint
from pnc.method.head_fitting import HeadSamples
from pnc.method.ridge import Moments, Regression, StoredRows

Form = tuple[int, int]
"""A grid size, or `PREFIX`."""

PREFIX: Form = (0, 0)
"""The form of a prefix token, in place of a grid size."""

N_ROWS = 40_000
"""Approximate number of rows per regression; more take time without improving accuracy."""

MAX_MEASURED = 256
"""Number of channels of a source cut, evenly spaced, on which errors are measured to choose the penalty."""


@dataclass(frozen=True, eq=False)
class CrossFitted:
    """The adapter of one pair of cuts, fitted on the whole support, and again without each fold.

    On images that an adapter was fitted on, everything after it looks better than it is; so each image passes through
    the adapter that was fitted without it.

    Attributes:
        adapter: Fitted on all images.
        held_out: For each fold, the adapter fitted on the others.
        error: Share of the variance of the source's tensor that `held_out` misses on its own folds; above 1 if it is
            worse than the mean.
        samples: Samples for fitting a head, of the whole support and the whole part, if known.
        task_key: `CloneTask.key` of the task that it was fitted for.
    """

    adapter: Adapter
    held_out: tuple[Adapter, ...]
    error: float
    samples: HeadSamples | None = None
    task_key: object = None


class AdapterFitter:
    """Streaming ridge regression between target cuts and source cuts.

    One pass over the support feeds `update`; `error` and `solve` then work for any pair. Second moments of a target cut
    are kept once for each form that source cuts need (a grid size, or a prefix token), and shared by all source cuts of
    that form; if there are fewer rows than inputs, the rows themselves are kept instead. The ridge penalty of a pair is
    the one with the lowest error on held-out folds.

    Args:
        target_cuts: Cuts to map from.
        source_cuts: Cuts to map to.
        n_images: Total number of images for `update`: of large grids only some positions are used.
        generator: CPU generator for the choice of positions.
        pairs: The pairs to fit; None for all.
        n_rows: Approximate number of rows per regression.
        n_outputs: Number of channels sampled from each source cut, evenly spaced; None for all, which `solve` needs.
    """

    def __init__(
        self,
        target_cuts: Sequence[CutPoint],
        source_cuts: Sequence[CutPoint],
        n_images: int,
        generator: torch.Generator,
        pairs: Sequence[tuple[CutPoint, CutPoint]] | None = None,
        n_rows: int = N_ROWS,
        n_outputs: int | None = None,
    ) -> None:
        self._target_cuts, self._source_cuts = list(target_cuts), list(source_cuts)
        self._n_images, self._generator, self._n_outputs = n_images, generator, n_outputs
        self._max_positions = max(4, n_rows // n_images)
        self._forms = list(dict.fromkeys(form for cut in source_cuts for form, _ in _outputs_of(cut)))
        self._columns: dict[tuple[str, Form], dict[tuple[str, int], slice]] = {}
        self._equal: dict[tuple[str, str], bool] = {}  # pairs of alike cuts: whether their tensors were equal so far
        for t, s in [(t, s) for t in target_cuts for s in source_cuts] if pairs is None else pairs:
            self._assign_columns(t, s)
            if t.is_alike(s):
                self._equal[t.name, s.name] = True
        self._seen: dict[tuple[str, Form], dict[int, Moments | StoredRows]] = {}
        self._regressions: dict[tuple[str, Form], Regression] = {}
        self._lowest = dict.fromkeys((cut.name for cut in source_cuts), math.inf)
        self._device = torch.device("cpu")

    def n_bytes(self, n_folds: int) -> int:
        """Bytes that it holds after `update` with images of `n_folds` folds."""
        total = 0
        for cut in self._target_cuts:
            for form in self._forms:
                columns = self._columns.get((cut.name, form), {})
                n_in = cut.n_channels * kernel_size(cut, form) ** 2
                n_out = max((place.stop for place in columns.values()), default=0)
                if n_out and self._is_wide(cut, form):
                    total += 4 * self._n_images * self._rows_per_image(cut, form) * (n_in + n_out)
                elif n_out:
                    total += 8 * n_folds * n_in * (n_in + n_out)
        return total

    def update(
        self,
        fold: int,
        target_tensors: Mapping[str, Tensor],
        source_tensors: Mapping[str, Tensor],
        counted: bool = True,
    ) -> None:
        """Add one batch of images of one fold: the tensors of all cuts, by name of the cut.

        The first batch sets the pivots of the moments; if it is not `counted`, it does nothing else.
        """
        self._device = next(iter(target_tensors.values())).device
        for (t, s), equal in self._equal.items():
            self._equal[t, s] = equal and same_bits(target_tensors[t], source_tensors[s])
        outputs: dict[tuple[str, int], Tensor] = {}
        for cut in self._source_cuts:
            grid, prefix = to_grid(source_tensors[cut.name], cut)
            self._lowest[cut.name] = min(self._lowest[cut.name], float(grid.min()))
            step = self._step(cut)
            for _, p in _outputs_of(cut):
                outputs[cut.name, p] = grid[:, ::step] if p < 0 else prefix[:, p, ::step]
        for form in self._forms:
            chosen = self._draw(form)
            joined: dict[tuple[tuple[str, int], ...], Tensor] = {}  # shared by target cuts with the same source cuts
            for cut in self._target_cuts:
                keys = tuple(self._columns.get((cut.name, form), ()))
                if keys and keys not in joined:
                    joined[keys] = torch.cat([_rows(outputs[key], chosen) for key in keys], 1).float()
                if keys:
                    x = _inputs(target_tensors[cut.name], cut, form, chosen).float()
                    self._add(fold, cut, form, x, joined[keys], counted)

    def skip(self) -> None:
        """Skip a batch that another process handles."""
        for form in self._forms:
            self._draw(form)

    def share(self, team: Team, n_folds: int) -> None:
        """Join the data of all processes, in folds 0, 1, ...; each process must have had at least one batch."""
        if team.size == 1:
            return
        for key, folds in self._seen.items():
            first = next(iter(folds.values()))
            for fold in range(n_folds):
                folds.setdefault(fold, type(first)(first.x_pivot, first.y_pivot)).share(team)
            self._seen[key] = {fold: folds[fold] for fold in range(n_folds)}
        lowest = team.least(torch.tensor(list(self._lowest.values())))
        self._lowest = dict(zip(self._lowest, lowest.tolist(), strict=True))
        equal = team.least(torch.tensor(list(self._equal.values()), dtype=torch.int64))
        self._equal = dict(zip(self._equal, map(bool, equal.tolist()), strict=True))

    def error(self, target_cut: CutPoint, source_cut: CutPoint) -> float:
        """Held-out share of the variance of the source's tensor that the adapter of a pair misses."""
        if self._is_identity(target_cut, source_cut):
            return 0.0
        form = grid_size(source_cut)
        columns = self._columns[target_cut.name, form][source_cut.name, -1]
        return self._regression(target_cut, form).best(columns)[1]

    def solve(self, target_cut: CutPoint, source_cut: CutPoint) -> CrossFitted:
        """Fit the adapters of a pair."""
        form = grid_size(source_cut)
        n_folds = len(self._seen[target_cut.name, form])
        if self._is_identity(target_cut, source_cut):
            same = Adapter(target_cut, source_cut, is_identity=True).to(self._device)
            return CrossFitted(same, (same,) * n_folds, 0.0)
        rectify = self._lowest[source_cut.name] >= 0
        adapters = [Adapter(target_cut, source_cut, rectify).to(self._device) for _ in range(n_folds + 1)]
        regression, columns = (
            self._regression(target_cut, form),
            self._columns[target_cut.name, form][source_cut.name, -1],
        )
        for adapter, (weight, bias) in zip(adapters, regression.solutions(columns), strict=True):
            adapter.weight.copy_(weight.reshape(adapter.weight.shape))
            adapter.bias.copy_(bias)
        for p in range(source_cut.n_prefix_tokens):
            prefix = self._regression(target_cut, PREFIX)
            place = self._columns[target_cut.name, PREFIX][source_cut.name, p]
            for adapter, (weight, bias) in zip(adapters, prefix.solutions(place), strict=True):
                adapter.prefix_weight[p].copy_(weight)
                adapter.prefix_bias[p].copy_(bias)
        return CrossFitted(adapters[-1], tuple(adapters[:-1]), regression.best(columns)[1])

    def _is_identity(self, target_cut: CutPoint, source_cut: CutPoint) -> bool:
        """Whether both tensors of a pair were equal bit for bit on all images."""
        return self._equal.get((target_cut.name, source_cut.name), False)

    def _add(self, fold: int, cut: CutPoint, form: Form, x: Tensor, y: Tensor, counted: bool) -> None:
        folds = self._seen.setdefault((cut.name, form), {})
        if fold not in folds:
            first = next(iter(folds.values()), None)
            pivots = (x.mean(0), y.mean(0)) if first is None else (first.x_pivot, first.y_pivot)
            folds[fold] = (StoredRows if self._is_wide(cut, form) else Moments)(*pivots)
        if counted:
            folds[fold].add(x, y)

    def _regression(self, target_cut: CutPoint, form: Form) -> Regression:
        key = target_cut.name, form
        if key not in self._regressions:
            folds = self._seen[key]
            measured = [
                place
                for columns in self._columns[key].values()
                for place in range(columns.start, columns.stop, -(-(columns.stop - columns.start) // MAX_MEASURED))
            ]
            self._regressions[key] = Regression([folds[fold] for fold in sorted(folds)], torch.tensor(measured))
        return self._regressions[key]

    def _assign_columns(self, target_cut: CutPoint, source_cut: CutPoint) -> None:
        """Assign columns to a source cut's channels among the outputs of each regression of a target cut."""
        for form, p in _outputs_of(source_cut):
            columns = self._columns.setdefault((target_cut.name, form), {})
            start = max((place.stop for place in columns.values()), default=0)
            n_channels = len(range(0, source_cut.n_channels, self._step(source_cut)))
            columns[source_cut.name, p] = slice(start, start + n_channels)

    def _step(self, source_cut: CutPoint) -> int:
        """Stride at which channels of a source cut are sampled."""
        return 1 if self._n_outputs is None else -(-source_cut.n_channels // self._n_outputs)

    def _rows_per_image(self, cut: CutPoint, form: Form) -> int:
        return 1 if _is_vector(cut, form) else min(math.prod(form), self._max_positions)

    def _is_wide(self, cut: CutPoint, form: Form) -> bool:
        """Whether a regression from a target's tensor to one form has more inputs than rows."""
        return self._n_images * self._rows_per_image(cut, form) < cut.n_channels * kernel_size(cut, form) ** 2

    def _draw(self, form: Form) -> Tensor:
        """Positions of a grid used for one batch, as flat indices."""
        n_positions = math.prod(form)
        if n_positions <= self._max_positions:
            return torch.arange(n_positions)
        return torch.randperm(n_positions, generator=self._generator)[: self._max_positions]


def _outputs_of(source_cut: CutPoint) -> list[tuple[Form, int]]:
    """Outputs to fit for a source cut, each with its form: the grid (-1), and each prefix token (p)."""
    return [(grid_size(source_cut), -1), *((PREFIX, p) for p in range(source_cut.n_prefix_tokens))]


def _is_vector(cut: CutPoint, form: Form) -> bool:
    """Whether a regression to one form reads the same row of the target's tensor for all positions."""
    return form == PREFIX or grid_size(cut) == (1, 1)


def _inputs(tensor: Tensor, cut: CutPoint, form: Form, chosen: Tensor) -> Tensor:
    """Inputs of a regression to one form: (B, C), or (B * positions, C * kernel * kernel)."""
    grid, prefix = to_grid(tensor, cut)
    if form == PREFIX:
        return prefix_summary(grid, prefix)
    if _is_vector(cut, form):
        return grid.flatten(1)
    if grows_to(grid, form):
        return _sampled(grid, form, chosen)
    grid = resize(grid, form)
    if kernel_size(cut, form) == 1:
        return _rows(grid, chosen)
    padded = F.pad(grid, (1, 1, 1, 1))
    width = padded.shape[3]
    corners = chosen // form[1] * width + chosen % form[1]
    window = (torch.arange(3)[:, None] * width + torch.arange(3)).flatten()
    patches = padded.flatten(2)[:, :, (corners + window[:, None]).flatten().to(grid.device)]  # (B, C, 9 * positions)
    rows: Tensor = patches.unflatten(2, (9, len(chosen))).movedim(3, 1).flatten(2).flatten(0, 1)
    return rows


def _sampled(grid: Tensor, form: Form, chosen: Tensor) -> Tensor:
    """Rows of the result of `resize` to a larger grid, without computing that grid."""
    places = torch.stack([chosen % form[1], chosen // form[1]], 1).to(grid)  # x, y
    sizes = places.new_tensor([form[1], form[0]])
    points = ((2 * places + 1) / sizes - 1).expand(len(grid), 1, -1, -1)
    sampled = F.grid_sample(grid, points, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled[:, :, 0].transpose(1, 2).flatten(0, 1)


def _rows(tensor: Tensor, chosen: Tensor) -> Tensor:
    """Positions as rows: (B, C, H, W) to (B * positions, C); a vector (B, C) is its own row."""
    if tensor.dim() == 2:
        return tensor
    return tensor.flatten(2)[:, :, chosen.to(tensor.device)].transpose(1, 2).flatten(0, 1)
