"""The commands `pnc bench cifar10` and `pnc bench tiny-imagenet`: the job on photographs, compared with rivals."""

from pathlib import Path
from typing import Annotated

import typer

from pnc.bench import cifar10, compare, tiny_imagenet
from pnc.bench.result_files import Cells, write_results
from pnc.cli.arguments import check_outputs, data_file, parse_support, use_threads
from pnc.cli.bench_options import DataName, OneThread, OutFolder, Seeds, Sizes, command_line, show_claims
from pnc.cli.options import Data, Seed
from pnc.cli.output import progress
from pnc.foundation.errors import InputError
from pnc.method.task import Precision

_FILES = ("target", "source", "runs")
"""Options that say where trained networks are: without them they are trained."""

Runs = Annotated[Path, typer.Option(help="Folder where trained networks are kept.")]


def measure_cifar10(
    context: typer.Context,
    data: Data,
    target: Annotated[Path | None, typer.Option(help="Trained target, .safetensors; by default it is trained.")] = None,
    source: Annotated[Path | None, typer.Option(help="Trained source, likewise.")] = None,
    data_name: DataName = None,
    runs: Runs = Path("runs"),
    seed: Seed = 0,
    out: OutFolder = Path("results"),
    threads: OneThread = 1,
) -> None:
    """A ResNet-20 that knows five CIFAR-10 classes gets the other five; rivals on the same samples.

    The networks are trained once, about eight minutes each on one core, and kept; a stopped run continues.
    """
    _check(out, "cifar10", data, target, source)
    chosen = cifar10.Choice(data, data_name or data, target, source, runs, seed)
    with use_threads(threads), progress() as bar:
        facts = cifar10.measure(chosen, bar.step)
    claims, command = cifar10.claims(facts), command_line(context, "cifar10", _FILES)
    write_results(out, "cifar10", command, facts, claims, cifar10.markdown(facts))
    show_claims(claims, out / "cifar10.md")


def measure_tiny_imagenet(
    context: typer.Context,
    data: Data,
    support: Sizes = "20/5",
    new_classes: Annotated[int, typer.Option(help="How many of the ten; 2 are a fifth of them.", min=1, max=10)] = 10,
    methods: Annotated[
        str | None, typer.Option(help="Methods as in `pnc bench compare`, separated by commas; all by default.")
    ] = None,
    seeds: Seeds = 3,
    source_size: Annotated[int, typer.Option(help="Height and width that the source sees.", min=32)] = 224,
    runs: Runs = Path("runs"),
    precision: Annotated[Precision, typer.Option(help="Precision of training.")] = "float32",
    out: OutFolder = Path("results"),
    threads: OneThread = 1,
) -> None:
    """A small network gets ten classes of a public ImageNet model, EfficientNet-Lite0; needs the extra `bench`.

    The target of the committed results is in results/networks: `--runs results/networks` continues them, cell by cell.
    """
    _check(out, "tiny_imagenet", data)
    n_new, n_base = parse_support(support)
    if not n_new or not n_base:
        raise InputError(f"support: images of new and of base classes are needed; got {support!r}")
    chosen = tiny_imagenet.Choice(data, n_new, n_base, new_classes, methods, seeds, source_size, runs, precision)
    with use_threads(threads), progress() as bar:
        cells = Cells(out / "tiny_imagenet.jsonl", {}, compare.KEYS)
        facts = tiny_imagenet.measure(chosen, cells, bar.step)
    claims, command = tiny_imagenet.claims(facts, cells.rows), command_line(context, "tiny-imagenet", _FILES)
    write_results(out, "tiny_imagenet", command, facts, claims, tiny_imagenet.markdown(facts, cells.rows))
    show_claims(claims, out / "tiny_imagenet.md")


def _check(out: Path, name: str, data: str, *inputs: Path | None) -> None:
    """Check before any work that the results can be written."""
    out.mkdir(parents=True, exist_ok=True)
    check_outputs({"out": out / f"{name}.json"}, [data_file(data), *inputs])
    check_outputs({"out": out / f"{name}.md"}, [data_file(data), *inputs])
