"""The commands that make clones, or show where they could be: clone, scan."""

import time
from pathlib import Path
from typing import Annotated

import typer

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
from pnc.cli.options import (
    BOUNDS,
    IMAGES,
    MACHINE,
    OUTPUT,
    PART,
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
from pnc.cli.output import (
    progress,
    say,
    show_clone,
    show_scan,
)
from pnc.cli.plots import check_plot, draw_scan
from pnc.clones import clone_file
from pnc.clones.clone import check_file_name, check_name
from pnc.data.image_set import ImageSet
from pnc.data.image_store import GIB, MEMORY
from pnc.data.readers import load_data
from pnc.foundation import process_team
from pnc.foundation.errors import PNCError
from pnc.method import pipeline, positions
from pnc.method.settings import Bounds, Effort, Method, Prefer, Removal, Strategy, Tune, check_effort, check_strategy
from pnc.method.task import Precision, prepare_task


def clone_classes(
    source: Source,
    target: Target,
    data: Data,
    out: Annotated[Path, typer.Option(help="Clone file to write.", rich_help_panel=OUTPUT)],
    classes: Classes = None,
    support: Support = "20/5",
    background: Annotated[
        str | None,
        typer.Option(
            help="Unlabelled images that the target is used on, in the forms of --data.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    source_weights: SourceWeights = None,
    target_weights: TargetWeights = None,
    source_classes: SourceNames = None,
    target_classes: TargetNames = None,
    flip: Flip = False,
    density: Annotated[
        str,
        typer.Option(
            help="Share of the prunable MACs to keep, above 0; auto: choose it with the position.", rich_help_panel=PART
        ),
    ] = "auto",
    method: Annotated[
        Method | None,
        typer.Option(help="How channels are chosen below density 1; by default taylor.", rich_help_panel=PART),
    ] = None,
    tune: Annotated[
        Tune | None,
        typer.Option(help="What is tuned below density 1; by default the weights of the part.", rich_help_panel=PART),
    ] = None,
    prefer: Annotated[
        Prefer,
        typer.Option(
            help="Accuracy that --density auto may give up for lower cost: none, half a point, two.",
            rich_help_panel=PART,
        ),
    ] = "balanced",
    effort: Annotated[
        Effort, typer.Option(help="minutes: tune a part by gradient; seconds: closed form only.", rich_help_panel=PART)
    ] = "minutes",
    round_to: Annotated[
        int,
        typer.Option(help="Below density 1, keep channels in multiples of this number.", min=1, rich_help_panel=PART),
    ] = 1,
    max_macs: MaxMacs = None,
    max_bytes: MaxBytes = None,
    max_base_drop: Annotated[
        float | None,
        typer.Option(help="Bound on the accuracy that base images may lose, such as 0.02.", rich_help_panel=BOUNDS),
    ] = None,
    strategy: Annotated[
        Strategy,
        typer.Option(help="scan: closed form; sequential: the paper's search, for comparison.", rich_help_panel=PART),
    ] = "scan",
    refine: Annotated[
        bool, typer.Option(help="Tune the adapter by gradient if that helps; takes minutes.", rich_help_panel=PART)
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="Name of the clone; by default made from its classes.", rich_help_panel=OUTPUT)
    ] = None,
    kind: Annotated[
        clone_file.FileKind,
        typer.Option(help="thin: needs the source to load; full: larger, loads without it.", rich_help_panel=OUTPUT),
    ] = "thin",
    memory: Memory = MEMORY / GIB,
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="Precision of the networks; by default that of `accelerate launch`.", rich_help_panel=MACHINE
        ),
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
        check_file_name(out, "out")
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


def scan_positions(
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
    plot: Annotated[
        Path | None, typer.Option(help="Plot score against cost here, as PNG.", rich_help_panel=OUTPUT)
    ] = None,
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
