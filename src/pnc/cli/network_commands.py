"""The commands on one network: pretrain trains a reference network, cuts lists where one can be cut."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pnc.cli.arguments import ModelOptions, check_outputs, data_file, load_network, parse_shape, read_device
from pnc.cli.options import Data, Device, Json, Names, Seed, Threads, Weights, write_json
from pnc.cli.output import say, show_table
from pnc.data.image_set import class_subset
from pnc.data.readers import load_data
from pnc.foundation.class_names import parse_classes
from pnc.graph.candidate_cuts import gaps
from pnc.graph.cut_points import cut_points
from pnc.method.task import Precision, read_network
from pnc.models import pretraining


def pretrain_network(
    spec: Annotated[
        str, typer.Argument(help="zoo:cnn, zoo:resnet20, zoo:resnet32, zoo:mobilenetv2, zoo:vit_tiny, ...")
    ],
    data: Data,
    out: Annotated[Path, typer.Option(help="File to write, .safetensors; a stopped run continues.")],
    classes: Annotated[str | None, typer.Option(help="Names or index ranges; all classes by default.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay of weight matrices and filters.")] = None,
    crop_padding: Annotated[int | None, typer.Option(help="Largest shift by random cropping, in pixels.")] = None,
    flip: Annotated[bool, typer.Option(help="Mirror each image with probability 1/2.")] = True,
    precision: Annotated[Precision, typer.Option(help="bfloat16 is faster on processors that support it.")] = "float32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that was made with other arguments.")
    ] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    json_path: Json = None,
) -> None:
    """Train a reference network and save its weights."""
    given = {
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "weight_decay": weight_decay,
        "crop_padding": crop_padding,
        "threads": threads,
    }
    settings = {**pretraining.recipe_for(spec).facts(), **{k: value for k, value in given.items() if value is not None}}
    settings |= {"flip": flip, "precision": precision, "seed": seed, "device": device}
    recipe = pretraining.Recipe(**settings)
    check_outputs({"out": out, "json": json_path}, [data_file(data)])
    read_device(device)
    train, test = load_data(data, "train"), load_data(data, "test")
    names = train.classes if classes is None else parse_classes(classes, train.classes)
    reports = []

    def report(epoch: pretraining.EpochReport) -> None:
        reports.append(epoch)
        say(
            f"epoch {epoch.epoch}/{epoch.epochs}: loss {epoch.train_loss:.3f}, "
            f"test accuracy {epoch.test_accuracy:.3f}, {epoch.seconds:.1f} s"
        )

    model = pretraining.pretrain(
        spec, class_subset(train, names), class_subset(test, names), recipe, out, progress=report, overwrite=overwrite
    )
    facts = {
        "out": str(out),
        "spec": spec,
        "classes": list(names),
        "test_accuracy": model.facts["test_accuracy"],
        "seconds_per_epoch": [epoch.seconds for epoch in reports],
    }
    write_json(json_path, facts)
    made = "" if reports else "made before, with the same arguments: "
    say(f"{out}: {made}{spec}, {len(names)} classes, test accuracy {facts['test_accuracy']:.3f}")


def list_cuts(
    model: Annotated[
        str, typer.Argument(help="A file of `pnc pretrain`, zoo:..., timm:..., torchvision:..., hf:..., py:...")
    ],
    weights: Weights = None,
    classes: Names = None,
    input_shape: Annotated[
        str | None, typer.Option(help="Channels,height,width, such as 3,32,32; for networks without a file.")
    ] = None,
    json_path: Json = None,
) -> None:
    """List where a network can be cut, and how deep; class names are not needed."""
    asked = ModelOptions("model", model, weights, classes)
    check_outputs({"json": json_path}, [asked.file])
    loaded = load_network(asked, input_shape=parse_shape(input_shape), unnamed=True)
    example = torch.rand(2, *loaded.input_shape, generator=torch.Generator().manual_seed(0))
    network = read_network(loaded.module, example, loaded.classes, "model")
    rows: list[dict[str, Any]] = [
        {
            "name": cut.name,
            "scope": cut.scope,
            "kind": cut.kind,
            "shape": list(cut.shape),
            "macs_share": cut.n_macs / max(network.n_macs, 1),
            "params_share": cut.n_params / max(network.n_params, 1),
        }
        for cut in cut_points(network.recording)
    ]
    largest, *others = gaps(network.recording)
    large = [largest, *(gap for gap in others if gap.is_large)]
    facts = {
        "cuts": rows,
        "largest_gap": dataclasses.asdict(largest),
        "large_gaps": [dataclasses.asdict(gap) for gap in large],
        "features": network.head.features.name,
        "classifier": network.head.module,
    }
    write_json(json_path, facts)
    show_table(
        ("cut", "kind", "shape", "MACs", "params", "in module"),
        [
            (row["name"], row["kind"], "x".join(map(str, row["shape"])), f"{row['macs_share']:.1%}",
             f"{row['params_share']:.1%}", row["scope"])
            for row in rows
        ],
    )  # fmt: skip
    say("MACs, params: share of the network's before the cut")
    for gap in large:
        what = "largest gap" if gap is largest else "other gap"
        of = f"{gap.share:.1%} of MACs, {gap.params_share:.1%} of params"
        say(f"{what}: {of}, between {gap.after} and {gap.before}")
    say(f"classifier: {network.head.module or '(no module)'}; its features: {network.head.features.name}")
