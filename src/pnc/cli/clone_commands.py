"""The commands on clone files: eval, predict, inspect, verify."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from pnc.cli.arguments import (
    CompositeOptions,
    ModelOptions,
    attach_clones,
    check_outputs,
    check_trained,
    data_file,
    load_network,
    read_clone_facts,
    read_device,
    use_threads,
)
from pnc.cli.image_arguments import image_files
from pnc.cli.options import (
    NETWORKS,
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
from pnc.cli.output import progress, say, show_clone, show_facts, warn
from pnc.composite.answering import predict
from pnc.composite.evaluation import evaluate, uncalibrated_warning
from pnc.composite.file_proof import Check, prove
from pnc.composite.verification import UNPROVEN
from pnc.data.readers import load_data
from pnc.foundation.errors import FileFormatError, InputError


def evaluate_clones(
    clones: Annotated[list[Path], typer.Argument(help="Clone files to attach, one or more.")],
    target: Target,
    data: Data,
    source: Sources = None,
    source_weights: SourceWeights = None,
    target_weights: TargetWeights = None,
    source_classes: SourceNames = None,
    target_classes: TargetNames = None,
    device: Device = "cpu",
    threads: Threads = None,
    json_path: Json = None,
) -> None:
    """Attach clones and measure them on the test split.

    Shows accuracy on base and new classes, and how far predictions moved from the target's.
    """
    networks = [ModelOptions("source", spec, source_weights, source_classes, device) for spec in source or ()]
    asked = CompositeOptions(clones, networks, ModelOptions("target", target, target_weights, target_classes, device))
    check_outputs({"json": json_path}, [*asked.files, data_file(data)])
    known = asked.read()
    with progress() as bar, use_threads(threads):
        bar.wait("reading images")
        images = load_data(data, "test")
        bar.wait("attaching")
        net = attach_clones(asked, known, images)
        found = evaluate(net, images, progress=bar.step)
    write_json(json_path, found.facts())
    say(str(found))


def predict_images(
    images: Annotated[
        list[str],
        typer.Argument(
            help="Image files, folders or patterns such as 'photos/*.jpg'; - reads an image, or one path per line, "
            "from standard input. Images are cropped and resized to the target's input size."
        ),
    ],
    clones: Annotated[list[Path], typer.Option("--clone", help="Clone file to attach; may be repeated.")],
    target: Target,
    source: Sources = None,
    source_weights: SourceWeights = None,
    target_weights: TargetWeights = None,
    source_classes: SourceNames = None,
    target_classes: TargetNames = None,
    top: Annotated[int, typer.Option(help="Number of classes to show for each image.", min=1)] = 3,
    device: Device = "cpu",
    json_path: Json = None,
) -> None:
    """Classify images with clones attached; --json also says which clone answered."""
    networks = [ModelOptions("source", spec, source_weights, source_classes, device) for spec in source or ()]
    asked = CompositeOptions(clones, networks, ModelOptions("target", target, target_weights, target_classes, device))
    with image_files(images) as files:
        check_outputs({"json": json_path}, [*files, *asked.files])
        known = asked.read()
        with progress() as bar:
            bar.wait("attaching")
            net = attach_clones(asked, known)
            found = predict(net, list(files), progress=bar.step)
    answers = list(zip(files.values(), found, strict=True))
    facts = [{**one.facts(top), "image": file} for file, one in answers]
    write_json(json_path, {"predictions": facts})
    for file, one in answers:
        say(f"{file}: {one.text(top)}")
    warning = uncalibrated_warning(net.now().uncalibrated)
    if warning:
        warn(warning)


def inspect_clone(file: Annotated[Path, typer.Argument(help="Clone file.")], json_path: Json = None) -> None:
    """Show what a clone file contains.

    Classes, position and cost; with --json also the fingerprints of its networks.
    """
    check_outputs({"json": json_path}, [file])
    facts = read_clone_facts(file)
    show_clone(facts)
    write_json(json_path, facts.all)


def verify_clone(
    file: Annotated[Path, typer.Argument(help="Clone file.")],
    target: Target,
    source: Annotated[
        str | None,
        typer.Option(
            help="Network that the clone was made from; without it only a full file is attached.",
            envvar="PNC_SOURCE",
            rich_help_panel=NETWORKS,
        ),
    ] = None,
    source_weights: SourceWeights = None,
    target_weights: TargetWeights = None,
    source_classes: SourceNames = None,
    target_classes: TargetNames = None,
    device: Device = "cpu",
    json_path: Json = None,
) -> None:
    """Verify that a clone file is intact, belongs to these networks, and does not change the target.

    Attaches the clone, compares the target's own logits bit for bit, detaches it, and compares everything. Exits with 0
    if every check passes and with 1 if one fails.
    """
    asked = [ModelOptions("target", target, target_weights, target_classes, device)]
    if source is not None:
        asked.append(ModelOptions("source", source, source_weights, source_classes, device))
    check_outputs({"json": json_path}, [file, *(one.file for one in asked)])
    if not file.is_file():
        raise InputError(f"file: there is no file {file}")
    check_trained(*asked)
    read_device(device)
    try:
        known = read_clone_facts(file)
    except FileFormatError as error:
        checks: tuple[Check, ...] = (Check("file", False, str(error)),)
    else:
        names = (known.base_classes, None)
        models = [load_network(one, own, known.input_shape) for one, own in zip(asked, names, strict=False)]
        checks = prove(file, *(model.module for model in models), base_classes=models[0].classes)
    ok = all(check.ok for check in checks)
    listed_checks = [dataclasses.asdict(check) for check in checks]
    write_json(json_path, {"file": str(file), "ok": ok, "checks": listed_checks, "unproven": UNPROVEN})
    if checks[0].ok:
        show_facts({check.what: check.found for check in checks if check.ok})
    if not ok:
        say(f"FAILED: {checks[-1].what}: {checks[-1].found}")
        raise typer.Exit(1)
    show_facts({"not proven": UNPROVEN})
    say(f"verified: {file}")
