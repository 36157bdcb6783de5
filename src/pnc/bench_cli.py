"""The `pnc bench` commands: measurements that anyone can run again, each with its results as JSON and Markdown."""

import typer

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure, and write what was measured as JSON and Markdown; a stopped bench goes on where it was.",
)


@bench.callback()
def start() -> None:
    """Measure, and write what was measured as JSON and Markdown; a stopped bench goes on where it was."""
