"""The `pnc zoo` commands: a folder of networks, and which of them to clone from."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from pnc.cli.arguments import (
    ModelOptions,
    check_input_shape,
    check_outputs,
    check_trained,
    data_file,
    draw,
    load_network,
    parse_shape,
    parse_support,
    read_device,
    use_threads,
)
from pnc.cli.option_names import Commands
from pnc.cli.options import (
    Data,
    Device,
    Flip,
    Json,
    Memory,
    Names,
    Seed,
    Support,
    Target,
    TargetNames,
    TargetWeights,
    Threads,
    Weights,
    write_json,
)
from pnc.cli.output import progress, say, show_facts, show_table, warn
from pnc.data.image_store import GIB, MEMORY
from pnc.data.normalization import Normalization
from pnc.data.readers import load_data
from pnc.foundation.class_names import listed, parse_classes
from pnc.foundation.errors import ClassNameError, FileFormatError, InputError
from pnc.foundation.plain_text import few_names
from pnc.models.preprocessing import shape_text
from pnc.zoo.entries import Entry, check_entry_name
from pnc.zoo.model_zoo import Zoo, left_over
from pnc.zoo.rank import N_FINALISTS, rank
from pnc.zoo.ranking import Ranking

_HELP = "Keep networks in a folder, and find out which of them to clone classes from."
SHOWN = 15
"""Sources of a ranking that are shown; --json writes all."""

zoo_commands = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode=None, help=_HELP)

Folder = Annotated[Path, typer.Option("--zoo", help="Folder of the zoo.")]
Name = Annotated[str, typer.Argument(help="Name of the entry.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Also load networks whose spec is py:..., which runs that code.")
]


@zoo_commands.callback(help=_HELP)
def start() -> None:
    """Group the commands under `pnc zoo`."""


@zoo_commands.command("add")
def add_entry(
    name: Name,
    zoo: Folder,
    model: Annotated[
        str, typer.Option(help="A file of `pnc pretrain`, zoo:..., timm:..., torchvision:..., hf:..., py:...")
    ],
    weights: Weights = None,
    classes: Names = None,
    input_shape: Annotated[
        str | None, typer.Option(help="Channels,height,width, such as 3,32,32; for networks without a file.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Mean of images in [0, 1], one number or one for each channel: 0.5,0.5,0.5.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation, likewise.")] = None,
    licence: Annotated[str | None, typer.Option(help="Identifier of the licence, such as mit.")] = None,
    json_path: Json = None,
) -> None:
    """Copy a network into a zoo, which is made if it is missing.

    Give --mean and --std if the network expects normalized images and does not normalize them itself.
    """
    check_entry_name(name)
    asked = ModelOptions("model", model, weights, classes)
    check_outputs({"json": json_path}, [asked.file])
    check_trained(asked)
    preprocessing = None
    if mean is not None or std is not None:
        preprocessing = Normalization(_numbers("mean", mean or "0"), _numbers("std", std or "1"))
    loaded = load_network(asked, input_shape=parse_shape(input_shape))
    entry = Zoo(zoo, create=True).add(name, loaded, preprocessing=preprocessing, licence=licence)
    write_json(json_path, entry.facts())
    say(f"{name}: added to {zoo}")


@zoo_commands.command("list")
def list_entries(zoo: Folder, json_path: Json = None) -> None:
    """List the networks of a zoo."""
    check_outputs({"json": json_path})
    found, entries = Zoo(zoo), []
    for name in found.names:
        try:
            entries.append(found.entry(name))
        except FileFormatError as error:
            warn(str(error))
    write_json(json_path, {"entries": [entry.facts() for entry in entries]})
    if not found.names:
        say(f"{zoo} is empty; `pnc zoo add` puts networks into it")
        return
    show_table(
        ("name", "network", "images", "classes", "", "params", "accuracy", "licence"),
        [
            (
                entry.name,
                entry.spec,
                shape_text(entry.input_shape),
                str(len(entry.classes)),
                listed(entry.classes, 3),
                f"{entry.n_params:,}",
                "" if entry.test_accuracy is None else f"{entry.test_accuracy:.3f}",
                entry.licence or "",
            )
            for entry in entries
        ],
    )


@zoo_commands.command("show")
def show_entry(name: Name, zoo: Folder, json_path: Json = None) -> None:
    """Show what a zoo knows about a network."""
    check_outputs({"json": json_path})
    entry = Zoo(zoo).entry(name)
    write_json(json_path, entry.facts())
    show_facts(_shown(entry))


@zoo_commands.command("check")
def check_entries(
    zoo: Folder,
    name: Annotated[list[str] | None, typer.Argument(help="Names of entries; all by default.")] = None,
    allow_code: AllowCode = False,
    json_path: Json = None,
) -> None:
    """Load networks, and compare their weights with their fingerprints; exits with 1 if one is damaged."""
    check_outputs({"json": json_path})
    folder = Zoo(zoo, allow_code=allow_code)
    found = {one: folder.check(one) for one in name or folder.names}
    stray = left_over(folder)
    write_json(json_path, {"entries": found, "left_over": list(stray)})
    for one, problem in found.items():
        say(f"{one}: {problem or 'good'}")
    for file in stray:
        say(f"{file}: weights without an entry, left by a killed process; remove the file, or add the entry again")
    if any(problem is not None for problem in found.values()):
        raise typer.Exit(1)


@zoo_commands.command("remove")
def remove_entry(name: Name, zoo: Folder) -> None:
    """Remove a network from a zoo, with its weights."""
    Zoo(zoo).remove(name)
    say(f"{name}: removed from {zoo}")


@zoo_commands.command("rank")
def rank_sources(
    zoo: Folder,
    target: Target,
    data: Data,
    classes: Annotated[str, typer.Option(help="Requested classes: names or index ranges of the data.")],
    support: Support = "20/5",
    names: Annotated[
        str | None, typer.Option(help="What sources call requested classes, such as cat=tabby,cat=kitty,dog=hound.")
    ] = None,
    target_weights: TargetWeights = None,
    target_classes: TargetNames = None,
    finalists: Annotated[
        int, typer.Option(help="Sources that are scanned; the others are looked at only.", min=0)
    ] = N_FINALISTS,
    flip: Flip = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes that look at sources; by default one for each 8 sources.", min=1)
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Use Ray instead: the address of a cluster, or local for this machine.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="File, .jsonl, that keeps what is found out; a stopped ranking continues.")
    ] = None,
    allow_code: AllowCode = False,
    memory: Memory = MEMORY / GIB,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    json_path: Json = None,
) -> None:
    """Rank the networks of a zoo by the accuracy that a clone of the requested classes would have.

    Looks at every network on a few images of the training split, and scans the best ones.
    """
    asked = ModelOptions("target", target, target_weights, target_classes, device)
    check_outputs({"json": json_path, "resume": resume}, [asked.file, data_file(data)])
    check_trained(asked)
    parse_support(support)
    read_device(device)
    sources = Zoo(zoo, allow_code=allow_code)
    known_as = _parse_names(names)
    images = load_data(data, "train")
    wanted = parse_classes(classes, images.classes)
    model = load_network(asked, input_shape=images.input_shape)
    check_input_shape(images, model)
    known = [name for name in wanted if name in model.classes]
    if known:
        raise ClassNameError(f"classes: the target knows {listed(known)} already; leave it out")
    with use_threads(threads), progress() as bar:
        ranking = rank(
            sources,
            model.module,
            draw(images, wanted, model.classes, support, seed),
            classes=wanted,
            base_classes=model.classes,
            names=known_as,
            finalists=finalists,
            flip=flip,
            seed=seed,
            memory=round(memory * GIB),
            workers=workers,
            ray_address=ray_address,
            resume=resume,
            progress=bar.step,
        )
    write_json(json_path, ranking.facts())
    _show_ranking(ranking, sources)


def _show_ranking(ranking: Ranking, zoo: Zoo) -> None:
    """Show the best sources, what was left out, and the command that clones from the best one."""
    show_table(
        ("", "source", "predicted", "+-", "names", "MACs added", "params", "licence"),
        [
            (
                "*" if one.is_scanned else "",
                one.name,
                f"{one.predicted:.3f}",
                f"{one.look.standard_error:.3f}",
                one.look.named,
                f"{one.look.n_macs / max(ranking.target_macs, 1):.2f}",
                f"{one.look.n_params:,}",
                zoo.entry(one.name).licence or "",
            )
            for one in ranking.ranked[:SHOWN]
        ],
    )
    if len(ranking) > SHOWN:
        say(f"... {len(ranking) - SHOWN} more")
    for name, reason in ranking.left_out.items():
        say(f"{name}: left out, {reason}")
    say("predicted: average accuracy of a clone; +-: standard error of what it is made from")
    say("names: how many of the requested classes the source names; MACs added: as a multiple of the target's")
    say(f"*: scanned; the others were looked at only. {ranking.n_images} images, {ranking.seconds:.1f} s")
    names = shlex.quote(",".join(ranking.best.source_classes))
    say(f"clone from it: --source {zoo.weights(ranking.best.name)} --source-classes {names}")


def _shown(entry: Entry) -> dict[str, str]:
    """The facts of an entry as text."""
    made = entry.preprocessing
    return {
        "name": entry.name,
        "network": entry.spec,
        "images": shape_text(entry.input_shape),
        "preprocessing": "its own" if made is None else f"mean {made.mean}, std {made.std}",
        "classes": f"{len(entry.classes)}: {few_names(entry.classes)}",
        "parameters": f"{entry.n_params:,}",
        "test accuracy": "unknown" if entry.test_accuracy is None else f"{entry.test_accuracy:.3f}",
        "licence": entry.licence or "unknown",
        "fingerprint": entry.fingerprint,
    }


def _numbers(option: str, text: str) -> float | list[float]:
    """Parse one number, or one for each channel."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(
            f"{option}: expected numbers separated by commas, such as 0.5,0.5,0.5; got {text!r}"
        ) from error
    return values[0] if len(values) == 1 else values


def _parse_names(text: str | None) -> dict[str, Any]:
    """Parse "cat=tabby,cat=kitty": a requested class may have several names."""
    found: dict[str, list[str]] = {}
    for pair in [] if text is None else text.split(","):
        name, equals, other = (part.strip() for part in pair.partition("="))
        if not (name and equals and other):
            raise InputError(f"names: expected CLASS=NAME pairs separated by commas, such as cat=tabby; got {pair!r}")
        found.setdefault(name, []).append(other)
    return found
