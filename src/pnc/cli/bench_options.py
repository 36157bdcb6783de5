"""Options that the `pnc bench` commands share, the setting that they describe, and how a bench is run."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pnc.bench.bench import Bench, Rows
from pnc.bench.public_network import IMAGE_SIZE, PUBLIC, SMALL_BATCH, public_network, resized
from pnc.bench.result_files import Cells, Claim, write_results
from pnc.bench.setting import Setting
from pnc.cli.arguments import (
    ModelOptions,
    check_different,
    check_input_shape,
    check_outputs,
    check_trained,
    data_file,
    load_network,
    parse_support,
    read_device,
    use_threads,
)
from pnc.cli.output import progress, say
from pnc.data.image_set import sample_per_class
from pnc.data.readers import load_data
from pnc.foundation.errors import InputError
from pnc.foundation.specs import split_spec
from pnc.models.model_specs import LoadedModel

SourceFile = Annotated[
    str,
    typer.Option(
        "--source",
        help="The network that knows the new classes: a file of `pnc pretrain`, or efficientnet-lite0 (?size=96 for "
        "smaller images than 128x128).",
    ),
]
TargetFile = Annotated[
    str, typer.Option("--target", help="File of `pnc pretrain`: the network that will receive them.")
]
Sizes = Annotated[str, typer.Option("--support", help="Images per new / per base class.")]
Mirror = Annotated[bool, typer.Option("--flip/--no-flip", help="Use mirror images too.")]
Seeds = Annotated[int, typer.Option("--seeds", help="Number of supports, with seeds 0, 1, ...", min=1)]
NTest = Annotated[
    int | None, typer.Option("--n-test", help="Use only the first N test images of each class; all by default.", min=1)
]
DataName = Annotated[str | None, typer.Option("--data-name", help="Name of the images in the results.")]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder for the results: .json, .md and .jsonl.")]
OutFile = Annotated[Path, typer.Option("--json", help="File for the results; the table is written beside it.")]
OneThread = Annotated[int, typer.Option("--threads", help="Threads for torch.", min=1)]

_NOT_IN_COMMAND = ("out", "json_path", "keep", "data_name", "again", "plot", "runs", "networks", "train_only")
"""Options that do not affect the rows, such as output paths."""


@dataclass(frozen=True)
class PairOptions:
    """Options of a pair of networks and its images; fields as in `Setting`."""

    source: str
    target: str
    data: str
    support: str
    flip: bool
    data_name: str | None = None
    n_test: int | None = None
    device: str = "cpu"
    n_unlabelled: int = 0

    @property
    def networks(self) -> tuple[ModelOptions, ModelOptions]:
        """Source and target."""
        asked = (("source", self.source), ("target", self.target))
        source, target = (ModelOptions(role, spec, None, None, self.device) for role, spec in asked)
        return source, target

    @property
    def files(self) -> list[Path | None]:
        """Input files."""
        return [*(one.file for one in self.networks), data_file(self.data)]

    def load(self) -> Setting:
        """Check all options, then load the networks and images."""
        check_different(*self.networks)
        check_trained(*(one for one in self.networks if not _is_public(one.spec)))
        read_device(self.device)
        n_new, n_base = parse_support(self.support)
        if not n_new or not n_base:
            raise InputError(f"support: images of new and of base classes are needed; got {self.support!r}")
        train, test = load_data(self.data, "train"), load_data(self.data, "test")
        test = test if self.n_test is None else sample_per_class(test, self.n_test, "first")
        source, target = (self._network(one, train.input_shape) for one in self.networks)
        check_input_shape(train, source, target)
        return Setting(
            source=source,
            target=target,
            train=train,
            test=test,
            data=self.data_name or self.data,
            n_new=n_new,
            n_base=n_base,
            flip=self.flip,
            n_unlabelled=self.n_unlabelled,
            n_test=self.n_test,
            batch_size=SMALL_BATCH if self._has_public else Setting.batch_size,
            given={"source": self.source, "target": self.target},
        )

    @property
    def _has_public(self) -> bool:
        return _is_public(self.source) or _is_public(self.target)

    def _network(self, options: ModelOptions, input_shape: tuple[int, int, int]) -> LoadedModel:
        """Load one network. Beside the public one, which resizes its images, the other one does so too."""
        if _is_public(options.spec):
            public = public_network(input_shape, _public_size(options.spec, options.role))
            public.module.to(read_device(options.device))
            return public
        model = load_network(options, input_shape=input_shape)
        return resized(model, input_shape) if self._has_public else model


def _is_public(spec: str) -> bool:
    return spec.partition("?")[0] == PUBLIC


def _public_size(spec: str, argument: str) -> int:
    """Read the image size of the public network."""
    given = split_spec(spec, argument)[2]
    size = given.pop("size", str(IMAGE_SIZE))
    if given or not size.isdecimal() or int(size) < 32:
        raise InputError(f"{argument}: expected {PUBLIC}, or {PUBLIC}?size=N with N of at least 32; got {spec!r}")
    return int(size)


def run_bench(
    context: typer.Context,
    make: Callable[[], Bench],
    json_path: Path,
    threads: int,
    inputs: Sequence[Path | None] = (),
) -> Rows:
    """Check the outputs, make the bench, measure missing rows, write results and show claims.

    Args:
        context: The command's context; its options are written to the results.
        make: Makes the bench; called after outputs are checked, as it may load networks and data.
        json_path: File for the results; tables and rows go to the `.md` and `.jsonl` files beside it.
        threads: Number of torch's threads.
        inputs: Input files, which must not be overwritten.
    """
    for suffix in (".json", ".md", ".jsonl"):
        check_outputs({"out" if "out" in context.params else "json": json_path.with_suffix(suffix)}, inputs)
    with use_threads(threads), progress() as bar:
        bench = make()
        rows = bench.measure(Cells(json_path.with_suffix(".jsonl"), bench.settings, bench.keys), bar.step)
        publish(bench, rows, json_path, command_line(context, bench.name))
    return rows


def publish(bench: Bench, rows: Rows, json_path: Path, command: str) -> None:
    """Write rows and claims as JSON and Markdown, and show the claims."""
    claims = bench.claims(rows)
    facts = bench.facts(rows) if bench.facts else {**bench.settings, "rows": rows}
    text = bench.markdown(rows)
    write_results(json_path.parent, json_path.stem, command, facts, claims, text, bench.device)
    show_claims(claims, json_path.with_suffix(".md"))


def command_line(context: typer.Context, name: str, without: Sequence[str] = ()) -> str:
    """Return the command that reproduces the rows, with every option that they depend on.

    Args:
        context: The context of the running command.
        name: The name of the bench.
        without: Options to leave out, such as files that only save time.
    """
    words = ["pnc", "bench", name]
    for option in context.command.params:
        value = context.params[str(option.name)]
        if option.name == "data":
            value = context.params.get("data_name") or value
        if value is None or option.name in (*_NOT_IN_COMMAND, *without):
            continue
        if isinstance(value, bool):
            words += option.opts if value else option.secondary_opts
        else:
            for one in value if isinstance(value, list | tuple) else [value]:
                words += [option.opts[0], shlex.quote(str(one))]
    return " ".join(words)


def show_claims(claims: Sequence[Claim], written: Path) -> None:
    """Show whether each claim holds, and where the results are."""
    for one in claims:
        spread = "" if one.spread is None else f" +- {one.spread:.3f}"
        value = f"{one.value:.3f}" if isinstance(one.value, float) else f"{one.value:,}"
        say(f"{'holds' if one.holds else 'FAILS'}: {one.claim} {one.must}: {value}{spread}")
    say(f"{written}: written")
