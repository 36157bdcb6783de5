"""The `pnc` command. Every command has `--json PATH` for the facts that it shows, and exits with 2 on wrong input."""

import importlib.metadata
import io
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from pnc.bench import demo as demonstration
from pnc.cli.arguments import (
    ModelOptions,
    check_different,
    check_input_shape,
    check_outputs,
    check_trained,
    choose_classes,
    data_file,
    draw,
    load_network,
    parse_density,
    parse_support,
    read_clone_facts,
    read_device,
    use_threads,
)
from pnc.cli.bench_commands import bench
from pnc.cli.calibrate_command import calibrate_clones
from pnc.cli.clone_commands import evaluate_clones, inspect_clone, predict_images, verify_clone
from pnc.cli.export_command import export_clones
from pnc.cli.network_commands import list_cuts, pretrain_network
from pnc.cli.option_names import Commands
from pnc.cli.options import (
    Classes,
    Data,
    Device,
    Flip,
    Json,
    MaxBytes,
    MaxMacs,
    Memory,
    Seed,
    Source,
    SourceNames,
    SourceWeights,
    Support,
    Target,
    TargetNames,
    TargetWeights,
    Threads,
    write_json,
)
from pnc.cli.output import complain, only_json, progress, say, show_clone, show_job, show_scan
from pnc.cli.plots import check_plot, draw_scan
from pnc.cli.report_command import report_clones
from pnc.cli.serve_command import serve_clones
from pnc.cli.zoo_commands import zoo_commands
from pnc.clones import clone_file
from pnc.clones.clone import check_file_name, check_name
from pnc.data.image_set import ImageSet
from pnc.data.image_store import GIB, MEMORY
from pnc.data.readers import load_data
from pnc.foundation import process_team
from pnc.foundation.argument_checks import MAX_THREADS
from pnc.foundation.errors import PNCError, PNCWarning
from pnc.method import pipeline, positions
from pnc.method.settings import Bounds, Effort, Method, Prefer, Removal, Strategy, Tune, check_effort, check_strategy
from pnc.method.task import Precision, prepare_task

_HELP = "Partial network cloning: give a trained classifier classes of another one, without changing a bit of it."
BAD_INPUT, INTERRUPTED = 2, 130
_USAGE_ERROR: Any = typer.BadParameter.__base__  # from click or typer, depending on typer's version

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=_HELP,
)

app.add_typer(bench, name="bench")
app.add_typer(zoo_commands, name="zoo")


@app.callback(invoke_without_command=True, help=_HELP)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Show the version, or the help if there is no command."""
    if version:
        say(f"pnc {importlib.metadata.version('pnc')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(BAD_INPUT)


@app.command()
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


app.command("pretrain")(pretrain_network)


@app.command()
def clone(
    source: Source,
    target: Target,
    data: Data,
    out: Annotated[Path, typer.Option(help="Clone file to write.")],
    classes: Classes = None,
    support: Support = "20/5",
    background: Annotated[
        str | None, typer.Option(help="Unlabelled images that the target is used on, in the forms of --data.")
    ] = None,
    source_weights: SourceWeights = None,
    target_weights: TargetWeights = None,
    source_classes: SourceNames = None,
    target_classes: TargetNames = None,
    flip: Flip = False,
    density: Annotated[
        str, typer.Option(help="Share of the prunable MACs to keep, above 0; auto: choose it with the position.")
    ] = "auto",
    method: Annotated[
        Method | None, typer.Option(help="How channels are chosen below density 1; by default taylor.")
    ] = None,
    tune: Annotated[
        Tune | None, typer.Option(help="What is tuned below density 1; by default the weights of the part.")
    ] = None,
    prefer: Annotated[
        Prefer, typer.Option(help="Accuracy that --density auto may give up for lower cost: none, half a point, two.")
    ] = "balanced",
    effort: Annotated[
        Effort, typer.Option(help="minutes: tune a part by gradient; seconds: closed form only.")
    ] = "minutes",
    round_to: Annotated[
        int, typer.Option(help="Below density 1, keep channels in multiples of this number.", min=1)
    ] = 1,
    max_macs: MaxMacs = None,
    max_bytes: MaxBytes = None,
    max_base_drop: Annotated[
        float | None, typer.Option(help="Bound on the accuracy that base images may lose, such as 0.02.")
    ] = None,
    strategy: Annotated[
        Strategy, typer.Option(help="scan: closed form; sequential: the paper's search, for comparison.")
    ] = "scan",
    refine: Annotated[bool, typer.Option(help="Tune the adapter by gradient if that helps; takes minutes.")] = False,
    name: Annotated[str | None, typer.Option(help="Name of the clone; by default made from its classes.")] = None,
    kind: Annotated[
        clone_file.FileKind, typer.Option(help="thin: needs the source to load; full: larger, loads without it.")
    ] = "thin",
    memory: Memory = MEMORY / GIB,
    precision: Annotated[
        Precision | None, typer.Option(help="Precision of the networks; by default that of `accelerate launch`.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    json_path: Json = None,
) -> None:
    """Clone classes of a source for a target; write a file.

    Scans positions in closed form on a few images of the training split, cuts out the part that is worth its cost, and
    tunes it; neither network changes. A stopped run continues from OUT.partial.safetensors. With
    `accelerate launch -m pnc clone ...` or `torchrun -m pnc clone ...` several processes share the work.
    """
    with process_team.joined(read_device(device)) as (team, own_device), use_threads(threads):
        asked = (
            ModelOptions("source", source, source_weights, source_classes, str(own_device)),
            ModelOptions("target", target, target_weights, target_classes, str(own_device)),
        )
        data_files = [data_file(spec) for spec in (data, background) if spec is not None]
        check_outputs({"out": out, "json": json_path}, [*(one.file for one in asked), *data_files])
        check_different(*asked)
        check_trained(*asked)
        parse_support(support)
        wanted_density = parse_density(density)
        removal, bounds = Removal(wanted_density, method, round_to, tune), Bounds(max_macs, max_bytes, max_base_drop)
        check_strategy(strategy, bounds, refine)
        check_effort(effort, prefer, removal, refine, strategy)
        check_name(name)
        check_file_name(out)
        images = load_data(data, "train")
        unlabelled = None if background is None else _background_images(background)
        models = [load_network(one, input_shape=images.input_shape) for one in asked]
        check_input_shape(images, *models)
        new, base = choose_classes(classes, *models), models[1].classes
        started = time.perf_counter()
        with progress(team.is_main) as bar:
            made = pipeline.clone(
                models[0].module,
                models[1].module,
                draw(images, new, base, support, seed),
                classes=new,
                source_classes=models[0].classes,
                base_classes=base,
                background=unlabelled,
                name=name,
                density=wanted_density,
                method=method,
                tune=tune,
                prefer=prefer,
                effort=effort,
                round_to=round_to,
                max_macs=max_macs,
                max_bytes=max_bytes,
                max_base_drop=max_base_drop,
                strategy=strategy,
                refine=refine,
                flip=flip,
                seed=seed,
                memory=round(memory * GIB),
                team=team,
                precision=precision or process_team.launched_precision(),
                resume=out.with_name(out.name + ".partial.safetensors"),
                progress=bar.step,
            )
        seconds = time.perf_counter() - started
        if not team.is_main:
            return
    clone_file.save(made, out, kind)
    facts = read_clone_facts(out)
    write_json(json_path, {"out": str(out), "seconds": seconds, **facts.all})
    show_clone(facts)
    say(f"{out}: written after {seconds:.1f} s of cloning")


def _background_images(spec: str) -> ImageSet:
    """Load unlabelled images; errors name their own option."""
    try:
        return load_data(spec, "train")
    except PNCError as error:
        raise type(error)(f"background: {str(error).partition(': ')[2] or error}") from error


@app.command()
def scan(
    source: Source,
    target: Target,
    data: Data,
    classes: Classes = None,
    support: Support = "20/5",
    source_weights: SourceWeights = None,
    target_weights: TargetWeights = None,
    source_classes: SourceNames = None,
    target_classes: TargetNames = None,
    flip: Flip = False,
    max_cuts: Annotated[int, typer.Option(help="Cuts to try in each network.", min=2)] = positions.MAX_CUTS,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Score every pair of cuts: takes longer.")] = False,
    max_macs: MaxMacs = None,
    max_bytes: MaxBytes = None,
    plot: Annotated[Path | None, typer.Option(help="Plot score against cost here, as PNG.")] = None,
    memory: Memory = MEMORY / GIB,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    json_path: Json = None,
) -> None:
    """Show where a clone could leave the target and enter the source, with score and cost of each position."""
    asked = (
        ModelOptions("source", source, source_weights, source_classes, device),
        ModelOptions("target", target, target_weights, target_classes, device),
    )
    check_outputs({"plot": plot, "json": json_path}, [*(one.file for one in asked), data_file(data)])
    Bounds(max_macs, max_bytes)
    if plot is not None:
        check_plot(plot)
    check_different(*asked)
    check_trained(*asked)
    parse_support(support)
    read_device(device)
    images = load_data(data, "train")
    models = [load_network(one, input_shape=images.input_shape) for one in asked]
    check_input_shape(images, *models)
    new, base = choose_classes(classes, *models), models[1].classes
    with use_threads(threads), progress() as bar:
        task = prepare_task(
            models[0].module,
            models[1].module,
            draw(images, new, base, support, seed),
            classes=new,
            source_classes=models[0].classes,
            base_classes=base,
            flip=flip,
            seed=seed,
            memory=round(memory * GIB),
        )
        found = positions.scan(task, max_cuts=max_cuts, exhaustive=exhaustive, progress=bar.step)
    chosen = found.choose(max_macs, max_bytes)
    facts = {"positions": found.facts(chosen), "n_pairs": len(found.adapter_errors), "shared": found.shared}
    write_json(json_path, facts)
    if plot is not None:
        draw_scan(found, chosen, plot)
    show_scan(facts)


app.command("eval")(evaluate_clones)
app.command("predict")(predict_images)
app.command("calibrate")(calibrate_clones)
app.command("report")(report_clones)
app.command("serve")(serve_clones)
app.command("inspect")(inspect_clone)
app.command("verify")(verify_clone)
app.command("export")(export_clones)
app.command("cuts")(list_cuts)


def main() -> None:
    """Run the command line; wrong input gives one line on standard error and exit code 2."""
    only_json(None)
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
        complain(f"warning: {message}")
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def _drop_output() -> None:
    """Discard unwritten output: Python would try to write it again at exit, and fail again."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
