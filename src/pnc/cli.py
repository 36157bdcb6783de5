"""The `pnc` command. Every command takes `--json PATH` for the facts that it prints, and exits with 2 on bad input."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from pnc import checkpoint, cloning, composite, pretraining
from pnc import demo as demonstration
from pnc.bench import main_job
from pnc.cuts import cut_points
from pnc.data import ImageSet, class_subset, draw_support, images_as_float, parse_classes, relabel
from pnc.errors import InputError, PNCError
from pnc.files import write_file
from pnc.localization import Method
from pnc.metrics import evaluate
from pnc.models import LoadedModel, load_model
from pnc.readers import load_data, load_images
from pnc.task import read_network

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Partial network cloning: give a trained classifier classes of another one, without changing a bit of it.",
)
console = Console()

Json = Annotated[Path | None, typer.Option("--json", help="Write the same facts here as JSON.")]
Seed = Annotated[int, typer.Option(help="Of every random choice.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
Source = Annotated[
    str, typer.Option(help="Model that knows the classes: a .safetensors of `pretrain`, zoo:..., py:...")
]
Target = Annotated[str, typer.Option(help="Model that shall get them: likewise.")]
Weights = Annotated[Path | None, typer.Option(help="Its weights: .safetensors or a state-dict checkpoint.")]
Names = Annotated[str | None, typer.Option(help="Names of its outputs, in order, separated by commas.")]
Data = Annotated[str, typer.Option(help="Images: digits, parquet:PATH, folder:PATH, hf:NAME.")]
CloneFile = Annotated[Path, typer.Argument(help="Clone file.")]


@app.command()
def demo(
    seed: Seed = 0,
    threads: Annotated[int | None, typer.Option(help="Threads for torch; its own default where not given.")] = None,
    json_path: Json = None,
) -> None:
    """Clone digits 5-9 from one small network into another one that knows 0-4, beside four other ways to do it."""
    if threads is not None:
        torch.set_num_threads(threads)
    with _progress() as bar:
        facts = demonstration.run_demo(
            seed,
            progress=bar.step,
            trained=lambda role, report: bar.step(f"training the {role}", report.epoch, report.epochs),
        )
    console.print("A target that knows digits 0-4 gets 5-9 from a source: 20 images of each, and 5 of each old digit.")
    print_job(facts)
    _write_json(json_path, facts)


@app.command()
def pretrain(
    spec: Annotated[
        str, typer.Argument(help="zoo:cnn, zoo:resnet20, zoo:resnet32, zoo:mobilenetv2, zoo:vit_tiny, ...")
    ],
    data: Data,
    out: Annotated[Path, typer.Option(help="File to write, .safetensors; a stopped run goes on where it was.")],
    classes: Annotated[
        str | None, typer.Option(help="Classes to learn: names or index ranges; all by default.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    flip: Annotated[bool, typer.Option(help="Mirror half of the images.")] = True,
    threads: Annotated[int | None, typer.Option(help="Threads for torch.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a file that was made otherwise.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    json_path: Json = None,
) -> None:
    """Train a reference network on some classes of a data set, and keep its weights."""
    given = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "threads": threads}
    recipe = pretraining.recipe_for(spec)
    settings = {**recipe.facts(), **{name: value for name, value in given.items() if value is not None}}
    recipe = pretraining.Recipe(**{**settings, "flip": flip, "seed": seed, "device": device})
    train, test = load_data(data, "train"), load_data(data, "test")
    names = train.classes if classes is None else parse_classes(classes, train.classes)
    reports = []

    def report(epoch: pretraining.EpochReport) -> None:
        reports.append(epoch)
        console.print(
            f"epoch {epoch.epoch}/{epoch.epochs}: loss {epoch.train_loss:.3f}, "
            f"test accuracy {epoch.test_accuracy:.3f}, {epoch.seconds:.1f} s"
        )

    model = pretraining.pretrain(
        spec, class_subset(train, names), class_subset(test, names), recipe, out, progress=report, overwrite=overwrite
    )
    accuracy = model.facts["test_accuracy"]
    console.print(f"{out}: {spec}, {len(names)} classes, test accuracy {accuracy:.3f}")
    _write_json(
        json_path,
        {
            "out": str(out),
            "spec": spec,
            "classes": list(names),
            "test_accuracy": accuracy,
            "seconds_per_epoch": [epoch.seconds for epoch in reports],
        },
    )


@app.command()
def clone(
    source: Source,
    target: Target,
    data: Data,
    out: Annotated[Path, typer.Option(help="Clone file to write.")],
    classes: Annotated[str | None, typer.Option(help="Classes to clone; by default all that the target lacks.")] = None,
    support: Annotated[
        str, typer.Option(help="Images per new / per base class, drawn from the training split.")
    ] = "20/5",
    source_weights: Weights = None,
    target_weights: Weights = None,
    source_classes: Names = None,
    target_classes: Names = None,
    flip: Annotated[bool, typer.Option(help="Use mirror images too: right for photographs, wrong for digits.")] = False,
    density: Annotated[float, typer.Option(help="Share of the prunable parameters to keep, in (0, 1].")] = 1.0,
    method: Annotated[Method, typer.Option(help="How channels are chosen below density 1.")] = "taylor",
    max_macs: Annotated[float | None, typer.Option(help="Bound on added MACs, as a share of the source's.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the clone.")] = None,
    kind: Annotated[
        checkpoint.Kind, typer.Option(help="thin: without the source's weights; full: with them.")
    ] = "thin",
    seed: Seed = 0,
    device: Device = "cpu",
    json_path: Json = None,
) -> None:
    """Clone classes of a source for a target from a few images, and write the clone to a file."""
    images = load_data(data, "train")
    source_model = _load(source, source_weights, source_classes, images, device)
    target_model = _load(target, target_weights, target_classes, images, device)
    base = target_model.classes
    lacking = [known for known in source_model.classes if known not in base]
    new = lacking if classes is None else parse_classes(classes, source_model.classes)
    n_new, n_base = _parse_support(support)
    generator = torch.Generator().manual_seed(seed)
    with _progress() as bar:
        made = cloning.clone(
            source_model.module,
            target_model.module,
            draw_support(images, new, base, n_new, n_base, generator),
            classes=new,
            source_classes=source_model.classes,
            base_classes=base,
            name=name,
            density=density,
            method=method,
            max_macs=max_macs,
            flip=flip,
            seed=seed,
            progress=bar.step,
        )
    checkpoint.save(made, out, kind)
    _print_clone(out, json_path)


@app.command("eval")
def evaluate_clones(
    clones: Annotated[list[Path], typer.Argument(help="Clone files to attach, one or more.")],
    source: Annotated[list[str], typer.Option(help="Source of each clone, in order; one serves for all.")],
    target: Target,
    data: Data,
    source_weights: Weights = None,
    target_weights: Weights = None,
    source_classes: Names = None,
    target_classes: Names = None,
    device: Device = "cpu",
    json_path: Json = None,
) -> None:
    """Attach clones to their target and measure accuracy and locality on the test split."""
    images = load_data(data, "test")
    target_model = _load(target, target_weights, target_classes, images, device)
    net = _attached(clones, source, source_weights, source_classes, target_model, images, device)
    known = [known for known in net.classes if known in images.classes]
    test = relabel(class_subset(images, known), net.classes)
    pixels = images_as_float(test.images).to(device)
    logits = main_job.predict(net, pixels)
    target_logits = main_job.predict(target_model.module, pixels)
    measured = evaluate(logits.cpu(), test.labels, target_logits.cpu())
    facts = {
        "classes": list(net.classes),
        "n_images": len(test.labels),
        **vars(measured),
        "base_logits_equal": torch.equal(logits[:, : len(target_model.classes)], target_logits),
    }
    table = Table("measure", "value")
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else _short(value))
    console.print(table)
    _write_json(json_path, facts)


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    clones: Annotated[list[Path], typer.Option("--clone", help="Clone file to attach; may be given again.")],
    source: Annotated[list[str], typer.Option(help="Source of each clone, in order; one serves for all.")],
    target: Target,
    source_weights: Weights = None,
    target_weights: Weights = None,
    source_classes: Names = None,
    target_classes: Names = None,
    top: Annotated[int, typer.Option(help="Classes to show for each image.", min=1)] = 3,
    device: Device = "cpu",
    json_path: Json = None,
) -> None:
    """Say what is on images, with clones attached to their target."""
    target_model = _load(target, target_weights, target_classes, None, device)
    pixels = load_images(images, target_model.input_shape)
    net = _attached(clones, source, source_weights, source_classes, target_model, None, device)
    probabilities = main_job.predict(net, images_as_float(pixels).to(device)).float().softmax(1)
    best = probabilities.topk(min(top, len(net.classes)), dim=1)
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
    table = Table("image", "class (probability)")
    for fact in facts:
        answers: Any = fact["classes"]
        table.add_row(str(fact["image"]), ", ".join(f"{a['class']} ({a['probability']:.2f})" for a in answers))
    console.print(table)
    _write_json(json_path, {"predictions": facts})


@app.command()
def inspect(file: CloneFile, json_path: Json = None) -> None:
    """Say what a clone file holds: classes, position, cost, and which networks it belongs to."""
    _print_clone(file, json_path)


@app.command()
def cuts(
    model: Annotated[str, typer.Argument(help="Model: a .safetensors of `pretrain`, zoo:..., py:...")],
    weights: Weights = None,
    classes: Names = None,
    input_shape: Annotated[str, typer.Option(help="Channels, height, width; from the file where it has them.")] = "",
    json_path: Json = None,
) -> None:
    """List the cut points of a network: where it can be parted, and how deep each lies."""
    shape = _parse_shape(input_shape) if input_shape else None
    names = None if classes is None else tuple(part.strip() for part in classes.split(","))
    loaded = load_model(model, weights, names, shape)
    network = read_network(loaded.module, torch.rand(2, *loaded.input_shape), loaded.classes, "model")
    recording = network.recording
    rows = [
        {
            "name": cut.name,
            "scope": cut.scope,
            "kind": cut.kind,
            "shape": list(cut.shape),
            "macs_share": cut.n_macs / network.n_macs,
            "params_share": cut.n_params / network.n_params,
        }
        for cut in cut_points(recording)
    ]
    table = Table("cut", "in module", "kind", "shape", "MACs before", "parameters before")
    for row in rows:
        shares = [f"{row[share]:.1%}" for share in ("macs_share", "params_share")]
        table.add_row(*(_short(row[key]) for key in ("name", "scope", "kind", "shape")), *shares)
    console.print(table)
    console.print(f"classifier: {network.head.module or '(not a module)'}; features: {network.head.features.name}")
    _write_json(json_path, {"cuts": rows, "features": network.head.features.name, "classifier": network.head.module})


def main() -> None:
    """Run the command line: a wrong input is one line on standard error and exit code 2."""
    try:
        app()
    except PNCError as error:
        Console(stderr=True).print(f"pnc: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def print_job(facts: Mapping[str, Any]) -> None:
    """Print what `main_job.run` found."""
    table = Table("method", "base", "new", "average", "cond. KL", "leak", "seconds", "bytes", title="test accuracy")
    for row in facts["rows"]:
        if "not_applicable" in row:
            table.add_row(row["method"], row["not_applicable"])
            continue
        accuracies = [f"{row[key]:.3f}" for key in ("base_accuracy", "new_accuracy", "average_accuracy")]
        locality = [f"{row['conditional_kl']:.2g}", f"{row['leak']:.3f}"]
        style = "bold" if row["method"] == main_job.CLONE else None
        table.add_row(row["method"], *accuracies, *locality, f"{row['seconds']:.1f}", f"{row['bytes']:,}", style=style)
    console.print(table)
    made, verified = facts["clone"], facts["verified"]
    console.print(
        f"Clone: {made['file_bytes']:,} bytes, from {made['position']['target_cut']!r} of the target to "
        f"{made['position']['source_cut']!r} of the source; adds {made['added_macs_share']:.0%} of its MACs."
    )
    promises = {
        "base_logits_equal": "with the clone attached, the target's own logits are the same bits",
        "reload_equal": "saved, loaded and attached again, it gives the same bits",
        "removed_equal": "with the clone removed, the composite gives the target's bits",
        "target_unchanged": "every parameter, buffer, flag and hook of the target is as before",
    }
    for key, sentence in promises.items():
        console.print(f"  {'verified' if verified[key] else 'FAILED'}: {sentence}")


class _Bar:
    """One progress line at a time, named after what is being done."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._what = progress, ""
        self._id: TaskID | None = None

    def step(self, what: str, done: int, total: int) -> None:
        if what != self._what or self._id is None:
            if self._id is not None:
                self._progress.remove_task(self._id)
            self._what, self._id = what, self._progress.add_task(what, total=total)
        self._progress.update(self._id, completed=done, total=total)


@contextmanager
def _progress() -> Iterator[_Bar]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bar(progress)


def _load(spec: str, weights: Path | None, classes: str | None, images: ImageSet | None, device: str) -> LoadedModel:
    names = None if classes is None else tuple(part.strip() for part in classes.split(","))
    own_shape = spec.endswith(".safetensors") or images is None
    model = load_model(spec, weights, names, None if own_shape else images.input_shape)  # type: ignore[union-attr]
    model.module.to(_device(device))
    return model


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that is not there
        raise InputError(f"device: {name!r} is not usable here ({str(error).splitlines()[0]}); try cpu") from error
    return device


def _attached(
    files: Sequence[Path],
    sources: Sequence[str],
    weights: Path | None,
    classes: str | None,
    target: LoadedModel,
    images: ImageSet | None,
    device: str,
) -> composite.Composite:
    if len(sources) not in (1, len(files)):
        raise InputError(f"source: give one for all {len(files)} clones or one for each; got {len(sources)}")
    models = {spec: _load(spec, weights, classes, images, device) for spec in dict.fromkeys(sources)}
    specs = sources if len(sources) == len(files) else list(sources) * len(files)
    loaded = [checkpoint.load(file, source=models[spec].module) for file, spec in zip(files, specs, strict=True)]
    for one in loaded:
        if one.base_classes != target.classes:
            raise InputError(f"clone {one.name!r} was made for a target of classes {_short(list(one.base_classes))}")
    return composite.attach(target.module, *loaded)


def _parse_support(text: str) -> tuple[int | None, int | None]:
    parts = text.split("/")
    if len(parts) == 2 and all(part.isdigit() or part == "all" for part in parts) and parts[0] != "0":
        n_new, n_base = (None if part == "all" else int(part) for part in parts)
        return n_new, n_base
    raise InputError(f"support: expected NEW/BASE images per class, such as 100/20, 20/0 or all/all; got {text!r}")


def _parse_shape(text: str) -> tuple[int, int, int]:
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
        raise InputError(f"input-shape: expected channels,height,width such as 3,32,32; got {text!r}")
    channels, height, width = (int(part) for part in parts)
    return channels, height, width


def _print_clone(path: Path, json_path: Path | None) -> None:
    facts = checkpoint.inspect(path)
    recipe, position = facts["recipe"], facts["position"]
    table = Table("what", "value")
    table.add_row("name", facts["name"])
    table.add_row("new classes", ", ".join(facts["classes"]))
    table.add_row("base classes", ", ".join(facts["base_classes"]))
    table.add_row("leaves the target at", f"{position['target']['name']} {tuple(position['target']['shape'])}")
    table.add_row("enters the source at", f"{position['source']['name']} {tuple(position['source']['shape'])}")
    table.add_row("support", f"{recipe['n_new_samples']} new, {recipe['n_base_samples']} base images")
    table.add_row("held-out score", f"{recipe['score']:.3f} ± {recipe['standard_error']:.3f}")
    table.add_row("added MACs", f"{recipe['macs_share']:.1%} of the source's")
    table.add_row("density", f"{recipe['density']:g}")
    table.add_row("file", f"{facts['kind']}, format {facts['version']}, {facts['n_bytes']:,} bytes")
    console.print(table)
    _write_json(json_path, facts)


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _write_json(path: Path | None, facts: Mapping[str, Any]) -> None:
    if path is not None:
        write_file(path, json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
