"""The command `pnc report`: an HTML report on clones."""

from pathlib import Path
from typing import Annotated

import typer

from pnc.cli.arguments import (
    CompositeOptions,
    ModelOptions,
    attach_clones,
    check_outputs,
    data_file,
    use_threads,
)
from pnc.cli.options import (
    Data,
    Device,
    Json,
    SourceNames,
    Sources,
    SourceWeights,
    Target,
    TargetNames,
    TargetWeights,
    Threads,
    write_json,
)
from pnc.cli.output import progress, say
from pnc.composite.evaluation import evaluate
from pnc.data.readers import load_data
from pnc.foundation.errors import InputError
from pnc.report.page import check_page_path, check_report, write_report


def report_clones(
    clones: Annotated[list[Path], typer.Argument(help="Clone files to attach, one or more.")],
    target: Target,
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML page to write.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(help="Folder to write the pictures to as PNG files too.")] = None,
    source: Sources = None,
    source_weights: SourceWeights = None,
    target_weights: TargetWeights = None,
    source_classes: SourceNames = None,
    target_classes: TargetNames = None,
    device: Device = "cpu",
    threads: Threads = None,
    json_path: Json = None,
) -> None:
    """Write a report on clones: one self-contained HTML page.

    Attaches the clones and measures them on the test split. The page shows their positions, confusion matrices with
    images, leak, calibration, costs, and what was verified.
    """
    check_report()
    check_page_path(out, "out")
    networks = [ModelOptions("source", spec, source_weights, source_classes, device) for spec in source or ()]
    asked = CompositeOptions(clones, networks, ModelOptions("target", target, target_weights, target_classes, device))
    check_outputs({"out": out, "json": json_path}, [*asked.files, data_file(data)])
    if png is not None and not png.is_dir():
        if png.exists():
            raise InputError(f"png: {png} is a file; give a folder")
        check_outputs({"png": png})
    known = asked.read()
    with progress() as bar, use_threads(threads):
        bar.wait("reading images")
        images = load_data(data, "test")
        bar.wait("attaching")
        net = attach_clones(asked, known, images)
        bar.wait("measuring and drawing")
        write_report(net, images, out, files=clones, png=png)
        if json_path is not None:
            write_json(json_path, {"out": str(out), **evaluate(net, images).facts()})
    say(f"{out}: written, {out.stat().st_size:,} bytes")
