"""The command `pnc bench scale`."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from pnc.bench import scale
from pnc.bench.result_files import Cells, write_results
from pnc.cli.arguments import check_outputs, read_device
from pnc.cli.bench_options import show_claims
from pnc.cli.options import Device
from pnc.cli.output import progress
from pnc.cli.plots import draw_growth
from pnc.foundation.errors import InputError


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
