"""The `pnc bench` commands: measurements that anyone can repeat, each with its results as JSON and Markdown."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pnc.bench import (
    channel_methods,
    coverage,
    few_images,
    file_attacks,
    latency,
    library_classifiers,
    lifecycle,
    part,
    position_strategies,
    scale,
    serve,
    serve_report,
    speed,
)
from pnc.bench.bench import Bench
from pnc.cli.arguments import check_outputs, read_device
from pnc.cli.bench_options import (
    DataName,
    Mirror,
    NTest,
    OneThread,
    OutFile,
    OutFolder,
    PairOptions,
    Seeds,
    Sizes,
    SourceFile,
    TargetFile,
    run_bench,
)
from pnc.cli.compare_commands import draw_chart, measure_comparison, report_comparison, tally_claims
from pnc.cli.export_command import measure_exports
from pnc.cli.option_names import Commands
from pnc.cli.options import Classes, Data, Device
from pnc.cli.photo_commands import measure_cifar10, measure_tiny_imagenet
from pnc.cli.plots import check_plot, draw_growth
from pnc.cli.rival_benches import measure_backbone, measure_corruptions
from pnc.cli.zoo_bench_command import measure_zoo
from pnc.foundation.class_names import listed, parse_classes
from pnc.foundation.errors import InputError

_HELP = "Measure, and write the results as JSON and Markdown; a stopped bench continues where it stopped."

bench = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode=None, help=_HELP)


@bench.callback(help=_HELP)
def start() -> None:
    """Group the commands under `pnc bench`."""


@bench.command("coverage")
def measure_coverage(
    context: typer.Context,
    models: Annotated[
        str | None, typer.Option(help="Names or patterns, separated by commas, such as timm:vit_*; all by default.")
    ] = None,
    json_path: OutFile = Path("results/coverage.json"),
    again: Annotated[bool, typer.Option("--again", help="Measure time and memory of the existing rows again.")] = False,
    threads: OneThread = 1,
) -> None:
    """Record, cut, shrink, clone and export some 200 classifiers of torchvision, timm and transformers.

    Takes about an hour. Rows are written as they are measured; a stopped run continues after the last one.
    """
    names = library_classifiers.chosen(models)
    run_bench(context, lambda: coverage.bench(names, again), json_path, threads)


@bench.command("positions")
def measure_positions(
    context: typer.Context,
    source: SourceFile,
    target: TargetFile,
    data: Data,
    support: Sizes = "100/20",
    flip: Mirror = True,
    seeds: Seeds = 3,
    data_name: DataName = None,
    out: OutFolder = Path("results"),
    threads: OneThread = 1,
) -> None:
    """Compare ways to find a position: closed form within bounds, density, refinement, the paper's search.

    Takes a few minutes for each seed; existing rows are not measured again.
    """
    pair = PairOptions(source, target, data, support, flip, data_name)
    run_bench(
        context,
        lambda: position_strategies.bench(pair.load(), range(seeds)),
        out / "positions.json",
        threads,
        pair.files,
    )


@bench.command("localize")
def measure_localization(
    context: typer.Context,
    source: SourceFile,
    target: TargetFile,
    data: Data,
    some: Annotated[str, typer.Option(help="Classes of a second table, without the source's other classes.")],
    support: Sizes = "100/20",
    flip: Mirror = True,
    seeds: Seeds = 3,
    n_test: NTest = None,
    data_name: DataName = None,
    out: OutFolder = Path("results"),
    threads: OneThread = 1,
) -> None:
    """Compare ways to choose channels, at two densities: learned, one-shot, and the paper's.

    Takes about ten minutes for each seed; existing rows are not measured again.
    """
    pair = PairOptions(source, target, data, support, flip, data_name, n_test)

    def make() -> Bench:
        setting = pair.load()
        groups = [setting.new_classes, parse_classes(some, setting.source.classes)]
        return channel_methods.bench(setting, groups, range(seeds))

    run_bench(context, make, out / "localize.json", threads, pair.files)


@bench.command("part")
def measure_parts(
    context: typer.Context,
    source: SourceFile,
    target: TargetFile,
    data: Data,
    pair: Annotated[str, typer.Option(help="Name of the two networks in the results.")],
    forms: Annotated[
        str,
        typer.Option(help="Clones to make: whole, default, seconds, small, or such as '0.5 weights'."),
    ] = "whole,0.5 weights,0.3 weights,0.15 weights,default,seconds",
    some: Classes = None,
    support: Sizes = "100/20",
    unlabelled: Annotated[
        int, typer.Option(help="More images of each base class, without labels, to clone with.", min=0)
    ] = 0,
    flip: Mirror = True,
    seeds: Seeds = 3,
    data_name: DataName = None,
    out: OutFolder = Path("results"),
    threads: OneThread = 1,
) -> None:
    """Compare parts with whole sources: what a clone loses and saves at each density, and by default.

    Takes a minute or two for each row; rows of all pairs are in one part.jsonl, and are not measured again.
    """
    options = PairOptions(source, target, data, support, flip, data_name, n_unlabelled=unlabelled)
    wanted = part.parse_forms(forms)

    def make() -> Bench:
        setting = options.load()
        classes = setting.new_classes if some is None else parse_classes(some, setting.source.classes)
        return part.bench(pair, setting, classes, wanted, range(seeds))

    run_bench(context, make, out / "part.json", threads, options.files)


@bench.command("few")
def measure_few_images(
    context: typer.Context,
    source: Annotated[list[str], typer.Option("--source", help="Files of the sources, one for each pair.")],
    target: Annotated[list[str], typer.Option("--target", help="Files of the targets, in the same order.")],
    data: Annotated[list[str], typer.Option("--data", help="Images of each pair.")],
    data_name: Annotated[list[str] | None, typer.Option("--data-name", help="Their names in the results.")] = None,
    flip: Mirror = False,
    seeds: Seeds = 10,
    n_test: Annotated[int, typer.Option("--n-test", help="Test images per class, the first ones.", min=1)] = 200,
    out: OutFolder = Path("results"),
    threads: OneThread = 1,
) -> None:
    """Compare clones from one, two and five images per class with ensembles of both whole networks.

    Takes a few minutes for each pair; existing rows are not measured again.
    """
    names = data_name or data
    if not len(source) == len(target) == len(data) == len(names):
        raise InputError("data: give --source, --target, --data and --data-name equally often, once for each pair")
    pairs = {
        name: PairOptions(own_source, own_target, own_data, "1/1", flip, name, n_test)
        for name, own_source, own_target, own_data in zip(names, source, target, data, strict=True)
    }
    facts = {"pairs": {name: [one.source, one.target] for name, one in pairs.items()}, "flip": flip, "n_test": n_test}

    def make() -> Bench:
        return few_images.bench({name: one.load() for name, one in pairs.items()}, range(seeds), facts)

    run_bench(context, make, out / "few.json", threads, [file for one in pairs.values() for file in one.files])


@bench.command("files")
def attack_files(
    context: typer.Context,
    files: Annotated[int, typer.Option(help="Number of damaged files to read.", min=1)] = 20_000,
    kills: Annotated[int, typer.Option(help="Number of processes to kill while they save.", min=0)] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the damage and the moments of killing.", min=0)] = 0,
    out: OutFolder = Path("results"),
) -> None:
    """Read clone files that are damaged in every way, and kill processes while they save.

    Takes a few minutes; existing chunks are not measured again.
    """
    run_bench(context, lambda: file_attacks.bench(files, kills, seed), out / "files.json", threads=1)


@bench.command("lifecycle")
def measure_lifecycle(
    context: typer.Context,
    source: Annotated[list[str], typer.Option(help="File of `pnc pretrain`; give two that know the same classes.")],
    target: TargetFile,
    data: Data,
    support: Sizes = "100/20",
    flip: Mirror = True,
    seeds: Seeds = 3,
    n_test: NTest = None,
    keep: Annotated[Path | None, typer.Option(help="Folder in which clones are kept for the next run.")] = None,
    n_sequences: Annotated[int, typer.Option("--sequences", help="Random sequences of operations.", min=0)] = 1000,
    data_name: DataName = None,
    json_path: OutFile = Path("results/lifecycle.json"),
    threads: OneThread = 1,
) -> None:
    """Test many clones in one target: random sequences of operations, bit for bit, and the gain by calibration.

    Takes a few minutes for each seed and for the sequences; existing rows are not measured again.
    """
    if keep is not None:
        check_outputs({"keep": keep / "clone.safetensors"})
    if len(source) != 2:
        raise InputError(f"source: give two networks that know the same new classes; got {len(source)}")
    pairs = [PairOptions(one, target, data, support, flip, data_name, n_test) for one in source]

    def make() -> Bench:
        first, second = pairs[0].load(), replace(pairs[1], n_test=1).load().source
        if first.source.classes != second.classes:
            raise InputError(
                f"source: both must know the same classes; {source[0]} knows {listed(first.source.classes)}, "
                f"{source[1]} knows {listed(second.classes)}"
            )
        setting = replace(first, given={"sources": source, "target": target})
        return lifecycle.bench(lifecycle.CloneMaker(setting, second, keep), range(seeds), n_sequences)

    run_bench(context, make, json_path, threads, [*pairs[0].files, *pairs[1].files])


bench.command("compare")(measure_comparison)
bench.command("backbone")(measure_backbone)
bench.command("corruptions")(measure_corruptions)
bench.command("compare-report")(report_comparison)
bench.command("cifar10")(measure_cifar10)
bench.command("tiny-imagenet")(measure_tiny_imagenet)
bench.command("chart")(draw_chart)
bench.command("claims")(tally_claims)
bench.command("export")(measure_exports)
bench.command("zoo")(measure_zoo)


@bench.command("scale")
def measure_scale(
    context: typer.Context,
    stream: Annotated[int, typer.Option(help="Images of 32x32 to stream.", min=100)] = 50_000,
    large: Annotated[int, typer.Option(help="Images of 224x224 for the ResNet-50 pair; 0 skips it.", min=0)] = 500,
    many: Annotated[int, typer.Option(help="Images of 32x32 for the memory of a scan.", min=100)] = 5_000,
    plot: Annotated[bool, typer.Option(help="Plot the growth too; needs the extra `plots`.")] = True,
    out: OutFolder = Path("results"),
    device: Device = "cpu",
    threads: OneThread = 2,
) -> None:
    """Measure time and memory as supports and networks grow, and in two processes.

    Takes half an hour on two cores; existing rows are not measured again.
    """
    if 0 < large < 100:
        raise InputError(f"large: expected at least 100 images, or 0 to skip the ResNet-50 pair; got {large}")
    read_device(device)
    picture = out / "scale.png"
    if plot:
        check_outputs({"out": picture})
        check_plot(picture)
    cells = scale.cells(stream, large, many, device)
    make = lambda: scale.bench(cells, threads, device, picture.name if plot else None)  # noqa: E731
    rows = run_bench(context, make, out / "scale.json", threads)
    if plot:
        draw_growth({cell: scale.points(rows, cell) for cell in scale.GROWTH}, picture)


@bench.command("speed")
def measure_speed(
    context: typer.Context,
    source: SourceFile,
    target: TargetFile,
    data: Data,
    support: Sizes = "100/20",
    flip: Mirror = True,
    seeds: Seeds = 1,
    parts: Annotated[str, typer.Option(help="What to measure: latency (with what attaching costs), job.")] = (
        "latency,job"
    ),
    layouts: Annotated[
        str, typer.Option(help="Forms for latency besides plain eager networks: channels_last, compiled.")
    ] = "channels_last,compiled",
    data_name: DataName = None,
    json_path: OutFile = Path("results/speed.json"),
    device: Device = "cpu",
    threads: OneThread = 1,
) -> None:
    """Time to make, run and attach a clone, compared with whole networks, the paper's search and fine-tuning.

    Takes a quarter of an hour, half of it the paper's search; existing rows are not measured again. The machine should
    have nothing else to do.
    """
    chosen = _chosen("parts", parts, ("latency", "job"))
    wanted = [*chosen, "life"] if "latency" in chosen else chosen
    forms = [latency.LAYOUTS[0], *_chosen("layouts", layouts, latency.LAYOUTS[1:])]
    pair = PairOptions(source, target, data, support, flip, data_name, device=device)
    run_bench(
        context,
        lambda: speed.bench(pair.load(), wanted, forms, range(seeds), threads, device),
        json_path,
        threads,
        pair.files,
    )


def _chosen(name: str, text: str, known: tuple[str, ...]) -> list[str]:
    """Parse names from `known`, separated by commas; repeated ones count once."""
    chosen = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [one for one in chosen if one not in known]
    if unknown:
        raise InputError(f"{name}: expected some of {', '.join(known)}, separated by commas; got {unknown[0]!r}")
    return chosen


@bench.command("serve")
def measure_serving(
    context: typer.Context,
    source: SourceFile,
    target: TargetFile,
    data: Data,
    support: Sizes = "100/20",
    flip: Mirror = False,
    rounds: Annotated[int, typer.Option(help="Rounds of load on each server.", min=1)] = 10,
    seconds: Annotated[float, typer.Option(help="Seconds of each load.", min=0.1)] = 5.0,
    connections: Annotated[int, typer.Option(help="Clients at a time.", min=1)] = 32,
    cycles: Annotated[int, typer.Option(help="How often a clone is attached and detached, in fifties.", min=0)] = 1000,
    uploads: Annotated[int, typer.Option(help="Number of mutated uploads.", min=0)] = 10_000,
    batch: Annotated[int, typer.Option(help="Images that a server computes at a time.", min=1)] = 16,
    wait_ms: Annotated[float, typer.Option(help="Time that an image waits for others.", min=0)] = 5.0,
    max_macs: Annotated[
        float, typer.Option(help="Bound on the MACs of each clone, as a share of the source's.")
    ] = 0.25,
    data_name: DataName = None,
    out: OutFolder = Path("results"),
) -> None:
    """Measure servers: clones beside the target alone and five networks, clones that come and go, bad uploads.

    Takes half an hour on two cores, which should have nothing else to do; existing rows are not measured again.
    """
    pair = PairOptions(source, target, data, support, flip, data_name)
    wanted = serve_report.Wanted(rounds, seconds, connections, cycles, uploads, batch, wait_ms, max_macs)
    run_bench(context, lambda: serve.bench(pair.load(), wanted), out / "serve.json", 1, pair.files)
