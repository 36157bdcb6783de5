"""The commands `pnc export` and `pnc bench export`: export of composites, and its measurement."""

from pathlib import Path
from typing import Annotated

import typer

from pnc.bench import export as export_bench
from pnc.cli.arguments import (
    CompositeOptions,
    ModelOptions,
    attach_clones,
    check_outputs,
    use_threads,
)
from pnc.cli.bench_options import OutFile, run_bench
from pnc.cli.options import (
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
from pnc.composite.export import check_export_folder, check_export_path, export, export_split
from pnc.composite.program_files import BATCH_SIZES


def export_clones(
    clones: Annotated[list[Path], typer.Argument(help="Clone files to attach, one or more.")],
    target: Target,
    out: Annotated[Path, typer.Option(help="File to write, .onnx or .pt2; with --split, a folder.")],
    split: Annotated[
        bool,
        typer.Option("--split", help="Write trunk.onnx and one file per clone, to attach and detach in onnxruntime."),
    ] = False,
    source: Sources = None,
    source_weights: SourceWeights = None,
    target_weights: TargetWeights = None,
    source_classes: SourceNames = None,
    target_classes: TargetNames = None,
    threads: Threads = None,
    json_path: Json = None,
) -> None:
    """Attach clones and write the composite as ONNX or .pt2, for any batch size.

    The export is run and compared with the composite first; if it differs by more than rounding, nothing is written.
    """
    networks = [ModelOptions("source", spec, source_weights, source_classes) for spec in source or ()]
    asked = CompositeOptions(clones, networks, ModelOptions("target", target, target_weights, target_classes))
    check_outputs({"json": json_path} if split else {"out": out, "json": json_path}, asked.files)
    (check_export_folder if split else check_export_path)(out, "out")
    known = asked.read()
    with progress() as bar, use_threads(threads):
        bar.wait("attaching")
        net = attach_clones(asked, known)
        bar.wait("exporting")
        made = (export_split if split else export)(net, out)
    sizes = {path.name if split else str(path): path.stat().st_size for path in made.files}
    write_json(
        json_path,
        {
            "out": str(out),
            "files": sizes,
            "clones": list(net.clones),
            "classes": list(net.classes),
            "largest_difference": made.difference,
            "batch_sizes": list(BATCH_SIZES),
        },
    )
    for name, n_bytes in sizes.items():
        say(f"{out / name if split else name}: {n_bytes:,} bytes")
    tried = ", ".join(map(str, BATCH_SIZES))
    say(
        f"run on batches of {tried}: logits differ from the composite's by at most {made.difference:.1g} of the largest"
    )


def measure_exports(
    context: typer.Context,
    pairs: Annotated[
        str | None, typer.Option(help="Patterns of pairs, separated by commas, such as 'zoo:*'; all by default.")
    ] = None,
    json_path: OutFile = Path("results/export.json"),
) -> None:
    """Export composites of the zoo, timm, torchvision and transformers; compare, weigh and time the results.

    Takes a quarter of an hour. Rows are written as they are measured; a stopped run continues after the last one.
    """
    wanted = export_bench.chosen(pairs)
    run_bench(context, lambda: export_bench.bench(wanted), json_path, threads=1)  # timings are of one thread
