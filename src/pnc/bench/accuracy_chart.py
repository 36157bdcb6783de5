"""The bar chart of the README: accuracy against added cost, from the results of two benches, as SVG."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from pnc.foundation.errors import FileFormatError

Row = Mapping[str, Any]

_REGIME = {"data": "CIFAR-10 (JPEG)", "support": "100/20", "group": "all"}
_PAIR = "zoo:resnet20 "
"""How the specs of both networks begin, in the rows of the comparison."""

_CLONED = {
    "pair": "CIFAR-10 (JPEG), ResNet-20s",
    "support": _REGIME["support"],
    "classes": "dog+frog+horse+ship+truck",
}
"""The same in the rows of `pnc bench part`."""
_PARTS = {"whole": "clone, the whole source", "0.5 weights": "clone, half of it", "0.3 weights": "clone, .3 of it"}
_RIVALS = {
    "stacked features of both networks": "stacked features of both networks",
    "fine-tuning with replay (head)": "fine-tuning the head, with replay",
    "LwF": "LwF",
    "fine-tuning with replay": "fine-tuning all, with replay",
}

_WIDTH, _TOP, _STEP, _HEIGHT = 760, 58, 34, 20
_BARS, _SCALE, _COSTS, _COST_SCALE = 256, 280, 616, 90
_STYLE = (
    "text{fill:#1d2733;font-size:14px}.small{font-size:12px;fill:#4b5a6a}.end{text-anchor:end}.b{font-weight:600}"
    ".clone{fill:#3a8a55}.rival{fill:#8a97a6}.cost{fill:#b7791f}line{stroke:#c3ccd5}"
    "@media (prefers-color-scheme:dark){text{fill:#e8eef5}.small{fill:#a9b7c6}.clone{fill:#6cc48a}.rival{fill:#7b8794}"
    ".cost{fill:#e0ac55}line{stroke:#47525e}}"
)


@dataclass(frozen=True)
class Bar:
    """One method: its mean accuracy over base and new classes, and what it adds, as a share of the source's MACs."""

    label: str
    accuracy: float
    added: float
    is_clone: bool


def read_bars(compare: Path, part: Path) -> list[Bar]:
    """Read the bars, clones first.

    Args:
        compare: Results of `pnc bench compare-report`.
        part: Results of `pnc bench part`.
    Raises:
        FileFormatError: a file is missing, is no result file, or has no row for a bar.
    """
    rivals = _rows(compare, lambda row: all(row[key] == value for key, value in _REGIME.items()))
    rivals = [row for row in rivals if row["target"].startswith(_PAIR) and row["source"].startswith(_PAIR)]
    parts = _rows(part, lambda row: all(row[key] == value for key, value in _CLONED.items()))
    found = [_bar(part, parts, "form", form, label, ("average", "macs_share"), True) for form, label in _PARTS.items()]
    keys = "average_accuracy", "added_macs_share"
    return [*found, *(_bar(compare, rivals, "method", one, label, keys, False) for one, label in _RIVALS.items())]


def _rows(path: Path, wanted: Callable[[Row], bool]) -> list[Row]:
    try:
        rows: list[Row] = [row for row in json.loads(path.read_text())["rows"] if wanted(row)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{path} is not a result file of the bench; run it first, or name another file"
        ) from error
    return rows


def _bar(path: Path, rows: Sequence[Row], key: str, name: str, label: str, keys: Sequence[str], is_clone: bool) -> Bar:
    own = [row for row in rows if row[key] == name]
    if not own:
        raise FileFormatError(
            f"{path} has no row for {name!r} on {_REGIME['data']}, {_REGIME['support']}; run its bench"
        )
    accuracy, added = (statistics.fmean(row[one] for row in own) for one in keys)
    return Bar(label, accuracy, max(added, 0.0), is_clone)


def chart(bars: Sequence[Bar]) -> str:
    """Draw the bars as SVG: accuracy to the left, added cost to the right."""
    height = _TOP + _STEP * len(bars) + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'font-family="system-ui, -apple-system, \'Segoe UI\', sans-serif" role="img" aria-labelledby="t d">',
        '<title id="t">Accuracy against added cost</title>',
        f'<desc id="d">{escape("; ".join(_words(bar) for bar in bars))}.</desc>',
        f"<style>{_STYLE}</style>",
        f'<text class="b" x="{_BARS}" y="22">accuracy, mean of old and new classes</text>',
        f'<text class="b" x="{_COSTS}" y="22">added cost</text>',
        f'<text class="small" x="{_COSTS}" y="40">MACs, of the source</text>',
    ]
    for place, bar in enumerate(bars):
        y = _TOP + _STEP * place
        kind, length, cost = ("clone" if bar.is_clone else "rival"), _SCALE * bar.accuracy, _COST_SCALE * bar.added
        lines += [
            f'<text class="end{" b" if bar.is_clone else ""}" x="{_BARS - 10}" y="{y + 15}">{escape(bar.label)}</text>',
            f'<rect class="{kind}" x="{_BARS}" y="{y}" width="{length:.1f}" height="{_HEIGHT}" rx="3"/>',
            f'<text x="{_BARS + length + 8:.1f}" y="{y + 15}">{_short(bar.accuracy)}</text>',
            f'<rect class="cost" x="{_COSTS}" y="{y}" width="{cost:.1f}" height="{_HEIGHT}" rx="3"/>',
            f'<text x="{_COSTS + cost + 6:.1f}" y="{y + 15}">{bar.added:.0%}</text>',
        ]
    bottom = _TOP + _STEP * len(bars)
    lines += [
        f'<line x1="{_BARS}" y1="{_TOP - 8}" x2="{_BARS}" y2="{bottom}"/>',
        f'<line x1="{_COSTS}" y1="{_TOP - 8}" x2="{_COSTS}" y2="{bottom}"/>',
        f'<text class="small" x="14" y="{bottom + 22}">CIFAR-10 (JPEG), two ResNet-20s with five classes each, support '
        "100/20, means of three seeds</text>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _words(bar: Bar) -> str:
    return f"{bar.label}: {_short(bar.accuracy)}, {bar.added:.0%} added"


def _short(share: float) -> str:
    return f"{share:.3f}".removeprefix("0")
