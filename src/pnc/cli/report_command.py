"""The command `pnc report`: an HTML report on clones."""

from pathlib import Path
from typing import Annotated

import typer

from pnc.cli.arguments import (
    ModelOptions,
    attach_clones,
    check_input_shape,
    check_outputs,
    check_trained,
    data_file,
    load_network,
    read_clone_facts,
    read_device,
    use_threads,
)
from pnc.cli.options import Data, Device, Json, Names, Sources, Target, Threads, Weights, write_json
from pnc.cli.output import say
from pnc.composite.evaluation import evaluate
from pnc.data.readers import load_data
from pnc.foundation.errors import InputError
from pnc.report.page import check_report, write_report


def report_clones(
    clones: Annotated[list[Path], typer.Argument(help="Clone files to attach, one or more.")],
    source: Sources,
    target: Target,
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML page to write.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(help="Folder to write the pictures to as PNG files too.")] = None,
    source_weights: Weights = None,
    target_weights: Weights = None,
    source_classes: Names = None,
    target_classes: Names = None,
    device: Device = "cpu",
    threads: Threads = None,
    json_path: Json = None,
) -> None:
    """Write a report on clones: one self-contained HTML page.

    Attaches the clones and measures them on the test split. The page shows their positions, confusion matrices with
    images, leak, calibration, costs, and what was verified.
    """
    check_report()
    asked = ModelOptions("target", target, target_weights, target_classes, device)
    sources = [ModelOptions("source", spec, source_weights, source_classes, device) for spec in source]
    check_outputs(
        {"out": out, "json": json_path}, [*clones, asked.file, *(one.file for one in sources), data_file(data)]
    )
    if png is not None and not png.is_dir():
        if png.exists():
            raise InputError(f"png: {png} is a file; give a folder")
        check_outputs({"png": png})
    check_trained(asked, *sources)
    read_device(device)
    known = [read_clone_facts(path) for path in clones]
    images = load_data(data, "test")
    model = load_network(asked, known[0].base_classes, images.input_shape)
    check_input_shape(images, model)
    net = attach_clones(known, sources, model)
    with use_threads(threads):
        write_report(net, images, out, files=clones, png=png)
        if json_path is not None:
            write_json(json_path, {"out": str(out), **evaluate(net, images).facts()})
    say(f"{out}: written, {out.stat().st_size:,} bytes")
