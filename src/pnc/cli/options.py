"""Options that several commands share."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pnc.cli.output import STANDARD_OUTPUT, only_json, write_line
from pnc.foundation.argument_checks import MAX_THREADS
from pnc.foundation.file_writing import write_file

Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="Write the same facts here as JSON; - writes them, and nothing else, to standard output.",
        callback=only_json,
    ),
]
Seed = Annotated[int, typer.Option(help="Of every random choice.", min=0, max=2**63 - 1)]
Threads = Annotated[
    int | None, typer.Option(help="Threads for torch; its own default if not given.", min=1, max=MAX_THREADS)
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
Source = Annotated[
    str, typer.Option(help="Network that knows the new classes: a file of `pnc pretrain`, timm:..., hf:..., ...")
]
Sources = Annotated[list[str], typer.Option("--source", help="Source of each clone, in order; one serves for all.")]
Target = Annotated[
    str, typer.Option(help="Network that gets the new classes: a file of `pnc pretrain`, timm:..., hf:..., ...")
]
Weights = Annotated[Path | None, typer.Option(help="Weights of that network: .safetensors or a state-dict checkpoint.")]
Names = Annotated[str | None, typer.Option(help="Names of that network's outputs, in order, separated by commas.")]
Data = Annotated[str, typer.Option(help="Images: digits, parquet:PATH, folder:PATH, hf:NAME.")]
MaxMacs = Annotated[float | None, typer.Option(help="Bound on added MACs, as a share of the source's, such as 0.5.")]
MaxBytes = Annotated[int | None, typer.Option(help="Bound on the bytes of a thin clone file.")]
Flip = Annotated[bool, typer.Option(help="Use mirror images too: right for photographs, wrong for digits.")]
Memory = Annotated[
    float,
    typer.Option(
        help="GiB that may be kept of the images; what is beyond goes to a temporary file.", min=0.001, max=1e6
    ),
]


def write_json(path: Path | None, facts: Mapping[str, Any]) -> None:
    """Write the facts that a command shows, where `--json` asks for them."""
    text = json.dumps(facts, indent=2)
    if path == STANDARD_OUTPUT:
        write_line(text)
    elif path is not None:
        write_file(path, text + "\n")
