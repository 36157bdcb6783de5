"""Tally of claims: how many of the required figures hold, file by file, and which do not."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pnc.bench.result_files import table
from pnc.foundation.errors import FileFormatError, InputError


@dataclass(frozen=True)
class Tally:
    """The claims of one result file.

    Attributes:
        name: Of the file, without its suffix.
        n_claims: Number of claims.
        failing: The claims that do not hold, as in the file.
    """

    name: str
    n_claims: int
    failing: tuple[Mapping[str, Any], ...]


def read_claims(folder: Path) -> list[Tally]:
    """Read the claims of all result files in a folder, sorted by file name; files without claims are left out.

    Raises:
        InputError: no file in the folder has claims.
        FileFormatError: a file is not a result file.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            claims = json.loads(path.read_text()).get("claims", [])
            failing = tuple(claim for claim in claims if not claim["holds"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(f"{path} is not a result file of a bench; move it away") from error
        if claims:
            found.append(Tally(path.stem, len(claims), failing))
    if not found:
        raise InputError(f"folder: no result file in {folder} has claims; run a bench first, or name another folder")
    return found


def markdown(tallies: Sequence[Tally]) -> str:
    """The tally as a table, then every claim that does not hold."""
    n_claims, n_failing = sum(one.n_claims for one in tallies), sum(len(one.failing) for one in tallies)
    rows = [[f"[{one.name}]({one.name}.md)", one.n_claims, len(one.failing)] for one in tallies]
    lines = [
        f"Of {n_claims} claims {n_failing} do not hold.",
        "",
        table(("results", "claims", "do not hold"), rows),
    ]
    for one in tallies:
        if one.failing:
            failing = [[claim["claim"], claim["must"], claim["value"]] for claim in one.failing]
            lines += ["", f"### {one.name}", "", table(("claim", "must be", "measured"), failing)]
    return "\n".join(lines) + "\n"
