"""Options that several commands share."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pnc.cli.output import STANDARD_OUTPUT, only_json, write_line
from pnc.foundation.argument_checks import MAX_THREADS
from pnc.foundation.file_writing import write_file

NETWORKS, IMAGES, PART, BOUNDS, OUTPUT, MACHINE = "Networks", "Images", "Part", "Bounds", "Output", "Machine"
"""Panels of options in the help of commands."""

Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="Write the shown facts here as JSON; - writes them, and nothing else, to standard output.",
        callback=only_json,
        rich_help_panel=OUTPUT,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.", min=0, max=2**63 - 1, rich_help_panel=MACHINE)]
Threads = Annotated[
    int | None,
    typer.Option(help="Threads for torch; by default torch's own.", min=1, max=MAX_THREADS, rich_help_panel=MACHINE),
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.", rich_help_panel=MACHINE)]
Source = Annotated[
    str,
    typer.Option(
        help="Network that knows the new classes: a file of `pnc pretrain`, timm:..., hf:..., ...",
        rich_help_panel=NETWORKS,
        envvar="PNC_SOURCE",
    ),
]
Sources = Annotated[
    list[str] | None,
    typer.Option(
        "--source",
        help="Source of each clone, in order, or one for all; full files load without.",
        rich_help_panel=NETWORKS,
        envvar="PNC_SOURCE",
    ),
]
Target = Annotated[
    str,
    typer.Option(
        help="Network that receives the new classes: a file of `pnc pretrain`, timm:..., hf:..., ...",
        rich_help_panel=NETWORKS,
        envvar="PNC_TARGET",
    ),
]
Classes = Annotated[
    str | None,
    typer.Option(
        help="Classes to clone; by default all that the target lacks.", rich_help_panel=IMAGES, envvar="PNC_CLASSES"
    ),
]
Support = Annotated[
    str, typer.Option(help="Images per new / per base class, from the training split.", rich_help_panel=IMAGES)
]
_WEIGHTS = "Weights of the {}: .safetensors or a state-dict checkpoint."
_NAMES = "Names of the {}'s outputs, in order, separated by commas."
Weights = Annotated[Path | None, typer.Option(help=_WEIGHTS.format("network"), rich_help_panel=NETWORKS)]
SourceWeights = Annotated[Path | None, typer.Option(help=_WEIGHTS.format("source"), rich_help_panel=NETWORKS)]
TargetWeights = Annotated[Path | None, typer.Option(help=_WEIGHTS.format("target"), rich_help_panel=NETWORKS)]
Names = Annotated[str | None, typer.Option(help=_NAMES.format("network"), rich_help_panel=NETWORKS)]
SourceNames = Annotated[str | None, typer.Option(help=_NAMES.format("source"), rich_help_panel=NETWORKS)]
TargetNames = Annotated[str | None, typer.Option(help=_NAMES.format("target"), rich_help_panel=NETWORKS)]
Data = Annotated[
    str,
    typer.Option(help="Images: digits, parquet:PATH, folder:PATH, hf:NAME.", rich_help_panel=IMAGES, envvar="PNC_DATA"),
]
MaxMacs = Annotated[
    float | None,
    typer.Option(help="Bound on added MACs, as a share of the source's, such as 0.5.", rich_help_panel=BOUNDS),
]
MaxBytes = Annotated[
    int | None, typer.Option(help="Bound on the size of a thin clone file, in bytes.", rich_help_panel=BOUNDS)
]
Flip = Annotated[
    bool, typer.Option(help="Use mirror images too: good for photographs, wrong for digits.", rich_help_panel=IMAGES)
]
Memory = Annotated[
    float,
    typer.Option(
        help="GiB of memory for the images; the rest goes to a temporary file.",
        min=0.001,
        max=1e6,
        rich_help_panel=MACHINE,
    ),
]


def write_json(path: Path | None, facts: Mapping[str, Any]) -> None:
    """Write the facts that a command shows to the path of `--json`, if given."""
    text = json.dumps(facts, indent=2)
    if path == STANDARD_OUTPUT:
        write_line(text)
    elif path is not None:
        write_file(path, text + "\n")
