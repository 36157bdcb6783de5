"""Output of the `pnc` command: lines and plain tables on standard output, progress on standard error."""

import logging
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from pnc.cli.arguments import CloneFacts
from pnc.clones.description import clone_lines

STANDARD_OUTPUT = Path("-")
_GAP = "  "
_MAX_COMPLAINT = 2000
_only_json, _quiet = ContextVar("only_json", default=False), ContextVar("quiet", default=False)


def only_json(path: Path | None) -> Path | None:
    """Keep lines off standard output if `--json -` writes there; returns the path, as option callbacks must."""
    _only_json.set(path == STANDARD_OUTPUT)
    return path


def be_quiet(wanted: bool) -> None:
    """Keep lines, progress and warnings away, or not; errors and JSON are written either way."""
    _quiet.set(wanted)


def say(text: str = "") -> None:
    """Write one line, unless standard output is for JSON or `--quiet` is given."""
    if not (_only_json.get() or _quiet.get()):
        write_line(text)


def write_line(text: str) -> None:
    """Write a line on standard output, even if that is for JSON."""
    typer.echo(text)


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write rows in columns, numbers right-aligned; nothing is truncated, so that the output can be searched."""
    widths = [max(map(cell_len, column)) for column in zip(header, *rows, strict=True)]
    to_right = [all(_is_number(cell) for cell in column) for column in zip(*rows, strict=True)]
    for cells in (header, ["-" * width for width in widths], *rows):
        padded = [_pad(*cell) for cell in zip(cells, widths, to_right, strict=True)]
        say(_GAP.join(padded).rstrip())


def show_facts(facts: Mapping[str, str]) -> None:
    """Write names and values, one pair per line; long values are wrapped."""
    width = max(map(cell_len, facts)) + len(_GAP)
    room = max(shutil.get_terminal_size().columns - width, 20)
    for name, value in facts.items():
        first, *more = textwrap.wrap(value, room, break_long_words=False, break_on_hyphens=False) or [""]
        say(_pad(name, width, False) + first)
        for line in more:
            say(" " * width + line)


def show_job(facts: Mapping[str, Any]) -> None:
    """Show the results of `main_job.run`."""
    rows = [row for row in facts["rows"] if "not_applicable" not in row]
    show_table(
        ("method", "base", "new", "average", "cond.KL", "leak", "seconds", "bytes"),
        [
            (
                row["method"],
                *(f"{row[key]:.3f}" for key in ("base_accuracy", "new_accuracy", "average_accuracy")),
                f"{row['conditional_kl']:.2g}",
                f"{row['leak']:.3f}",
                f"{row['seconds']:.1f}",
                f"{row['bytes']:,}",
            )
            for row in rows
        ],
    )
    for row in facts["rows"]:
        if row not in rows:
            say(f"{row['method']}: {row['not_applicable']}")
    made, verified = facts["clone"], facts["verified"]
    say()
    say("base, new, average: accuracy on images of old classes, of new ones, their mean")
    say("bytes: what has to be sent to somebody who has both networks")
    say(
        f"The clone leaves the target at {made['position']['target_cut']}, enters the source at "
        f"{made['position']['source_cut']}"
    )
    say(f"and adds {made['added_macs_share']:.0%} of the source's multiply-accumulates.")
    checks = {
        "base_logits_equal": "with the clone attached, the target's own logits are the same bits",
        "reload_equal": "saved, loaded and attached again, it gives the same bits",
        "removed_equal": "with the clone removed, the composite gives the target's bits",
        "target_unchanged": "all parameters, buffers, flags and hooks of the target are as before",
    }
    for key, sentence in checks.items():
        say(f"{'verified' if verified[key] else 'FAILED'}: {sentence}")


def show_clone(facts: CloneFacts) -> None:
    """Show the facts of a clone file."""
    known = facts.all
    cuts = known["position"]["target"], known["position"]["source"]
    lines = clone_lines(known["name"], known["classes"], known["base_classes"], cuts, known["recipe"])
    needs = "needs the source to load" if known["needs_source"] else "loads without the source"
    show_facts({**lines, "file": f"{known['kind']}, {needs}, format {known['version']}, {known['n_bytes']:,} bytes"})
    if "front" in known["recipe"]:
        show_front(known["recipe"])


def show_front(recipe: Mapping[str, Any]) -> None:
    """Show the front that a clone was chosen from, cheapest first."""
    say()
    show_table(
        ("", "MACs", "density", "score", ""),
        [
            (
                ">" if abs(macs - recipe["macs_share"]) < 0.01 and made else "",
                f"{macs:.1%}",
                f"{density:g}",
                f"{score:.3f}",
                "measured" if made else "expected",
            )
            for macs, density, score, made in recipe["front"]
        ],
    )
    say(f"The front that the clone was chosen from ({recipe['prefer']}); >: this clone")


def show_scan(facts: Mapping[str, Any]) -> None:
    """Show the scanned positions, cheapest first, with the front and the choice."""
    rows = sorted(facts["positions"], key=lambda row: (row["n_macs"], row["log_loss"]))
    show_table(
        ("", "target cut", "source cut", "log-loss", "score", "MACs", "params", "bytes"),
        [
            (
                ">" if row["chosen"] else "*" if row["on_front"] else "",
                row["target_cut"],
                row["source_cut"],
                f"{row['log_loss']:.3f}",
                f"{row['score']:.3f}",
                f"{row['macs_share']:.1%}",
                f"{row['n_params']:,}",
                f"{row['n_bytes']:,}",
            )
            for row in rows
        ],
    )
    if facts["shared"]:
        say(f"Shared by both networks, and not added: {facts['shared']:.1%} of the source's MACs")
    say("log-loss, score (accuracy, mean of base and new): on held-out support")
    say("MACs: added, as a share of the source's; bytes: size of the thin file")
    say("*: on the Pareto front, no other is cheaper with a lower log-loss; >: chosen")


def shown(value: Any) -> str:
    """Format a value for people."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def complain(text: str) -> None:
    """Write one line on standard error, without the text's line breaks."""
    line = " ".join(f"pnc: {text}".split())
    typer.echo(line if len(line) <= _MAX_COMPLAINT else f"{line[:_MAX_COMPLAINT]} ...", err=True)


def warn(text: str) -> None:
    """Write a warning as one line on standard error, unless `--quiet` is given."""
    if not _quiet.get():
        complain(text)


def log_to_standard_error(wanted: bool) -> None:
    """Write what the library logs as lines on standard error, with the time, or not."""
    logger = logging.getLogger("pnc")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.handlers = [handler] if wanted else []
    logger.setLevel(logging.INFO if wanted else logging.NOTSET)


class Bar:
    """One progress line at a time, with the name of the current work."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._what = progress, ""
        self._id: TaskID | None = None

    def wait(self, what: str) -> None:
        """Show that `what` is being done, with an unknown number of steps."""
        self.step(what, 0, None)

    def step(self, what: str, done: int, total: int | None) -> None:
        """Show `done` of `total` steps of `what`."""
        if what != self._what or self._id is None:
            if self._id is not None:
                self._progress.remove_task(self._id)
            self._what, self._id = what, self._progress.add_task(escape(what), total=total)
        self._progress.update(self._id, completed=done, total=total)


class _Steps(ProgressColumn):
    """Steps done and their number; nothing if that is unknown."""

    def render(self, task: Task) -> Text:
        """Return the text of this column."""
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}")


@contextmanager
def progress(shown_here: bool = True) -> Iterator[Bar]:
    """Show progress within the block and remove it afterwards; show nothing unless standard error is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        _Steps(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    hidden = _quiet.get() or not (shown_here and sys.stderr.isatty())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as shown:
        yield Bar(shown)


def _pad(cell: str, width: int, to_right: bool) -> str:
    space = " " * (width - cell_len(cell))
    return space + cell if to_right else cell + space


def _is_number(cell: str) -> bool:
    return cell.strip("-+%").replace(",", "").replace(".", "", 1).replace("e-", "").isdecimal()
