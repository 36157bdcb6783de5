"""The `pnc` command. Every command has `--json PATH` for the facts that it shows, and exits with 2 on wrong input."""

import contextlib
import importlib.metadata
import io
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from pnc.bench import demo as demonstration
from pnc.cli.arguments import (
    check_outputs,
    use_threads,
)
from pnc.cli.bench_commands import bench
from pnc.cli.calibrate_command import calibrate_clones
from pnc.cli.clone_commands import evaluate_clones, inspect_clone, predict_images, verify_clone
from pnc.cli.examples import examples
from pnc.cli.export_command import export_clones
from pnc.cli.making_commands import clone_classes, scan_positions
from pnc.cli.network_commands import list_cuts, pretrain_network
from pnc.cli.option_names import Commands
from pnc.cli.options import (
    Json,
    Seed,
    write_json,
)
from pnc.cli.output import (
    be_quiet,
    complain,
    log_to_standard_error,
    only_json,
    progress,
    say,
    show_job,
    warn,
)
from pnc.cli.report_command import report_clones
from pnc.cli.said_once import COMMANDS, read_defaults
from pnc.cli.serve_command import serve_clones
from pnc.cli.zoo_commands import zoo_commands
from pnc.foundation.argument_checks import MAX_THREADS
from pnc.foundation.errors import PNCError, PNCWarning

_HELP = "Partial network cloning: give a trained classifier classes of another one, without changing a bit of it."
BAD_INPUT, INTERRUPTED = 2, 130
_USAGE_ERROR: Any = typer.BadParameter.__base__  # from click or typer, depending on typer's version

app = typer.Typer(
    cls=Commands,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=_HELP,
)

app.add_typer(bench, name="bench")
app.add_typer(zoo_commands, name="zoo")


@app.callback(invoke_without_command=True, help=_HELP)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show errors only; --json still writes the facts.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say on standard error what is done.")] = False,
) -> None:
    """Show the version, or the help if there is no command; read what `pnc.toml` says for all commands."""
    if version:
        say(f"pnc {importlib.metadata.version('pnc')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        with contextlib.redirect_stdout(sys.stderr):
            typer.echo(context.get_help())  # typer draws the help itself, and returns nothing
        raise typer.Exit(BAD_INPUT)
    be_quiet(quiet)
    log_to_standard_error(verbose)
    if context.invoked_subcommand in COMMANDS:
        context.default_map = read_defaults(context.command.commands)  # type: ignore[attr-defined] # it is a group


@app.command(epilog=examples("demo"))
def demo(
    seed: Seed = 0,
    threads: Annotated[int, typer.Option(help="Threads for torch.", min=1, max=MAX_THREADS)] = 1,
    report: Annotated[Path | None, typer.Option(help="Write a report on the clone here, as an HTML page.")] = None,
    json_path: Json = None,
) -> None:
    """Clone digits 5-9 into a network that knows 0-4.

    Trains both networks first, and compares the clone with three other methods. With networks this small, more than one
    thread only costs time.
    """
    check_outputs({"report": report, "json": json_path})
    with use_threads(threads), progress() as bar:
        facts = demonstration.run_demo(
            seed,
            report=report,
            progress=bar.step,
            trained=lambda role, report: bar.step(f"training the {role}", report.epoch, report.epochs),
        )
    write_json(json_path, facts)
    say("A target that knows digits 0-4 gets 5-9 from a source,")
    say("with 20 images of each new digit and 5 of each old one.")
    say()
    show_job(facts)
    if report is not None:
        say(f"A report on the clone, for your browser: {report}")
    if not all(facts["verified"].values()):
        raise typer.Exit(1)


app.command("pretrain", epilog=examples("pretrain"))(pretrain_network)


app.command("clone", epilog=examples("clone"))(clone_classes)
app.command("scan", epilog=examples("scan"))(scan_positions)
app.command("eval", epilog=examples("eval"))(evaluate_clones)
app.command("predict", epilog=examples("predict"))(predict_images)
app.command("calibrate", epilog=examples("calibrate"))(calibrate_clones)
app.command("report", epilog=examples("report"))(report_clones)
app.command("serve", epilog=examples("serve"))(serve_clones)
app.command("inspect", epilog=examples("inspect"))(inspect_clone)
app.command("verify", epilog=examples("verify"))(verify_clone)
app.command("export", epilog=examples("export"))(export_clones)
app.command("cuts", epilog=examples("cuts"))(list_cuts)


def main() -> None:
    """Run the command line; wrong input gives one line on standard error and exit code 2."""
    only_json(None)
    be_quiet(False)
    log_to_standard_error(False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # do not fail on a name that the terminal cannot show
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = app(standalone_mode=False)
        if sys.stdout is not None:  # None: standard output was closed from the start
            sys.stdout.flush()
    except PNCError as error:
        complain(str(error))
        sys.exit(BAD_INPUT)
    except _USAGE_ERROR as error:
        complain(f"{error.format_message()} (pnc COMMAND --help lists the options)")
        sys.exit(BAD_INPUT)
    except OSError as error:  # such as a full disk
        complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ', while writing'}")
        _drop_output()
        sys.exit(BAD_INPUT)
    except typer.Abort:
        code = INTERRUPTED
    if code == INTERRUPTED:
        complain("stopped")
    sys.exit(code)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Write a `PNCWarning` as one line, and other warnings as Python does."""
    if issubclass(category, PNCWarning):
        warn(f"warning: {message}")
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def _drop_output() -> None:
    """Discard unwritten output: Python would try to write it again at exit, and fail again."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
