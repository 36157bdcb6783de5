"""The `pnc bench` commands: measurements that anyone can run again, each with its results as JSON and Markdown."""

from pathlib import Path
from typing import Annotated

import typer

from pnc.arguments import check_outputs, use_threads
from pnc.bench import classifiers
from pnc.bench import coverage as coverage_bench
from pnc.bench.results import Cells, commit, write_results
from pnc.screen import progress, say

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure, and write what was measured as JSON and Markdown; a stopped bench goes on where it was.",
)


@bench.callback()
def start() -> None:
    """Measure, and write what was measured as JSON and Markdown; a stopped bench goes on where it was."""


@bench.command("coverage")
def coverage(
    models: Annotated[
        str | None, typer.Option(help="Names or patterns, separated by commas, such as timm:vit_*; all by default.")
    ] = None,
    json_path: Annotated[Path, typer.Option("--json", help="Results; the table goes beside it.")] = Path(
        "results/coverage.json"
    ),
    threads: Annotated[int, typer.Option(help="Threads for torch.", min=1)] = 1,
) -> None:
    """Record, cut, shrink, clone and export 250 classifiers of torchvision, timm and transformers.

    Takes an hour or more. Rows are kept beside the results as they come, and a stopped run goes on behind them.
    """
    names = classifiers.chosen(models)
    outputs = {suffix: json_path.with_suffix(suffix) for suffix in (".json", ".md", ".jsonl")}
    check_outputs(dict(outputs))
    with use_threads(threads), progress() as bar:
        cells = Cells(outputs[".jsonl"], {"commit": commit()}, ["model"])
        rows = coverage_bench.run(names, cells, bar.step)
        command = f"pnc bench coverage --threads {threads}" + (f" --models {models}" if models else "")
        made = coverage_bench.claims(rows), coverage_bench.markdown(rows)
        write_results(json_path.parent, json_path.stem, command, {"rows": rows}, *made)
    say(made[1])
