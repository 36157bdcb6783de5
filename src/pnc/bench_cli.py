"""The `pnc bench` commands: measurements that anyone can run again, each with its results as JSON and Markdown."""

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pnc.arguments import (
    ModelOptions,
    check_different,
    check_images,
    check_outputs,
    check_trained,
    data_file,
    load_network,
    parse_support,
    read_device,
    use_threads,
)
from pnc.baselines.protocol import Budget
from pnc.bench import classifiers, compare_report, sequences
from pnc.bench import compare as compare_bench
from pnc.bench import coverage as coverage_bench
from pnc.bench import files as files_bench
from pnc.bench import lifecycle as lifecycle_bench
from pnc.bench import localize as localize_bench
from pnc.bench import positions as positions_bench
from pnc.bench.protocols import GROUPS, choose_methods, trained_network
from pnc.bench.results import Cells, Claim, write_results
from pnc.class_names import listed, parse_classes
from pnc.data import ImageSet, sample_per_class
from pnc.errors import InputError
from pnc.models import LoadedModel
from pnc.plots import draw_comparison, draw_curves
from pnc.pretraining import recipe_for
from pnc.readers import load_data
from pnc.screen import complain, progress, say
from pnc.task import Precision, Progress

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
    names = classifiers.chosen(models)
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
    setting = lifecycle_bench.Setting(
        (first.source, second.source), first.target, first.train, first.test, first.n_new, first.n_base, flip, keep
    )
    lifecycle_bench.parts(setting.new_classes, "four")
    facts = {"sources": source, "target": target, "data": data_name or data, "support": support, "flip": flip}
    cells = Cells(outputs[".jsonl"], {**facts, "n_test": n_test}, lifecycle_bench.KEYS)
    with use_threads(threads), progress() as bar:
        lives = sequences.run(n_sequences, cells, bar.step)
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


@bench.command("compare")
def measure_comparison(
    source: Annotated[
        str, typer.Option(help="File of `pnc pretrain`, or zoo:...: trained on the second half of classes.")
    ],
    target: Annotated[
        str, typer.Option(help="File of `pnc pretrain`, or zoo:...: trained on the first half of classes.")
    ],
    data: Annotated[str, typer.Option(help="Images: digits, parquet:PATH, folder:PATH, hf:NAME.")],
    support: Annotated[str, typer.Option(help="Images per new / per base class.")] = "100/20",
    classes: Annotated[str, typer.Option(help="all, single (one cell for each), fifth, or names of classes.")] = "all",
    methods: Annotated[str | None, typer.Option(help="Names, separated by commas; rivals: all but the bound.")] = None,
    again: Annotated[str | None, typer.Option(help="Methods whose cells are made anew though they are there.")] = None,
    flip: Annotated[bool, typer.Option(help="Use mirror images too.")] = True,
    seeds: Annotated[int, typer.Option(help="How many supports, seeds 0, 1, ...", min=1)] = 3,
    n_test: Annotated[int | None, typer.Option(help="Test images per class, the first ones; all by default.")] = None,
    data_name: Annotated[str | None, typer.Option(help="What the results call the images.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the rows, one file of JSON lines for each data.")] = Path(
        "results/compare"
    ),
    epochs: Annotated[int | None, typer.Option(help="Of networks that are trained here.", min=1)] = None,
    runs: Annotated[Path, typer.Option(help="Where networks that are trained here are kept.")] = Path("runs"),
    precision: Annotated[
        Precision, typer.Option(help="Of training; bfloat16 is faster where the processor has it.")
    ] = "float32",
    threads: Annotated[int, typer.Option(help="Threads for torch.", min=1)] = 1,
) -> None:
    """Clone and rivals on the same samples, cell by cell; `pnc bench compare-report` makes tables of the rows.

    Every rival that trains takes about a minute for each support, so all of them some 20; cells that are there are not
    made again.
    """
    asked = ModelOptions("source", source, None, None), ModelOptions("target", target, None, None)
    if not all(one.spec.startswith("zoo:") for one in asked):  # one spec, trained on other classes, is another network
        check_different(*asked)
    n_new, n_base = parse_support(support)
    chosen, remade = choose_methods(methods), choose_methods(again) if again else []
    foreign = [one for one in remade if one not in chosen]
    if foreign:
        raise InputError(f"again: {listed(foreign)} is no method of this run; name it in --methods too")
    name = data_name or data
    path = out / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    check_outputs({"out": path}, [*(one.file for one in asked), data_file(data)])
    with use_threads(threads), progress() as bar:
        images = load_data(data, "train"), load_data(data, "test")
        half = len(images[0].classes) // 2
        halves = images[0].classes[half:], images[0].classes[:half]
        step = _logged(bar.step)
        models = [
            _network(one, names, images, runs, (epochs, flip, precision), step)
            for one, names in zip(asked, halves, strict=True)
        ]
        check_images(images[0], *models)
        new = [known for known in models[0].classes if known not in models[1].classes]
        group = classes if classes in GROUPS else ", ".join(parse_classes(classes, new))
        setting = compare_bench.Setting(
            source=models[0],
            target=models[1],
            train=images[0],
            test=images[1] if n_test is None else sample_per_class(images[1], n_test, "first"),
            data=name,
            n_new=n_new,
            n_base=n_base,
            flip=flip,
            group=group,
            budget=Budget(precision=precision),
            n_test=n_test,
        )
        cells = Cells(path, {}, compare_bench.KEYS)
        rows = compare_bench.run(setting, chosen, range(seeds), cells, remade, step)
    say(compare_report.summary(rows))
    say(f"{path}: {len(cells.rows)} rows")


@bench.command("compare-report")
def report_comparison(
    folder: Annotated[Path, typer.Argument(help="Folder with the rows of `pnc bench compare`.")] = Path(
        "results/compare"
    ),
    plots: Annotated[bool, typer.Option(help="Draw pictures too; needs the extra `plots`.")] = True,
) -> None:
    """Tables, claims and pictures of all rows in a folder: FOLDER.json and FOLDER.md, pictures in the folder."""
    rows = compare_report.read_rows(folder)
    check_outputs({"json": folder.with_suffix(".json"), "md": folder.with_suffix(".md")})
    found, pictures = compare_report.claims(rows), []
    if plots:
        for regime in compare_report.regimes(rows):
            stem = folder / regime.slug
            draw_comparison(regime.title, regime.points(), stem.with_suffix(".png"))
            draw_curves(regime.title, regime.curves(), Path(f"{stem}-curves.png"))
            pictures += [f"{folder.name}/{stem.name}.png", f"{folder.name}/{stem.name}-curves.png"]
    text = compare_report.markdown(rows, pictures)
    facts = {"rows": compare_report.means(rows), "made_by": compare_report.made_by(rows)}
    write_results(folder.parent, folder.name, f"pnc bench compare-report {folder}", facts, found, text)
    for one in found:
        say(f"{'holds' if one.holds else 'FAILS'}: {one.claim} {one.must}: {one.value:.3g}")
    say(f"{folder.with_suffix('.md')}: written")


def _network(
    asked: ModelOptions,
    classes: Sequence[str],
    images: tuple[ImageSet, ImageSet],
    runs: Path,
    recipe: tuple[int | None, bool, Precision],
    step: Progress,
) -> LoadedModel:
    """Load a network, or train it where it is a spec with random weights."""
    if not asked.spec.startswith("zoo:"):
        check_trained(asked)
        return load_network(asked, input_shape=images[0].input_shape)
    epochs, flip, precision = recipe
    usual = recipe_for(asked.spec)
    wanted = replace(usual, epochs=epochs or usual.epochs, flip=flip, precision=precision)
    return trained_network(
        asked.spec,
        classes,
        images,
        wanted,
        runs,
        lambda epoch: step(f"training the {asked.role}, accuracy {epoch.test_accuracy:.3f}", epoch.epoch, epoch.epochs),
    )


def _logged(step: Progress) -> Progress:
    """Also write a line for each step where nobody sees the bar, so that a log tells how far it is."""

    def both(what: str, done: int, total: int) -> None:
        step(what, done, total)
        if not sys.stderr.isatty():
            complain(f"{time.strftime('%H:%M')} {done}/{total} {what}")

    return both


def setting_of(
    source: str,
    target: str,
    data: str,
    support: str,
    flip: bool,
    out: Path,
    n_test: int | None = None,
    device: str = "cpu",
) -> positions_bench.Setting:
    """Check and load what the options of a comparison name; `out` is the file that its rows go to."""
    asked = ModelOptions("source", source, None, None, device), ModelOptions("target", target, None, None, device)
    check_different(*asked)
    check_trained(*asked)
    read_device(device)
    n_new, n_base = parse_support(support)
    if not n_new or not n_base:
        raise InputError(f"support: numbers of images above 0 of new and of base classes are needed; got {support!r}")
    check_outputs({"out": out}, [*(one.file for one in asked), data_file(data)])
    train, test = load_data(data, "train"), load_data(data, "test")
    test = test if n_test is None else sample_per_class(test, n_test, "first")
    models = [load_network(one, input_shape=train.input_shape) for one in asked]
    check_images(train, *models)
    return positions_bench.Setting(models[0], models[1], train, test, n_new, n_base, flip)


def show_claims(claims: Sequence[Claim], written: Path) -> None:
    """Say of each claim whether it holds, and where the results lie."""
    for one in claims:
        spread = "" if one.spread is None else f" +- {one.spread:.3f}"
        value = f"{one.value:.3f}" if isinstance(one.value, float) else f"{one.value:,}"
        say(f"{'holds' if one.holds else 'FAILS'}: {one.claim} {one.must}: {value}{spread}")
    say(f"{written}: written")
