"""The `pnc bench` commands: measurements that anyone can run again, each with its results as JSON and Markdown."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from pnc.bench import channel_methods as localize_bench
from pnc.bench import coverage as coverage_bench
from pnc.bench import file_attacks as files_bench
from pnc.bench import latency, library_classifiers, random_lives, scale
from pnc.bench import lifecycle as lifecycle_bench
from pnc.bench import part as part_bench
from pnc.bench import position_strategies as positions_bench
from pnc.bench import speed as speed_bench
from pnc.bench.result_files import Cells, write_results
from pnc.cli.arguments import check_outputs, read_device, use_threads
from pnc.cli.bench_options import setting_of, show_claims
from pnc.cli.compare_commands import measure_comparison, report_comparison
from pnc.cli.options import Device
from pnc.cli.output import progress, say
from pnc.cli.plots import draw_growth
from pnc.foundation.class_names import listed, parse_classes
from pnc.foundation.errors import InputError

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
    again: Annotated[
        bool, typer.Option("--again", help="Measure time and memory of the rows that are there once more.")
    ] = False,
    threads: Annotated[int, typer.Option(help="Threads for torch.", min=1)] = 1,
) -> None:
    """Record, cut, shrink, clone and export some 200 classifiers of torchvision, timm and transformers.

    Takes about an hour. Rows are kept beside the results as they come, and a stopped run goes on behind them.
    """
    names = library_classifiers.chosen(models)
    outputs = {suffix: json_path.with_suffix(suffix) for suffix in (".json", ".md", ".jsonl")}
    check_outputs(dict(outputs))
    with use_threads(threads), progress() as bar:
        cells = Cells(outputs[".jsonl"], {}, coverage_bench.KEYS)
        if again:
            coverage_bench.measure_again(names, cells, bar.step)
        rows = coverage_bench.run(names, cells, bar.step)
        command = f"pnc bench coverage --threads {threads}" + (f" --models {models}" if models else "")
        made = coverage_bench.claims(rows), coverage_bench.markdown(rows)
        write_results(json_path.parent, json_path.stem, command, {"rows": rows}, *made)
    say(made[1])


@bench.command("positions")
def measure_positions(
    source: Annotated[str, typer.Option(help="File of `pnc pretrain`: the network that knows the new classes.")],
    target: Annotated[str, typer.Option(help="File of `pnc pretrain`: the network that shall get them.")],
    data: Annotated[str, typer.Option(help="Images: digits, parquet:PATH, folder:PATH, hf:NAME.")],
    support: Annotated[str, typer.Option(help="Images per new / per base class.")] = "100/20",
    flip: Annotated[bool, typer.Option(help="Use mirror images too.")] = True,
    seeds: Annotated[int, typer.Option(help="How many supports, seeds 0, 1, ...", min=1)] = 3,
    data_name: Annotated[str | None, typer.Option(help="What the results call the images.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for positions.json, .md and .jsonl.")] = Path("results"),
    threads: Annotated[int, typer.Option(help="Threads for torch.", min=1)] = 1,
) -> None:
    """Ways to find a position side by side: closed form within bounds, density, refinement, the paper's search.

    Takes some minutes for each seed; rows that are in positions.jsonl already are not made again.
    """
    rows_path = out / "positions.jsonl"
    setting = setting_of(source, target, data, support, flip, rows_path)
    facts = {"source": source, "target": target, "data": data_name or data, "support": support, "flip": flip}
    cells = Cells(rows_path, facts, ("strategy", "seed"))
    with use_threads(threads), progress() as bar:
        rows = positions_bench.run(setting, range(seeds), cells, bar.step)
        command = (
            f"pnc bench positions --source {source} --target {target} --data {data_name or data} --support {support} "
            f"--{'' if flip else 'no-'}flip --seeds {seeds} --threads {threads}"
        )
        found = positions_bench.claims(rows)
        text = positions_bench.markdown(rows, setting, data_name or data)
        write_results(out, "positions", command, {**facts, "rows": rows}, found, text)
    show_claims(found, out / "positions.md")


@bench.command("localize")
def measure_localization(
    source: Annotated[str, typer.Option(help="File of `pnc pretrain`: the network that knows the new classes.")],
    target: Annotated[str, typer.Option(help="File of `pnc pretrain`: the network that shall get them.")],
    data: Annotated[str, typer.Option(help="Images: digits, parquet:PATH, folder:PATH, hf:NAME.")],
    some: Annotated[str, typer.Option(help="Classes of a second table, for which the source's others are not cloned.")],
    support: Annotated[str, typer.Option(help="Images per new / per base class.")] = "100/20",
    flip: Annotated[bool, typer.Option(help="Use mirror images too.")] = True,
    seeds: Annotated[int, typer.Option(help="How many supports, seeds 0, 1, ...", min=1)] = 3,
    n_test: Annotated[int | None, typer.Option(help="Test images per class, the first ones; all by default.")] = None,
    data_name: Annotated[str | None, typer.Option(help="What the results call the images.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for localize.json, .md and .jsonl.")] = Path("results"),
    threads: Annotated[int, typer.Option(help="Threads for torch.", min=1)] = 1,
) -> None:
    """Ways to choose channels side by side, at two densities: learned, one-shot, and the paper's.

    Takes ten minutes or so for each seed; rows that are in localize.jsonl already are not made again.
    """
    rows_path = out / "localize.jsonl"
    setting = setting_of(source, target, data, support, flip, rows_path, n_test)
    everything = [name for name in setting.source.classes if name not in setting.target.classes]
    groups = [everything, list(parse_classes(some, setting.source.classes))]
    facts = {"source": source, "target": target, "data": data_name or data, "support": support, "flip": flip}
    cells = Cells(rows_path, {**facts, "n_test": n_test}, localize_bench.KEYS)
    with use_threads(threads), progress() as bar:
        rows = localize_bench.run(setting, groups, range(seeds), cells, bar.step)
        command = (
            f"pnc bench localize --source {source} --target {target} --data {data_name or data} --some {some} "
            f"--support {support} --{'' if flip else 'no-'}flip --seeds {seeds} --threads {threads}"
            + (f" --n-test {n_test}" if n_test else "")
        )
        found = localize_bench.claims(rows)
        text = localize_bench.markdown(rows, setting, data_name or data)
        write_results(out, "localize", command, {**facts, "n_test": n_test, "rows": rows}, found, text)
    show_claims(found, out / "localize.md")


@bench.command("part")
def measure_parts(
    source: Annotated[str, typer.Option(help="File of `pnc pretrain`: the network that knows the new classes.")],
    target: Annotated[str, typer.Option(help="File of `pnc pretrain`: the network that shall get them.")],
    data: Annotated[str, typer.Option(help="Images: digits, parquet:PATH, folder:PATH, hf:NAME.")],
    pair: Annotated[str, typer.Option(help="What the results call the two networks.")],
    forms: Annotated[
        str, typer.Option(help="What is made: whole, default, seconds, and density with tuning as in '0.5 weights'.")
    ] = "whole,0.5 weights,0.3 weights,0.15 weights,default,seconds",
    some: Annotated[str | None, typer.Option(help="Classes to clone; by default all that the target lacks.")] = None,
    support: Annotated[str, typer.Option(help="Images per new / per base class.")] = "100/20",
    flip: Annotated[bool, typer.Option(help="Use mirror images too.")] = True,
    seeds: Annotated[int, typer.Option(help="How many supports, seeds 0, 1, ...", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="Folder for part.json, .md and .jsonl.")] = Path("results"),
    threads: Annotated[int, typer.Option(help="Threads for torch.", min=1)] = 2,
) -> None:
    """Parts beside whole sources: what a clone loses and saves at each density, and by its own choice.

    Takes a minute or two for each row; rows of all pairs lie in one part.jsonl, and are not made again.
    """
    rows_path = out / "part.jsonl"
    setting = setting_of(source, target, data, support, flip, rows_path)
    new = [name for name in setting.source.classes if name not in setting.target.classes]
    classes = new if some is None else list(parse_classes(some, setting.source.classes))
    cells = Cells(rows_path, {}, part_bench.KEYS)
    wanted = part_bench.parse_forms(forms)
    with use_threads(threads), progress() as bar:
        part_bench.run(part_bench.PartCase(pair, setting, tuple(classes)), wanted, range(seeds), cells, bar.step)
        command = (
            f"pnc bench part --source SOURCE --target TARGET --data DATA --pair PAIR --forms {forms!r} "
            f"--seeds {seeds} --threads {threads}"
        )
        found = part_bench.claims(cells.rows)
        write_results(out, "part", command, {"rows": cells.rows}, found, part_bench.markdown(cells.rows))
    show_claims(found, out / "part.md")


@bench.command("files")
def attack_files(
    files: Annotated[int, typer.Option(help="How many damaged files to read.", min=1)] = 20_000,
    kills: Annotated[int, typer.Option(help="How many processes to kill while they save.", min=0)] = 200,
    seed: Annotated[int, typer.Option(help="Of the damage and of the moments.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="Folder for files.json, .md and .jsonl.")] = Path("results"),
) -> None:
    """Read clone files that are damaged in every way, and kill processes while they save.

    Takes some minutes; chunks that are in files.jsonl already are not made again.
    """
    rows_path = out / "files.jsonl"
    check_outputs({"out": rows_path})
    settings = {"files": files, "kills": kills, "seed": seed}
    cells = Cells(rows_path, settings, files_bench.KEYS)
    with use_threads(1), progress() as bar:
        rows = files_bench.run(files, kills, seed, cells, bar.step)
        command = f"pnc bench files --files {files} --kills {kills} --seed {seed}"
        found = files_bench.claims(rows)
        facts = {
            **settings,
            "rows": files_bench.summary(rows),
            "bad": [number for row in rows for number in row.get("bad", [])],
        }
        write_results(out, "files", command, facts, found, files_bench.markdown(rows))
    show_claims(found, out / "files.md")


@bench.command("lifecycle")
def measure_lifecycle(
    source: Annotated[list[str], typer.Option(help="File of `pnc pretrain`; give two, which know the same classes.")],
    target: Annotated[str, typer.Option(help="File of `pnc pretrain`: the network that shall get them.")],
    data: Annotated[str, typer.Option(help="Images: digits, parquet:PATH, folder:PATH, hf:NAME.")],
    support: Annotated[str, typer.Option(help="Images per new / per base class.")] = "100/20",
    flip: Annotated[bool, typer.Option(help="Use mirror images too.")] = True,
    seeds: Annotated[int, typer.Option(help="How many supports, seeds 0, 1, ...", min=1)] = 3,
    n_test: Annotated[int | None, typer.Option(help="Test images per class, the first ones; all by default.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Folder to keep clones in, to be read next time.")] = None,
    n_sequences: Annotated[int, typer.Option("--sequences", help="Random lives of a composite.", min=0)] = 1000,
    data_name: Annotated[str | None, typer.Option(help="What the results call the images.")] = None,
    json_path: Annotated[Path, typer.Option("--json", help="Results; the table goes beside it.")] = Path(
        "results/lifecycle.json"
    ),
    threads: Annotated[int, typer.Option(help="Threads for torch.", min=1)] = 1,
) -> None:
    """Many clones in one target: random lives bit for bit, and what calibration makes of clones made apart.

    Takes some minutes for each seed and for the random lives; what was measured already is not measured again.
    """
    outputs = {suffix: json_path.with_suffix(suffix) for suffix in (".json", ".md", ".jsonl")}
    if keep is not None:
        check_outputs({"keep": keep / "clone.safetensors"})
    if len(source) != 2:
        raise InputError(f"source: give two networks that know the same new classes; got {len(source)}")
    check_outputs(dict(outputs))
    first, second = (
        setting_of(one, target, data, support, flip, outputs[".jsonl"], n_test if one == source[0] else 1)
        for one in source
    )
    if first.source.classes != second.source.classes:
        raise InputError(
            f"source: both must know the same classes; {source[0]} knows {listed(first.source.classes)}, "
            f"{source[1]} knows {listed(second.source.classes)}"
        )
    setting = lifecycle_bench.LifecycleSetting(
        (first.source, second.source), first.target, first.train, first.test, first.n_new, first.n_base, flip, keep
    )
    lifecycle_bench.parts(setting.new_classes, "four")
    facts = {"sources": source, "target": target, "data": data_name or data, "support": support, "flip": flip}
    cells = Cells(outputs[".jsonl"], {**facts, "n_test": n_test}, lifecycle_bench.KEYS)
    with use_threads(threads), progress() as bar:
        lives = random_lives.run(n_sequences, cells, bar.step)
        rows = lifecycle_bench.run(setting, range(seeds), cells, bar.step)
        command = (
            f"pnc bench lifecycle --source {source[0]} --source {source[1]} --target {target} "
            f"--data {data_name or data} --support {support} --{'' if flip else 'no-'}flip --seeds {seeds} "
            f"--sequences {n_sequences} --threads {threads}" + (f" --n-test {n_test}" if n_test else "")
        )
        found = lifecycle_bench.claims(rows, lives)
        text = lifecycle_bench.markdown(rows, lives, setting, data_name or data, n_test)
        measured = {**facts, "n_test": n_test, "lives": lives, "rows": rows}
        write_results(json_path.parent, json_path.stem, command, measured, found, text)
    show_claims(found, outputs[".md"])


bench.command("compare")(measure_comparison)
bench.command("compare-report")(report_comparison)


@bench.command("scale")
def measure_scale(
    stream: Annotated[int, typer.Option(help="Images of 32x32 that are streamed.", min=100)] = 50_000,
    large: Annotated[int, typer.Option(help="Images of 224x224 for the ResNet-50 pair; 0: without it.", min=0)] = 500,
    many: Annotated[int, typer.Option(help="Images of 32x32 for the memory of a scan.", min=100)] = 5_000,
    plot: Annotated[bool, typer.Option(help="Draw a picture too; needs the extra `plots`.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for scale.json, .md, .png and .jsonl.")] = Path("results"),
    device: Device = "cpu",
    threads: Annotated[int, typer.Option(help="Threads for torch.", min=1)] = 2,
) -> None:
    """Time and memory as supports and networks grow, and in two processes.

    Takes half an hour on two cores; rows that are in scale.jsonl already are not made again.
    """
    if 0 < large < 100:
        raise InputError(f"large: expected 0, for no ResNet-50 pair, or at least 100 images; got {large}")
    read_device(device)
    paths = {suffix: out / f"scale.{suffix}" for suffix in ("json", "md", "jsonl", "png")}
    check_outputs(dict(paths))
    kept = Cells(paths["jsonl"], {"threads": threads, "device": device}, scale.KEYS)
    with progress() as bar:
        rows = scale.run(scale.cells(stream, large, many, device), threads, kept, bar.step, device)
    if plot:
        draw_growth({cell: scale.points(rows, cell) for cell in scale.GROWTH}, paths["png"])
    command = f"pnc bench scale --stream {stream} --large {large} --many {many} --device {device} --threads {threads}"
    found = scale.claims(rows)
    text = scale.markdown(rows, threads, paths["png"].name if plot else None)
    write_results(out, "scale", command, {"rows": rows}, found, text, torch.device(device))
    show_claims(found, paths["md"])


@bench.command("speed")
def measure_speed(
    source: Annotated[str, typer.Option(help="File of `pnc pretrain`: the network that knows the new classes.")],
    target: Annotated[str, typer.Option(help="File of `pnc pretrain`: the network that shall get them.")],
    data: Annotated[str, typer.Option(help="Images: digits, parquet:PATH, folder:PATH, hf:NAME.")],
    support: Annotated[str, typer.Option(help="Images per new / per base class.")] = "100/20",
    flip: Annotated[bool, typer.Option(help="Use mirror images too.")] = True,
    seeds: Annotated[int, typer.Option(help="How many supports, seeds 0, 1, ...; for the jobs.", min=1)] = 1,
    parts: Annotated[str, typer.Option(help="What to measure: latency (with what attaching costs), job.")] = (
        "latency,job"
    ),
    layouts: Annotated[
        str, typer.Option(help="Of latency, beside eager networks as they are: channels_last, compiled.")
    ] = "channels_last,compiled",
    data_name: Annotated[str | None, typer.Option(help="What the results call the images.")] = None,
    json_path: Annotated[Path, typer.Option("--json", help="Results; the table goes beside it.")] = Path(
        "results/speed.json"
    ),
    device: Device = "cpu",
    threads: Annotated[int, typer.Option(help="Threads for torch.", min=1)] = 1,
) -> None:
    """Time to make a clone, to run it and to attach it, beside whole networks, the paper's search and fine-tuning.

    Takes a quarter of an hour, half of it the paper's search; what was measured already is not measured again. The
    machine should have nothing else to do.
    """
    outputs = {suffix: json_path.with_suffix(suffix) for suffix in (".json", ".md", ".jsonl")}
    check_outputs(dict(outputs))
    chosen = _chosen("parts", parts, ("latency", "job"))
    others = _chosen("layouts", layouts, latency.LAYOUTS[1:])
    setting = setting_of(source, target, data, support, flip, outputs[".jsonl"], device=device)
    facts = {"source": source, "target": target, "data": data_name or data, "support": support, "flip": flip}
    cells = Cells(outputs[".jsonl"], {**facts, "threads": threads, "device": device}, speed_bench.KEYS)
    wanted = [*chosen, "life"] if "latency" in chosen else chosen
    with use_threads(threads), progress() as bar:
        rows = speed_bench.run(setting, wanted, [latency.LAYOUTS[0], *others], range(seeds), cells, bar.step)
        command = (
            f"pnc bench speed --source {source} --target {target} --data {data_name or data} --support {support} "
            f"--{'' if flip else 'no-'}flip --seeds {seeds} --parts {parts} --layouts '{layouts}' "
            f"--device {device} --threads {threads}"
        )
        found = speed_bench.claims(rows)
        text = speed_bench.markdown(rows, setting, data_name or data)
        write_results(json_path.parent, json_path.stem, command, {**facts, "rows": rows}, found, text, setting.device)
    show_claims(found, outputs[".md"])


def _chosen(name: str, text: str, known: tuple[str, ...]) -> list[str]:
    """Names out of `known`, separated by commas, none twice."""
    chosen = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [one for one in chosen if one not in known]
    if unknown:
        raise InputError(f"{name}: expected some of {', '.join(known)}, separated by commas; got {unknown[0]!r}")
    return chosen
