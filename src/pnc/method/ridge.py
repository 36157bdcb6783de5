"""Ridge regressions in closed form over streamed rows; held-out errors choose the penalty."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pnc.foundation.process_team import Team

PENALTIES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
"""Candidate ridge penalties, in units of the inputs' variance."""


class Moments:
    """First and second moments of rows x (n, C) and y (n, D), summed about a pivot to keep differences exact.

    If several rows of y belong to one of x, they are replaced by their mean; their scatter about it, which no
    regression on x can explain, is summed separately.
    """

    def __init__(self, x_pivot: Tensor, y_pivot: Tensor) -> None:
        self.n = 0
        self.x_pivot, self.y_pivot = x_pivot, y_pivot
        n_in, n_out = len(x_pivot), len(y_pivot)
        self.x, self.y = torch.zeros(n_in, dtype=torch.float64), torch.zeros(n_out, dtype=torch.float64)
        self.xx = torch.zeros(n_in, n_in, dtype=torch.float64)
        self.xy = torch.zeros(n_in, n_out, dtype=torch.float64)
        self.yy = torch.zeros(n_out, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows x (n, C), and y (n, D) or, with m consecutive rows for each of x, (n * m, D)."""
        self.add_averaged(x, *_averaged(y, len(x)))

    def add_averaged(self, x: Tensor, y: Tensor, scatter: Tensor) -> None:
        """Add rows x (n, C) and y (n, D), and the squared scatter (D,) of the rows averaged to y."""
        x, y = x - self.x_pivot, y - self.y_pivot
        self.n += x.shape[0]
        self.x += x.sum(0).cpu()
        self.y += y.sum(0).cpu()
        self.xx += (x.T @ x).cpu()
        self.xy += (x.T @ y).cpu()
        self.yy += (y.square().sum(0) + scatter).cpu()

    def share(self, team: Team) -> None:
        """Sum the moments of all processes."""
        self.n = int(team.sum(torch.tensor(self.n)))
        for name in ("x", "y", "xx", "xy", "yy"):
            setattr(self, name, team.sum(getattr(self, name)))

    def about(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Second moments xx (C, C), xy (C, D), yy (D,) about points given relative to the pivot."""
        xx = self.xx - torch.outer(self.x, x) - torch.outer(x, self.x) + self.n * torch.outer(x, x)
        xy = self.xy - torch.outer(self.x, y) - torch.outer(x, self.y) + self.n * torch.outer(x, y)
        return xx, xy, self.yy - 2 * y * self.y + self.n * y.square()


def _averaged(y: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Means (n, D) of equal groups of rows of y, and by how much the squares of the rows exceed theirs (D,)."""
    if len(y) == n:
        return y, y.new_zeros(y.shape[1])
    grouped = y.unflatten(0, (n, -1))
    means = grouped.mean(1)
    return means, (grouped - means[:, None]).square().mean(1).sum(0)


class StoredRows:
    """Rows x (n, C) and y (n, D) themselves: if there are fewer than C, `Moments` would take more time and memory."""

    def __init__(self, x_pivot: Tensor, y_pivot: Tensor) -> None:
        self.x_pivot, self.y_pivot = x_pivot, y_pivot
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows, as `Moments.add`."""
        self._parts.append((x - self.x_pivot, *_averaged(y, len(x))))

    def share(self, team: Team) -> None:
        """Join the rows of all processes."""
        none = self.x_pivot.new_empty(0, len(self.x_pivot)), *[self.y_pivot.new_empty(0, len(self.y_pivot))] * 2
        x, y, scatter = (torch.cat(parts) for parts in zip(none, *self._stacked(), strict=True))
        n_rows = team.sum(torch.zeros(team.size, dtype=torch.int64).index_fill(0, torch.tensor(team.rank), len(x)))
        places = int(n_rows[: team.rank].sum()) + torch.arange(len(x))
        x, y = (team.gather(rows, places, int(n_rows.sum())) for rows in (x, y))
        self._parts = [(x, y, team.sum(scatter.sum(0)))]

    def _stacked(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [(x, y, scatter[None]) for x, y, scatter in self._parts]

    @property
    def x(self) -> Tensor:
        """All x, relative to the pivot, (n, C), float64."""
        return torch.cat([x for x, _, _ in self._parts]).double().cpu()

    def moments(self, axes: Tensor) -> Moments:
        """Moments of the coordinates x @ axes, (n, R)."""
        found = Moments(axes.new_zeros(axes.shape[1]), self.y_pivot.double().cpu())
        for x, y, scatter in self._parts:
            found.add_averaged(x.double().cpu() @ axes, y.double().cpu(), scatter.cpu())
        return found


@dataclass(frozen=True)
class _Subspace:
    """The subspace of all rows: it contains the solution of a ridge regression, so their coordinates suffice as inputs.

    Attributes:
        axes: From inputs relative to the pivot to coordinates, (C, R): orthonormal axes of the inputs scaled to unit
            variance.
        pivot: (C,).
    """

    axes: Tensor
    pivot: Tensor

    @classmethod
    def through(cls, folds: Sequence[StoredRows]) -> "_Subspace":
        """The subspace of the rows of all folds."""
        x = torch.cat([fold.x for fold in folds])
        scale = x.var(0, correction=0).clamp_min(1e-12).sqrt()
        return cls(torch.linalg.qr((x / scale).T).Q / scale[:, None], folds[0].x_pivot.cpu().double())


class Regression:
    """Ridge regressions of all columns of y on x: one for each penalty and fold, fitted without that fold.

    Only their errors are kept, because the weights of all would fill the memory; `solutions` solves the requested ones
    again. With a single fold nothing can be held out: the largest penalty is fitted and measured on the same rows.

    Args:
        folds: Data of each fold, all as moments or all as rows.
        measured: Indices of the columns of y whose errors are measured; None for all.
    """

    def __init__(self, folds: Sequence[Moments | StoredRows], measured: Tensor | None = None) -> None:
        rows = [fold for fold in folds if isinstance(fold, StoredRows)]
        subspace = self._subspace = _Subspace.through(rows) if rows else None
        self._folds = [fold for fold in folds if isinstance(fold, Moments)]
        if subspace is not None:
            self._folds = [fold.moments(subspace.axes) for fold in rows]
        self._all = _total(self._folds)
        self._scale = torch.ones_like(self._all.x)  # coordinates in a subspace are scaled already
        if self._subspace is None:
            self._scale = (self._all.about(*_means(self._all))[0].diagonal() / self._all.n).clamp_min(1e-12).sqrt()
        self._penalties = PENALTIES if len(folds) > 1 else PENALTIES[-1:]
        columns = torch.arange(len(self._all.y)) if measured is None else measured
        self._missed = torch.zeros(len(self._penalties), len(self._all.y), dtype=torch.float64)
        for fold in self._folds:
            rest = self._without(fold)
            xx, xy, yy = fold.about(*_means(rest))
            xy, yy = xy[:, columns], yy[columns]
            for index, weight in enumerate(self._fit(rest, self._penalties, columns)):
                self._missed[index, columns] += yy - 2 * (weight * xy.T).sum(1) + ((weight @ xx) * weight).sum(1)
        self._variance = torch.zeros_like(self._missed[0])
        self._variance[columns] = self._all.about(*_means(self._all))[2][columns]

    def best(self, columns: slice) -> tuple[int, float]:
        """Index of the best penalty for some columns of y, and the share of their variance that it misses."""
        shares = self._missed[:, columns].sum(1) / self._variance[columns].sum().clamp_min(1e-300)
        index = int(shares.argmin())
        return index, max(0.0, float(shares[index]))

    def solutions(self, columns: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Weight (D, C) and bias (D,) for some columns of y: without each fold, then on all rows."""
        penalty = self._penalties[self.best(columns)[0]]
        for moments in (*map(self._without, self._folds), self._all):
            (weight,) = self._fit(moments, [penalty], columns)
            x_mean, y_mean = _means(moments)
            x_mean, y_mean = x_mean + moments.x_pivot.cpu().double(), y_mean + moments.y_pivot.cpu().double()
            bias = y_mean[columns] - weight @ x_mean
            if self._subspace is not None:
                weight = weight @ self._subspace.axes.T
                bias = bias - weight @ self._subspace.pivot
            yield weight, bias

    def _without(self, fold: Moments) -> Moments:
        return _total([other for other in self._folds if other is not fold] or [fold])

    def _fit(self, moments: Moments, penalties: Sequence[float], columns: slice | Tensor) -> Iterator[Tensor]:
        """Weights (D, C) for some columns of y, for each penalty."""
        xx, xy, _ = moments.about(*_means(moments))
        correlation = xx / torch.outer(self._scale, self._scale) / moments.n
        right = xy[:, columns] / self._scale[:, None] / moments.n
        for penalty in penalties:
            yield (_solve(correlation, penalty, right) / self._scale[:, None]).T


def _solve(correlation: Tensor, penalty: float, right: Tensor) -> Tensor:
    """Solve (correlation + penalty) @ x = right for a matrix that is positive definite up to rounding.

    Moments are summed in float32, so that the smallest eigenvalues may fall below zero by more than the smallest
    penalty; without a Cholesky factor, LU is used.
    """
    matrix = correlation.clone()
    matrix.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    solution: Tensor = torch.linalg.solve(matrix, right) if int(failed) else torch.cholesky_solve(right, factor)
    return solution


def _total(parts: Sequence[Moments]) -> Moments:
    total = Moments(parts[0].x_pivot, parts[0].y_pivot)
    for part in parts:
        total.n += part.n
        for name in ("x", "y", "xx", "xy", "yy"):
            getattr(total, name).add_(getattr(part, name))
    return total


def _means(moments: Moments) -> tuple[Tensor, Tensor]:
    """Means of x and y, relative to the pivot."""
    return moments.x / moments.n, moments.y / moments.n
