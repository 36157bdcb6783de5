"""The commands `pnc bench compare`, `compare-report`, `chart` and `claims`."""

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pnc.bench import compare, compare_report
from pnc.bench.accuracy_chart import chart, read_bars
from pnc.bench.claim_tally import markdown, read_claims
from pnc.bench.comparison_methods import GROUPS, choose_methods, trained_network
from pnc.bench.result_files import Cells
from pnc.bench.rivals.rival import Budget
from pnc.bench.setting import Setting
from pnc.cli.arguments import (
    ModelOptions,
    check_different,
    check_input_shape,
    check_outputs,
    check_trained,
    data_file,
    load_network,
    parse_support,
    use_threads,
)
from pnc.cli.bench_options import DataName, Mirror, NTest, OneThread, Seeds, Sizes, publish
from pnc.cli.options import Data
from pnc.cli.output import complain, progress, say
from pnc.cli.plots import draw_comparison, draw_curves
from pnc.data.image_set import ImageSet, hold_back, sample_per_class
from pnc.data.readers import load_data
from pnc.foundation.class_names import listed, parse_classes
from pnc.foundation.errors import InputError
from pnc.foundation.file_writing import write_file
from pnc.method.task import Precision, Progress
from pnc.models.model_specs import LoadedModel
from pnc.models.pretraining import recipe_for


def measure_comparison(
    source: Annotated[
        str,
        typer.Option(help="File of `pnc pretrain`, or zoo:..., which is trained on the second half of the classes."),
    ],
    target: Annotated[
        str, typer.Option(help="File of `pnc pretrain`, or zoo:..., which is trained on the first half of the classes.")
    ],
    data: Data,
    support: Sizes = "100/20",
    classes: Annotated[str, typer.Option(help="Classes to clone: all, single (each alone), fifth, or names.")] = "all",
    methods: Annotated[
        str | None, typer.Option(help="Names, separated by commas; rivals: all except the bound.")
    ] = None,
    again: Annotated[str | None, typer.Option(help="Methods to measure again where rows exist.")] = None,
    flip: Mirror = True,
    seeds: Seeds = 3,
    n_test: NTest = None,
    data_name: DataName = None,
    out: Annotated[Path, typer.Option(help="Folder for the rows: one file of JSON lines per dataset.")] = Path(
        "results/compare"
    ),
    epochs: Annotated[int | None, typer.Option(help="Epochs of networks that are trained here.", min=1)] = None,
    runs: Annotated[Path, typer.Option(help="Folder for networks that are trained here.")] = Path("runs"),
    unseen: Annotated[
        int | None,
        typer.Option(help="Draw supports from the last N images of each class, which train no network here.", min=1),
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="Precision of training; bfloat16 is faster on processors that support it.")
    ] = "float32",
    threads: OneThread = 1,
) -> None:
    """Compare the clone and rivals on the same samples; `pnc bench compare-report` makes tables of the rows.

    A rival that trains takes about a minute per support, all of them about 20; existing rows are not measured again.
    """
    asked = ModelOptions("source", source, None, None), ModelOptions("target", target, None, None)
    if not all(one.spec.startswith("zoo:") for one in asked):  # one spec, trained on other classes, is another network
        check_different(*asked)
        if unseen is not None:
            raise InputError(
                "unseen: which images trained a file of `pnc pretrain` is not known; give zoo:... for both"
            )
    n_new, n_base = parse_support(support)
    chosen, remade = choose_methods(methods), choose_methods(again) if again else []
    foreign = [one for one in remade if one not in chosen]
    if foreign:
        raise InputError(f"again: {listed(foreign)} is not a method of this run; name it in --methods too")
    name = data_name or data
    path = out / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    check_outputs({"out": path}, [*(one.file for one in asked), data_file(data)])
    with use_threads(threads), progress() as bar:
        images = load_data(data, "train"), load_data(data, "test")
        half = len(images[0].classes) // 2
        halves = images[0].classes[half:], images[0].classes[:half]
        step = _logged(bar.step)
        rest, pool = (images[0], images[0]) if unseen is None else hold_back(images[0], unseen)
        models = [
            _network(one, names, (rest, images[1]), runs, (epochs, flip, precision), step)
            for one, names in zip(asked, halves, strict=True)
        ]
        check_input_shape(images[0], *models)
        new = [known for known in models[0].classes if known not in models[1].classes]
        group = classes if classes in GROUPS else ", ".join(parse_classes(classes, new))
        setting = Setting(
            source=models[0],
            target=models[1],
            train=pool,
            test=images[1] if n_test is None else sample_per_class(images[1], n_test, "first"),
            data=name,
            n_new=n_new,
            n_base=n_base,
            flip=flip,
            n_test=n_test,
        )
        cells = Cells(path, {}, compare.KEYS)
        rows = compare.measure(setting, group, Budget(precision=precision), chosen, range(seeds), remade)(cells, step)
    say(compare_report.summary(rows))
    say(f"{path}: {len(cells.rows)} rows")


def report_comparison(
    folder: Annotated[Path, typer.Argument(help="Folder with the rows of `pnc bench compare`.")] = Path(
        "results/compare"
    ),
    plots: Annotated[bool, typer.Option(help="Draw plots too; needs the extra `plots`.")] = True,
) -> None:
    """Write tables, claims and plots of all rows in a folder: FOLDER.json and FOLDER.md, plots in FOLDER."""
    rows = compare_report.read_rows(folder)
    check_outputs({"json": folder.with_suffix(".json"), "md": folder.with_suffix(".md")})
    pictures = []
    if plots:
        for regime in compare_report.regimes(rows):
            stem = folder / regime.slug
            draw_comparison(regime.title, regime.points(), stem.with_suffix(".png"))
            draw_curves(regime.title, regime.curves(), Path(f"{stem}-curves.png"))
            pictures += [f"{folder.name}/{stem.name}.png", f"{folder.name}/{stem.name}-curves.png"]
    publish(
        compare_report.bench(rows, pictures), rows, folder.with_suffix(".json"), f"pnc bench compare-report {folder}"
    )


def draw_chart(
    compare: Annotated[Path, typer.Option(help="Results of `pnc bench compare-report`.")] = Path(
        "results/compare.json"
    ),
    part: Annotated[Path, typer.Option(help="Results of `pnc bench part`.")] = Path("results/part.json"),
    out: Annotated[Path, typer.Option(help="Picture to write, .svg.")] = Path("docs/accuracy.svg"),
) -> None:
    """Draw the chart of the README from results: accuracy against added cost, as SVG for light and dark pages."""
    check_outputs({"out": out}, [compare, part])
    write_file(out, chart(read_bars(compare, part)))
    say(f"{out}: written")


def _network(
    asked: ModelOptions,
    classes: Sequence[str],
    images: tuple[ImageSet, ImageSet],
    runs: Path,
    recipe: tuple[int | None, bool, Precision],
    step: Progress,
) -> LoadedModel:
    """Load a network, or train it if its spec has random weights."""
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
    """Also write a line for each step if there is no terminal for the bar, so that logs show progress."""

    def both(what: str, done: int, total: int) -> None:
        step(what, done, total)
        if not sys.stderr.isatty():
            complain(f"{time.strftime('%H:%M')} {done}/{total} {what}")

    return both


def tally_claims(
    folder: Annotated[Path, typer.Argument(help="Folder with the results of benches.")] = Path("results"),
) -> None:
    """Count the claims of all results in a folder and list those that do not hold, in FOLDER/claims.md."""
    tallies, path = read_claims(folder), folder / "claims.md"
    check_outputs({"folder": path})
    write_file(path, f"`pnc bench claims {folder.name}`\n\n{markdown(tallies)}")
    say(f"{path}: {sum(len(one.failing) for one in tallies)} of {sum(one.n_claims for one in tallies)} do not hold")
