"""A bench as a value: its rows, how they are measured, its claims and tables."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pnc.bench.clock_and_memory import CPU
from pnc.bench.result_files import Cells, Claim
from pnc.method.task import Progress

Row = Mapping[str, Any]
Rows = Sequence[Row]
Measure = Callable[[Cells, Progress | None], Rows]


@dataclass(frozen=True)
class Bench:
    """One bench, ready to run; `pnc.cli.bench_options.run_bench` runs it and writes its results.

    Attributes:
        name: Of its command.
        keys: Fields that name a row.
        settings: What rows depend on, as JSON values; a file with rows of other settings is refused.
        measure: Measures the rows that the file lacks, and returns all that are wanted; see `one_by_one`. Its second
            argument is called with the current step, the number of steps done, and their total.
        claims: Required figures, with what was measured.
        markdown: The rows as tables, with explanations.
        facts: What the JSON file holds, `rows` among it; by default the settings and the rows.
        device: Where it is measured.
    """

    name: str
    keys: tuple[str, ...]
    settings: Mapping[str, Any]
    measure: Measure
    claims: Callable[[Rows], list[Claim]]
    markdown: Callable[[Rows], str]
    facts: Callable[[Rows], Mapping[str, Any]] | None = None
    device: torch.device = CPU


def one_by_one(wanted: Rows, make: Callable[[Row], Row]) -> Measure:
    """Measure cells one after the other.

    Args:
        wanted: The cells, each with the fields that name its row.
        make: Measures one of them; returns the other fields of its row.
    """

    def measure(cells: Cells, progress: Progress | None) -> Rows:
        for done, cell in enumerate(wanted):
            if progress is not None:
                progress(", ".join(f"{key} {value}" for key, value in cell.items()), done, len(wanted))
            if cell not in cells:
                cells.add({**cell, **make(cell)})
        return [cells[cell] for cell in wanted]

    return measure
