"""The `pnc bench` commands: measurements that anyone can run again, each with its results as JSON and Markdown."""

from collections.abc import Sequence
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
    use_threads,
)
from pnc.bench import classifiers
from pnc.bench import coverage as coverage_bench
from pnc.bench import localize as localize_bench
from pnc.bench import positions as positions_bench
from pnc.bench.results import Cells, Claim, write_results
from pnc.data import parse_classes, sample_per_class
from pnc.errors import InputError
from pnc.readers import load_data
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
    """Record, cut, shrink, clone and export some 200 classifiers of torchvision, timm and transformers.

    Takes about an hour. Rows are kept beside the results as they come, and a stopped run goes on behind them.
    """
    names = classifiers.chosen(models)
    outputs = {suffix: json_path.with_suffix(suffix) for suffix in (".json", ".md", ".jsonl")}
    check_outputs(dict(outputs))
    with use_threads(threads), progress() as bar:
        cells = Cells(outputs[".jsonl"], {}, ["model"])
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
    setting = _setting(source, target, data, support, flip, rows_path)
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
    _show_claims(found, out / "positions.md")


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
    """Ways to choose channels side by side, at four densities: learned, one-shot, and the paper's.

    Takes an hour or so for each seed; rows that are in localize.jsonl already are not made again.
    """
    rows_path = out / "localize.jsonl"
    setting = _setting(source, target, data, support, flip, rows_path, n_test)
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
    _show_claims(found, out / "localize.md")


def _setting(
    source: str, target: str, data: str, support: str, flip: bool, out: Path, n_test: int | None = None
) -> positions_bench.Setting:
    """Check and load what the options of a comparison name; `out` is the file that its rows go to."""
    asked = ModelOptions("source", source, None, None), ModelOptions("target", target, None, None)
    check_different(*asked)
    check_trained(*asked)
    n_new, n_base = parse_support(support)
    if not n_new or not n_base:
        raise InputError(f"support: numbers of images above 0 of new and of base classes are needed; got {support!r}")
    check_outputs({"out": out}, [*(one.file for one in asked), data_file(data)])
    train, test = load_data(data, "train"), load_data(data, "test")
    test = test if n_test is None else sample_per_class(test, n_test, "first")
    models = [load_network(one, input_shape=train.input_shape) for one in asked]
    check_images(train, *models)
    return positions_bench.Setting(models[0], models[1], train, test, n_new, n_base, flip)


def _show_claims(claims: Sequence[Claim], written: Path) -> None:
    for one in claims:
        say(f"{'holds' if one.holds else 'FAILS'}: {one.claim} {one.must}: {one.value:.3f} +- {one.spread:.3f}")
    say(f"{written}: written")
