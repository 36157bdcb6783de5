"""The commands `pnc bench backbone` and `pnc bench corruptions`: clones and rivals beyond `pnc bench compare`."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from pnc.bench import backbone, corruptions
from pnc.bench.backbone_networks import WAYS, pair
from pnc.bench.comparison_methods import choose_methods
from pnc.bench.public_network import SMALL_BATCH, public_network
from pnc.bench.setting import Setting
from pnc.cli.arguments import data_file, parse_support
from pnc.cli.bench_options import (
    DataName,
    Mirror,
    NTest,
    OneThread,
    OutFolder,
    PairOptions,
    Seeds,
    Sizes,
    SourceFile,
    TargetFile,
    run_bench,
)
from pnc.cli.options import Data
from pnc.data.image_set import ImageSet, sample_per_class
from pnc.data.readers import load_data
from pnc.foundation.errors import InputError
from pnc.method.task import Progress


def measure_backbone(
    context: typer.Context,
    data: Annotated[str, typer.Option(help="Tiny-ImageNet: parquet:PATH or hf:NAME.")],
    support: Sizes = "20/5",
    tuned: Annotated[str | None, typer.Option(help="How the target was tuned: head, last third, all.")] = None,
    methods: Annotated[str | None, typer.Option(help="Names, separated by commas; all by default.")] = None,
    seeds: Seeds = 3,
    n_test: NTest = None,
    runs: Annotated[Path, typer.Option(help="Folder for the fine-tuned networks.")] = Path("runs"),
    data_name: DataName = None,
    out: OutFolder = Path("results"),
    threads: OneThread = 1,
) -> None:
    """Two networks of one backbone: a fine-tuned EfficientNet-Lite0 gains classes from the public one.

    Takes a few minutes for each target, which is kept, and half an hour for each seed; existing rows are not measured
    again.
    """
    ways = backbone.choose(tuned, list(WAYS), "tuned")
    chosen = backbone.choose(methods, list(backbone.METHODS), "methods")
    n_new, n_base = parse_support(support)
    if not n_new or not n_base:
        raise InputError(f"support: images of new and of base classes are needed; got {support!r}")

    @cache
    def images() -> tuple[ImageSet, ImageSet]:
        return load_data(data, "train"), load_data(data, "test")

    def networks(way: str, progress: Progress | None) -> Setting:
        made = pair(public_network(images()[0].input_shape), images(), way, runs, progress)
        test = made.test if n_test is None else sample_per_class(made.test, n_test, "first")
        return replace(made, test=test, n_test=n_test, n_new=n_new, n_base=n_base, batch_size=SMALL_BATCH)

    facts = {"data": data_name or data, "n_test": n_test, "ways": {name: vars(way) for name, way in WAYS.items()}}
    run_bench(
        context,
        lambda: backbone.bench(networks, ways, support, chosen, range(seeds), facts),
        out / "backbone.json",
        threads,
        [data_file(data)],
    )


def measure_corruptions(
    context: typer.Context,
    source: SourceFile,
    target: TargetFile,
    data: Data,
    support: Sizes = "100/20",
    methods: Annotated[
        str | None, typer.Option(help="Names, separated by commas, as in `pnc bench compare`; some by default.")
    ] = None,
    flip: Mirror = True,
    seeds: Seeds = 3,
    n_test: NTest = None,
    data_name: DataName = None,
    out: OutFolder = Path("results"),
    threads: OneThread = 1,
) -> None:
    """Compare clones and rivals on noisy, blurred and pale test images.

    Takes a few minutes for each method; existing rows are not measured again.
    """
    pair_options = PairOptions(source, target, data, support, flip, data_name, n_test)
    chosen = list(corruptions.USUAL) if methods is None else choose_methods(methods)
    run_bench(
        context,
        lambda: corruptions.bench(pair_options.load(), chosen, range(seeds)),
        out / "corruptions.json",
        threads,
        pair_options.files,
    )
