"""The pictures of a report, drawn by matplotlib: as SVG with real text in the page's colours, or as PNG."""

import io
import re
from collections.abc import Callable
from typing import Any

from pnc.foundation.errors import InputError
from pnc.report.facts import ClonePicture, Reliability

BLUE, ORANGE = "#3f83d8", "#d9772b"
"""Colours of target and source, for light and dark pages."""

_INK = "#123456"
"""Placeholder for the colour of the page's text while a picture is drawn."""

_WIDE = 4.8
"""Width in inches; the narrowest screens show the text at three quarters of its size."""

Draw = Callable[[Any], None]


def check_drawing() -> None:
    """Check that pictures can be drawn, before any work.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(f'report: {error.name} is needed for this; pip install "pnc[report]"') from error


def svg_of(draw: Draw, height: float, label: str) -> str:
    """Draw a picture as SVG for a page.

    Args:
        draw: Draws on the given axes.
        height: Height in inches.
        label: What it shows, for readers who cannot see it.
    """
    data = _drawn(draw, height, "svg", _INK, label)
    text = data.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    size = re.search(r'viewBox="[^"]*"', text)
    assert size is not None
    head = f'<svg {size[0]} xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img">'
    text = head + f"<title>{_escaped(label)}</title>" + text[text.index(">") + 1 :]
    return text.replace(_INK, "currentColor")


def png_of(draw: Draw, height: float) -> bytes:
    """Draw a picture as PNG for a document, dark on white; arguments as for `svg_of`."""
    return _drawn(draw, height, "png", "#222222", "png")


def _drawn(draw: Draw, height: float, kind: str, ink: str, salt: str) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        **{f"{part}.color": ink for part in ("text", "xtick", "ytick", "grid")},
        "axes.edgecolor": ink,
        "axes.labelcolor": ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "figure.facecolor": "none" if kind == "svg" else "white",
        "font.size": 11.5,
        "grid.alpha": 0.2,
        "legend.frameon": False,
        "legend.fontsize": 11,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,  # ids are reproducible, and unique on a page
        "text.parse_math": False,  # names of classes and layers are not formulas
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDE, height), layout="constrained")
        draw(figure.add_subplot())
        data = io.BytesIO()
        about = {"Date": None} if kind == "svg" else {"Software": "pnc"}
        figure.savefig(data, format=kind, dpi=200, metadata=about)
    return data.getvalue()


def draw_networks(axes: Any, clone: ClonePicture) -> None:
    """Draw target, source and adapter as bars to scale, and the part of the source that the clone runs."""
    longest = max(clone.target_macs, clone.source_macs, clone.adapter_macs, 1)
    target, source = clone.target_macs / longest, clone.source_macs / longest
    leaves, enters = clone.target_cut_macs / longest, clone.source_cut_macs / longest
    axes.set(xlim=(-0.01, 1.01), ylim=(-2.2 if clone.adapter_macs else -0.6, 3.7))
    axes.axis("off")
    axes.barh(2.5, target, height=0.7, left=0, color=BLUE, align="center")
    axes.barh(0.5, source, height=0.7, left=0, fill=False, edgecolor=ORANGE, linewidth=1, linestyle=(0, (3, 2)))
    axes.barh(0.5, source - enters, height=0.7 * clone.kept, left=enters, color=ORANGE, align="center")
    axes.annotate(
        "",
        xy=(enters, 0.87),
        xytext=(leaves, 2.13),
        arrowprops={"arrowstyle": "-|>", "color": _ink_of(axes), "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0},
    )
    axes.plot([leaves, leaves], [2.1, 2.9], color=_ink_of(axes), linewidth=1.4)
    axes.text(0, 3.05, f"target: {amount(clone.target_macs)} multiply-accumulates", va="bottom")
    share = clone.kept * (clone.source_macs - clone.source_cut_macs) / max(clone.source_macs, 1)
    runs = f"{share:.0%}" if share >= 0.005 else "less than 1%"
    axes.text(0, -0.05, f"source: {amount(clone.source_macs)}; the clone runs {runs} of it", va="top")
    if clone.adapter_macs:
        axes.barh(-1.2, clone.adapter_macs / longest, height=0.35, left=0, color=ORANGE, align="center", alpha=0.6)
        axes.text(0, -1.55, f"adapter between them: {amount(clone.adapter_macs)}", va="top")


def networks_height(clone: ClonePicture) -> float:
    """Height of the picture of `draw_networks`, in inches."""
    return 2.6 if clone.adapter_macs else 2.0


def draw_front(axes: Any, clone: ClonePicture) -> None:
    """Draw accuracy against cost of the candidates that a clone was chosen from."""
    costs, scores, chosen = zip(*clone.front, strict=True)
    axes.plot(costs, scores, "o-", color=BLUE, label="candidates", markersize=5)
    own = [(cost, score) for cost, score, this in zip(costs, scores, chosen, strict=True) if this]
    axes.plot(*zip(*own, strict=True), "o", color=ORANGE, label="chosen", markersize=9)
    axes.set(xlabel="added MACs, share of the source's", ylabel="held-out accuracy")
    axes.set_xlim(left=0)
    axes.grid()
    axes.legend()


def draw_trade(axes: Any, curve: tuple[tuple[float, float], ...], now: tuple[float, float]) -> None:
    """Draw leak against accuracy on new classes for shifts of the new logits."""
    axes.plot(*zip(*curve, strict=True), "-", color=BLUE, label="new logits shifted")
    axes.plot(*now, "o", color=ORANGE, label="no shift", markersize=9)
    axes.set(xlabel="accuracy on new classes", ylabel="leak of base classes")
    axes.grid()
    axes.legend(loc="upper left")


def draw_reliability(axes: Any, reliabilities: tuple[Reliability, ...]) -> None:
    """Draw accuracy against confidence."""
    axes.plot([0, 1], [0, 1], "--", color=_ink_of(axes), alpha=0.4, linewidth=1)
    for one, colour in zip(reliabilities, (BLUE, ORANGE), strict=True):
        axes.plot(*zip(*one.points, strict=True), "o-", color=colour, label=one.whose, markersize=5)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(-0.03, 1.03), ylim=(-0.05, 1.3))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid()
    axes.legend(loc="upper left")


def amount(number: float) -> str:
    """Abbreviate a large number.

    >>> amount(40_813_184), amount(512), amount(4_600_000_000)
    ('40.8 M', '512', '4.6 G')
    """
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _ink_of(axes: Any) -> str:
    return str(axes.xaxis.label.get_color())


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
