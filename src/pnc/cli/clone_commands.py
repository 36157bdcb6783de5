"""The commands that take files of clones: eval, predict, inspect, verify."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
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
from pnc.cli.output import say, show_clone, show_facts, shown
from pnc.composite.file_proof import Check, prove
from pnc.composite.metrics import evaluate
from pnc.composite.prediction import predict
from pnc.data.image_set import class_subset, relabel
from pnc.data.readers import load_data, load_images
from pnc.foundation.class_names import listed
from pnc.foundation.errors import FileFormatError, InputError


def evaluate_clones(
    clones: Annotated[list[Path], typer.Argument(help="Clone files to attach, one or more.")],
    source: Sources,
    target: Target,
    data: Data,
    source_weights: Weights = None,
    target_weights: Weights = None,
    source_classes: Names = None,
    target_classes: Names = None,
    device: Device = "cpu",
    threads: Threads = None,
    json_path: Json = None,
) -> None:
    """Attach clones and measure them on the test split.

    Accuracy on base and on new classes, and how much the target's own answers moved.
    """
    asked = ModelOptions("target", target, target_weights, target_classes, device)
    sources = [ModelOptions("source", spec, source_weights, source_classes, device) for spec in source]
    check_outputs({"json": json_path}, [*clones, asked.file, *(one.file for one in sources), data_file(data)])
    check_trained(asked, *sources)
    read_device(device)
    known = [read_clone_facts(path) for path in clones]
    images = load_data(data, "test")
    model = load_network(asked, known[0].base_classes, images.input_shape)
    check_input_shape(images, model)
    net = attach_clones(known, sources, model)
    there = [name for name, count in images.counts().items() if count and name in net.classes]
    if not set(there) & set(model.classes) or set(there) <= set(model.classes):
        raise InputError(
            f"data: images of base and of new classes are needed; of {listed(net.classes)} "
            f"there are images of {listed(there)} only"
        )
    test = relabel(class_subset(images, there), net.classes)
    with use_threads(threads):
        logits, target_logits = predict(net, test.images), predict(model.module, test.images)
    facts = {
        "clones": list(net.clones),
        "classes": list(net.classes),
        "classes_without_images": [name for name in net.classes if name not in there],
        "n_images": len(test),
        **vars(evaluate(logits, test.labels, target_logits)),
        "base_logits_equal": torch.equal(logits[:, : len(model.classes)], target_logits),
    }
    write_json(json_path, facts)
    show_facts({key.replace("_", " "): shown(value) for key, value in facts.items()})


def predict_images(
    images: Annotated[list[Path], typer.Argument(help="Image files; cropped and resized to what the target takes.")],
    clones: Annotated[list[Path], typer.Option("--clone", help="Clone file to attach; may be given again.")],
    source: Sources,
    target: Target,
    source_weights: Weights = None,
    target_weights: Weights = None,
    source_classes: Names = None,
    target_classes: Names = None,
    top: Annotated[int, typer.Option(help="Classes to show for each image.", min=1)] = 3,
    device: Device = "cpu",
    json_path: Json = None,
) -> None:
    """Say what is on images, with clones attached."""
    asked = ModelOptions("target", target, target_weights, target_classes, device)
    sources = [ModelOptions("source", spec, source_weights, source_classes, device) for spec in source]
    check_outputs({"json": json_path}, [*images, *clones, asked.file, *(one.file for one in sources)])
    check_trained(asked, *sources)
    read_device(device)
    known = [read_clone_facts(path) for path in clones]
    model = load_network(asked, known[0].base_classes, known[0].input_shape)
    pixels = load_images(images, model.input_shape)
    net = attach_clones(known, sources, model)
    best = predict(net, pixels).float().softmax(1).topk(min(top, len(net.classes)), dim=1)
    facts = [
        {
            "image": str(path),
            "classes": [
                {"class": net.classes[index], "probability": probability}
                for probability, index in zip(row.tolist(), ids.tolist(), strict=True)
            ],
        }
        for path, row, ids in zip(images, best.values, best.indices, strict=True)
    ]
    write_json(json_path, {"predictions": facts})
    for fact in facts:
        answers: Any = fact["classes"]
        say(f"{fact['image']}: " + ", ".join(f"{a['class']} ({a['probability']:.2f})" for a in answers))


def inspect_clone(file: Annotated[Path, typer.Argument(help="Clone file.")], json_path: Json = None) -> None:
    """Say what a clone file holds.

    Classes, position, cost; with --json also which networks it belongs to.
    """
    check_outputs({"json": json_path}, [file])
    facts = read_clone_facts(file)
    show_clone(facts)
    write_json(json_path, facts.all)


def verify_clone(
    file: Annotated[Path, typer.Argument(help="Clone file.")],
    target: Target,
    source: Annotated[
        str | None, typer.Option(help="Network that the clone was made from; without it nothing is attached.")
    ] = None,
    source_weights: Weights = None,
    target_weights: Weights = None,
    source_classes: Names = None,
    target_classes: Names = None,
    device: Device = "cpu",
    json_path: Json = None,
) -> None:
    """Prove that a clone file is whole, belongs to these networks, and changes nothing of the target.

    Attaches the clone, compares the target's own logits bit for bit, detaches it, and compares everything. Exits with 0
    if all is well and with 1 if something is not.
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
        models = [load_network(one, own, known.input_shape).module for one, own in zip(asked, names, strict=False)]
        checks = prove(file, *models)
    ok = all(check.ok for check in checks)
    write_json(json_path, {"file": str(file), "ok": ok, "checks": [dataclasses.asdict(check) for check in checks]})
    if checks[0].ok:
        show_facts({check.what: check.found for check in checks if check.ok})
    if not ok:
        say(f"FAILED: {checks[-1].what}: {checks[-1].found}")
        raise typer.Exit(1)
    say(f"verified: {file}")
