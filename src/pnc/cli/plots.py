"""Plots of measurements; requires the extra `plots`."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pnc.foundation.errors import InputError
from pnc.foundation.file_writing import write_file
from pnc.method.positions import Position, Scan


def check_plot(path: Path) -> None:
    """Check before any work that a plot can be written to `path`.

    Raises:
        InputError: the name does not end in .png, or matplotlib or adjustText is not installed.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"plot: expected a PNG file, with a name that ends in .png; got {path}")
    _figure()


def draw_scan(found: Scan, chosen: Position, path: Path) -> None:
    """Draw log-loss against cost of all scanned positions, with the Pareto front and the choice, as a PNG file.

    Args:
        found: From `scan`.
        chosen: From `found.choose`.
        path: The file; an existing one is replaced.
    Raises:
        InputError: as `check_plot`, or the file cannot be written.
    """
    check_plot(path)
    figure = _figure()
    axes = figure.add_subplot(xlabel="added MACs, share of the source's", ylabel="log-loss on held-out support, nats")
    shares, losses = ([getattr(p, name) for p in found.positions] for name in ("macs_share", "log_loss"))
    axes.plot(shares, losses, ".", color="0.7", label="positions")
    front = found.front()
    axes.plot([p.macs_share for p in front], [p.log_loss for p in front], "o-", label="front")
    names = {f"{p.target_cut.name} > {p.source_cut.name}": (p.macs_share, p.log_loss) for p in front}
    axes.plot(chosen.macs_share, chosen.log_loss, "o", markersize=14, fillstyle="none", color="C3", label="chosen")
    axes.legend(loc="upper right")
    _label(axes, names)
    _write(figure, path)


def draw_growth(series: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Draw seconds against the size of a job, on logarithmic axes, as a PNG file.

    Args:
        series: Sizes and seconds for each kind of job.
        path: The file; an existing one is replaced.
    Raises:
        InputError: as `check_plot`, or the file cannot be written.
    """
    check_plot(path)
    figure = _figure()
    axes = figure.add_subplot(xlabel="samples or cuts", ylabel="seconds", xscale="log", yscale="log")
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.legend()
    _write(figure, path)


def draw_comparison(title: str, points: Mapping[str, tuple[str, float, float]], path: Path) -> None:
    """Draw average accuracy against locality of methods, as a PNG file.

    Args:
        title: Title of the plot.
        points: For each method its kind, which determines the colour, its locality KL and its average accuracy.
        path: The file; an existing one is replaced.
    Raises:
        InputError: as `check_plot`, or the file cannot be written.
    """
    check_plot(path)
    figure = _figure()
    axes = figure.add_subplot(xlabel="locality KL on base classes, nats", ylabel="average accuracy", title=title)
    kinds = list(dict.fromkeys(kind for kind, _, _ in points.values()))
    for place, kind in enumerate(kinds):
        chosen = {name: where for name, (own, *where) in points.items() if own == kind}
        axes.plot(*zip(*chosen.values(), strict=True), "o", color=f"C{place}", label=kind)
    axes.legend()
    _label(axes, {name: (x, y) for name, (_, x, y) in points.items()})
    _write(figure, path)


def draw_curves(title: str, curves: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Draw leak against new accuracy for shifts of the new logits, as a PNG file.

    Args:
        title: Title of the plot.
        curves: For each method (accuracy on new classes, leak) at each shift.
        path: The file; an existing one is replaced.
    Raises:
        InputError: as `check_plot`, or the file cannot be written.
    """
    check_plot(path)
    figure = _figure()
    axes = figure.add_subplot(xlabel="accuracy on new classes", ylabel="leak of base classes", title=title)
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), ".-", label=name)
        middle = curve[len(curve) // 2]
        axes.plot(*middle, "o", color=axes.lines[-1].get_color(), markersize=9)
    axes.legend(title="dot: no shift")
    _write(figure, path)


def _label(axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Label points without overlaps."""
    from adjustText import adjust_text

    texts = [axes.text(x, y, name, fontsize=6) for name, (x, y) in points.items()]
    places = dict(zip("xy", zip(*points.values(), strict=True), strict=True))
    line = {"arrowstyle": "-", "color": "0.7", "linewidth": 0.5}
    adjust_text(texts, **places, ax=axes, expand=(1.1, 1.6), iter_lim=300, arrowprops=line)


def _write(figure: Any, path: Path) -> None:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150, metadata={"Software": "pnc"})
    write_file(path, data.getvalue())


def _figure() -> Any:
    """An empty figure of matplotlib, independent of its global state."""
    try:
        import adjustText  # noqa: F401 # checked here, before any work
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f'plot: {error.name} is needed for this; pip install "pnc[plots]"') from error
    return Figure(figsize=(8, 5), layout="constrained")
