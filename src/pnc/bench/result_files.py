"""Result files: the command, environment and commit, the rows, and whether each claim holds."""

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch

from pnc.bench.clock_and_memory import CPU
from pnc.foundation.errors import FileFormatError, InputError
from pnc.foundation.file_writing import write_file
from pnc.foundation.tensor_files import canonical_json


@dataclass(frozen=True)
class Claim:
    """A required figure, and its measured value.

    Attributes:
        claim: What is claimed, in words.
        must: The required bound.
        value: What was measured.
        holds: Whether it holds; failed claims stay in the file.
        spread: Half the range over seeds, if there are several.
    """

    claim: str
    must: str
    value: float | bool
    holds: bool
    spread: float | None = None


def at_least(claim: str, bound: float, value: float) -> Claim:
    """A claim that `value` is at least `bound`."""
    return Claim(claim, f">= {bound:g}", value, value >= bound)


def at_most(claim: str, bound: float, value: float) -> Claim:
    """A claim that `value` is at most `bound`."""
    return Claim(claim, f"<= {bound:g}", value, value <= bound)


def over_seeds(claim: str, relation: Literal[">=", "<="], bound: float, values: Sequence[float]) -> Claim:
    """A claim over several seeds: the mean is at least `bound`, or every value is at most `bound`."""
    mean, spread = fmean(values), (max(values) - min(values)) / 2
    holds = mean >= bound if relation == ">=" else max(values) <= bound
    return Claim(claim, f"{relation} {bound:g}", mean, holds, spread)


def environment(device: torch.device = CPU) -> dict[str, Any]:
    """Versions, threads and the name of the device: what numbers depend on apart from the code."""
    versions = {name: importlib.metadata.version(name) for name in ("pnc", "torch", "numpy", "safetensors")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"python": platform.python_version(), **versions, "threads": torch.get_num_threads(), "device": name}


def commit() -> str | None:
    """The commit of the running code, with "+" appended if files differ; None outside its own checkout."""
    here = Path(__file__)
    if not _git(here.parent, "ls-files", here.name):  # installed, perhaps within another project's checkout
        return None
    return _git(here.parent, "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+")


def _git(folder: Path, *words: str) -> str | None:
    try:
        found = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return found.stdout.strip() or None


class Cells:
    """Rows of a long bench on disk, one JSON line each, so that a stopped bench can continue.

    The first line holds the settings. An incomplete last line is dropped.

    Args:
        path: The file; created if it is missing.
        settings: Whatever the rows depend on, as JSON values.
        keys: Fields that name a row.

    Raises:
        InputError: the file holds rows of other settings.
        FileFormatError: the file holds something else.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], keys: Sequence[str]) -> None:
        self._path, self._keys = path, tuple(keys)
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        try:
            whole = path.read_bytes().decode().rpartition("\n")[0] if path.is_file() else ""
            lines = whole.splitlines() or [canonical_json({"settings": settings})]
            first, *rows = [json.loads(line) for line in lines]
            known = first["settings"]
            self._rows = {self._key(row): row for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(f"{path} holds no rows of a bench; move it away, or write elsewhere") from error
        if known != json.loads(canonical_json(settings)):
            raise InputError(f"{path} holds rows of other settings ({known}); move it away, or write elsewhere")
        write_file(path, "\n".join(lines) + "\n")

    def __contains__(self, cell: Mapping[str, Any]) -> bool:
        return self._key(cell) in self._rows

    def __getitem__(self, cell: Mapping[str, Any]) -> dict[str, Any]:
        return self._rows[self._key(cell)]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, in the order in which they were added."""
        return list(self._rows.values())

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, in memory and on disk."""
        self._rows[self._key(row)] = row
        with self._path.open("a") as file:
            file.write(canonical_json(row) + "\n")

    def _key(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[key] for key in self._keys)


def write_results(
    folder: Path,
    name: str,
    command: str,
    facts: Mapping[str, Any],
    claims: Sequence[Claim],
    markdown: str,
    device: torch.device = CPU,
) -> None:
    """Write `name.json` and `name.md` into `folder`.

    Args:
        folder: An existing folder.
        name: Of the bench.
        command: The command that anyone can run to repeat it.
        facts: What was measured, including `rows`.
        claims: Computed from the rows.
        markdown: The rows as tables, with explanations.
        device: Where it was measured.
    Raises:
        InputError: the folder is missing or cannot be written to.
    """
    made_by, settings = commit(), environment(device)
    where = {"command": command, "commit": made_by, "environment": settings}
    whole = {**where, **facts, "claims": [asdict(claim) for claim in claims]}
    write_file(folder / f"{name}.json", json.dumps(whole, indent=2) + "\n")
    listed = ", ".join(f"{key} {value}" for key, value in settings.items())
    lines = [f"`{command}`, commit {made_by}; {listed}.", "", markdown.strip(), ""]
    if claims:
        lines += ["| claim | must be | measured | holds |", "|---|---|---|---|"]
        lines += [f"| {c.claim} | {c.must} | {_number(c.value)} | {'yes' if c.holds else '**no**'} |" for c in claims]
    write_file(folder / f"{name}.md", "\n".join(lines).rstrip() + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers are rounded to three digits."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(_number(cell) for cell in row) + " |" for row in rows])


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{value:.3f}" if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.2g}"
