"""The command `pnc bench zoo`: trains real networks, puts them into a zoo, and measures its ranking."""

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated

import typer

from pnc.bench import zoo as zoo_bench
from pnc.bench.bench import Bench
from pnc.bench.killed_workers import ACTORS, PROCESSES
from pnc.bench.zoo_networks import DATA, SOURCES, TARGETS, Images, load_images, train_network
from pnc.cli.bench_options import OneThread, OutFile, run_bench
from pnc.cli.output import say
from pnc.foundation.errors import InputError
from pnc.models.model_specs import LoadedModel, load_model
from pnc.zoo.model_zoo import Zoo

NETWORKS = "networks"
"""Folder for the files of `pretrain`, within the folder of the bench."""


def measure_zoo(
    context: typer.Context,
    images: Annotated[
        Path, typer.Option(help=f"Folder with {', '.join(DATA)}, each with train.parquet and test.parquet.")
    ],
    networks: Annotated[Path, typer.Option(help="Folder for the networks and the zoo.")] = Path("runs/zoo"),
    n_cloned: Annotated[
        int | None,
        typer.Option(help="Clone from only so many sources for each query, and from the chosen one; by default all."),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Rank with two actors of Ray too, one of which is killed.")
    ] = False,
    train_only: Annotated[bool, typer.Option("--train-only", help="Train the networks, and measure nothing.")] = False,
    json_path: OutFile = Path("results/zoo.json"),
    threads: OneThread = 1,
) -> None:
    """Predicted against real accuracy of clones from real networks, beside other authors' scores.

    Trains what is missing, half an hour of one core; then takes an hour or more. A stopped run continues.
    """
    missing = [data for data in DATA if not (images / data / "train.parquet").is_file()]
    if missing:
        raise InputError(f"images: {images} has no {missing[0]}/train.parquet")
    load = lru_cache(maxsize=1)(partial(load_images, images))
    zoo, targets = _trained(load, networks)
    if train_only:
        return

    def make() -> Bench:
        return zoo_bench.bench(zoo, targets.__getitem__, load, n_cloned, [PROCESSES, *([ACTORS] if ray else [])])

    run_bench(context, make, json_path, threads)


def _trained(load: Callable[[str], Images], folder: Path) -> tuple[Zoo, dict[str, LoadedModel]]:
    """Train the networks that are missing; returns the zoo of the sources, and the targets by name."""
    zoo, targets = Zoo(folder / "entries", create=True), {}
    (folder / NETWORKS).mkdir(exist_ok=True)
    for plan in sorted((*TARGETS, *SOURCES), key=lambda one: DATA.index(one.data)):  # each data set is read once
        path = folder / NETWORKS / f"{plan.name}.safetensors"
        if not path.is_file():
            made = train_network(plan, load(plan.data), path)
            say(f"{plan.name}: {plan.spec}, test accuracy {made.facts['test_accuracy']:.3f}")
        if plan in TARGETS:
            targets[plan.name] = load_model(str(path))
        elif plan.name not in zoo.names:
            zoo.add(plan.name, load_model(str(path)))
    return zoo, targets
