"""The command `pnc calibrate`: clones that were made separately, calibrated together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pnc.cli.arguments import (
    CompositeOptions,
    ModelOptions,
    attach_clones,
    check_outputs,
    data_file,
    draw,
    parse_support,
    use_threads,
)
from pnc.cli.options import (
    Data,
    Device,
    Json,
    Seed,
    SourceNames,
    Sources,
    SourceWeights,
    Support,
    Target,
    TargetNames,
    TargetWeights,
    Threads,
    write_json,
)
from pnc.cli.output import progress, say, show_facts
from pnc.clones.clone_file import save
from pnc.data.readers import load_data
from pnc.foundation.class_names import listed
from pnc.foundation.errors import InputError
from pnc.method.calibration import calibrate


def calibrate_clones(
    clones: Annotated[list[Path], typer.Argument(help="Clone files: all that will be attached together.")],
    target: Target,
    data: Data,
    out: Annotated[
        list[Path], typer.Option(help="Folder for the calibrated files; or repeat it with a file for each clone.")
    ],
    support: Support = "20/5",
    background: Annotated[
        str | None, typer.Option(help="Unlabelled images that the target is used on: in the forms of --data.")
    ] = None,
    source: Sources = None,
    source_weights: SourceWeights = None,
    target_weights: TargetWeights = None,
    source_classes: SourceNames = None,
    target_classes: TargetNames = None,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    json_path: Json = None,
) -> None:
    """Calibrate clones that were made separately, for use together.

    Fits a scale and offsets of each clone, all clones together, on a few images of all classes, and writes a new file
    for each. Takes seconds. Repeat it after adding or removing a clone: it always starts from the uncalibrated clones.
    """
    networks = [ModelOptions("source", spec, source_weights, source_classes, device) for spec in source or ()]
    asked = CompositeOptions(clones, networks, ModelOptions("target", target, target_weights, target_classes, device))
    outputs = _outputs(out, clones)
    data_files = [data_file(spec) for spec in (data, background) if spec is not None]
    inputs = [*asked.files, *data_files]
    _check_files(outputs, json_path, inputs)
    parse_support(support)
    known = asked.read()
    with progress() as bar, use_threads(threads):
        bar.wait("reading images")
        images = load_data(data, "train")
        unlabelled = None if background is None else load_data(background, "train")
        bar.wait("attaching")
        net = attach_clones(asked, known, images)
        new = net.classes[len(net.base_classes) :]
        drawn = draw(images, new, net.base_classes, support, seed)
        bar.wait("calibrating")
        found = calibrate(net, drawn, background=unlabelled)
    for facts, name, path in zip(known, net.clones, outputs, strict=True):
        path.parent.mkdir(exist_ok=True)
        save(net.clone(name), path, facts.all["kind"])
    losses = {"loss_before": found.loss_before, "loss_after": found.loss_after}
    scales = {name: scalars.scale for name, scalars in found.scalars.items()}
    shared = {"clones": list(net.clones), "out": [*map(str, outputs)], **losses, "scales": scales}
    write_json(json_path, {**shared, "n_images": found.n_images, "has_base": found.has_base})
    show_facts(
        {
            "clones": ", ".join(net.clones),
            "images": str(found.n_images),
            "log-loss": f"{found.loss_before:.4g} before, {found.loss_after:.4g} after",
            "scales": ", ".join(f"{scale:.3g}" for scale in scales.values()),
            **({} if found.has_base else {"base against new": "not calibrated, as there was no base image"}),
        }
    )
    for path in outputs:
        say(f"{path}: written")


def _outputs(out: Sequence[Path], clones: Sequence[Path]) -> list[Path]:
    """The output file of each clone: in the given folder, which may be new, or as given."""
    if len(out) == 1 and (out[0].is_dir() or len(clones) > 1):
        names = [path.name for path in clones]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise InputError(f"out: two clone files are called {twice[0]}; give --out a file for each clone")
        if out[0].exists() and not out[0].is_dir():
            raise InputError(
                f"out: {out[0]} is a file; give a folder, or --out a file for each of {len(clones)} clones"
            )
        return [out[0] / name for name in names]
    if len(out) != len(clones):
        raise InputError(
            f"out: give one folder or {len(clones)} files, one for each clone; got {listed([*map(str, out)])}"
        )
    return list(out)


def _check_files(outputs: Sequence[Path], json_path: Path | None, inputs: Sequence[str | Path | None]) -> None:
    """Check that all files can be written; a new folder is checked in their place."""
    folder = outputs[0].parent
    if folder.is_dir():
        named = {"out" if place == 0 else f"out ({place + 1})": path for place, path in enumerate(outputs)}
        check_outputs({**named, "json": json_path}, inputs)
    else:
        check_outputs({"out": folder, "json": json_path}, inputs)
