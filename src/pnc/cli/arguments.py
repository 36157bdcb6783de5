"""Files, networks, classes and devices named on the command line: checked before any work, then loaded."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pnc.clones import clone_file
from pnc.composite.composite import Composite, attach
from pnc.data.image_set import ImageSet, draw_images
from pnc.foundation.argument_checks import came, usable_device
from pnc.foundation.class_names import listed, parse_classes
from pnc.foundation.errors import ClassNameError, InputError, PNCError
from pnc.foundation.file_writing import check_place, checked_path
from pnc.method.settings import Removal
from pnc.models.model_specs import LoadedModel, has_own_weights, load_model
from pnc.models.preprocessing import shape_text


# --------------------------------------------------------------------------------------------------- files and settings
def check_outputs(outputs: Mapping[str, Path | None], inputs: Sequence[str | Path | None] = ()) -> None:
    """Check before any work that output files can be written and that none of them is an input.

    Args:
        outputs: Path by option; None if the option is not given.
        inputs: Files that are read; specs and None are ignored.
    Raises:
        InputError: a folder cannot be written to, or a path is given twice, is an input, or exists and is not a regular
            file.
    """
    taken = {Path(os.path.realpath(checked_path(path, "input"))) for path in inputs if path is not None}
    for option, path in outputs.items():
        if path is None or (option == "json" and path == Path("-")):
            continue
        place = check_place(path, option)
        if place in taken:
            raise InputError(f"{option}: {path} is given for something else too; choose another path")
        taken.add(place)
        try:
            with tempfile.TemporaryFile(dir=place.parent):
                pass
        except OSError as error:
            reason = error.strerror or error
            raise InputError(
                f"{option}: cannot write {path}: {reason}; choose a folder that exists and is writable"
            ) from error


def read_device(name: str) -> torch.device:
    """Return the device with that name, if it can be used here."""
    return usable_device(name)


@contextmanager
def use_threads(number: int | None) -> Iterator[None]:
    """Set the number of torch's threads within the block; None keeps its setting."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def data_file(spec: str) -> Path:
    """Return the path in a data spec; for a spec without one, its text as a path that does not exist."""
    return Path(spec.partition("?")[0].partition(":")[2] or spec)


def parse_shape(text: str | None) -> tuple[int, int, int] | None:
    """Parse "3,32,32" or "3x32x32"."""
    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise InputError(f"input-shape: expected channels,height,width such as 3,32,32; got {text!r}")
    channels, height, width = (int(part) for part in parts)
    return channels, height, width


def parse_density(text: str) -> float | Literal["auto"]:
    """Parse a share above 0 and at most 1, or "auto"."""
    if text == "auto":
        return "auto"
    try:
        density = float(text)
    except ValueError as error:
        raise InputError(
            f"density: expected a share of the prunable multiply-accumulates, such as 0.5, or auto; got {came(text)}"
        ) from error
    Removal(density)
    return density


# --------------------------------------------------------------------------------------------------- networks
@dataclass(frozen=True)
class ModelOptions:
    """The options of one network.

    Attributes:
        role: "source", "target" or "model"; the first word of error messages.
        spec: As for `load_model`.
        weights: File of weights, for a spec that is not a file itself.
        classes: Names of the outputs, separated by commas.
        device: Device to put it on.
    """

    role: str
    spec: str
    weights: Path | None
    classes: str | None
    device: str = "cpu"

    @property
    def file(self) -> Path | None:
        """The file with its weights, if any."""
        return Path(self.spec) if self.spec.endswith(".safetensors") else self.weights


def load_network(
    options: ModelOptions,
    classes: Sequence[str] | None = None,
    input_shape: Sequence[int] | None = None,
    *,
    unnamed: bool = False,
) -> LoadedModel:
    """Load a network and put it on its device.

    Args:
        options: Its options.
        classes: Names of its outputs, if neither the options nor its file have them.
        input_shape: Shape of its images, if its file does not have it.
        unnamed: Number the outputs if nothing names them.
    Raises:
        PNCError: as `load_model`; the message begins with the role.
    """
    own_file = options.spec.endswith(".safetensors")
    names = None if own_file else classes
    if options.classes is not None:
        names = tuple(part.strip() for part in options.classes.split(","))
    device = read_device(options.device)
    with named(options.role, "" if options.weights else "weights: "):  # without an option of weights, the spec is meant
        model = load_model(options.spec, options.weights, names, None if own_file else input_shape, unnamed=unnamed)
    model.module.to(device)
    return model


def check_trained(*options: ModelOptions) -> None:
    """Refuse networks without trained weights, whose predictions are random."""
    for one in options:
        with named(one.role):
            trained = has_own_weights(one.spec)
        if not trained and one.weights is None:
            option = "--weights" if one.role == "model" else f"--{one.role}-weights"
            raise InputError(f"{one.role}: {one.spec} has random weights; give {option}, or a file of `pnc pretrain`")


def check_different(source: ModelOptions, target: ModelOptions) -> None:
    """Refuse the same network as source and target."""
    if source.file is None or target.file is None:
        same = source.file == target.file and source.spec == target.spec
    else:
        same = _same_file(source.file, target.file)
    if same:
        raise InputError(
            f"source and target are the same network, {source.file or source.spec}; "
            "give a source that knows other classes"
        )


def _same_file(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))


def check_input_shape(images: ImageSet, *models: LoadedModel) -> None:
    """Refuse images of another shape than the networks take."""
    for model in models:
        if images.input_shape != model.input_shape:
            came, taken = shape_text(images.input_shape), shape_text(model.input_shape)
            raise InputError(
                f"data: the images are {came}, but {model.spec} takes {taken}; "
                "add ?size= and channels= if the data spec allows it"
            )


# --------------------------------------------------------------------------------------------------- classes and images
def choose_classes(text: str | None, source: LoadedModel, target: LoadedModel) -> tuple[str, ...]:
    """Return the classes to clone: the given ones, by default all that the target lacks."""
    if text is None:
        lacking = tuple(name for name in source.classes if name not in target.classes)
        if not lacking:
            raise ClassNameError("classes: the target knows every class of the source already; there is none to clone")
        return lacking
    chosen = parse_classes(text, source.classes)
    known = [name for name in chosen if name in target.classes]
    if known:
        raise ClassNameError(f"classes: the target knows {listed(known)} already; leave it out")
    return chosen


def parse_support(text: str) -> tuple[int | None, int | None]:
    """Parse NEW/BASE, the images per new and per base class; "all" becomes None."""
    parts = text.split("/")
    if len(parts) == 2 and all(part.isdecimal() or part == "all" for part in parts) and set(parts[0]) != {"0"}:
        n_new, n_base = (None if part == "all" else int(part) for part in parts)
        return n_new, n_base
    raise InputError(f"support: expected NEW/BASE images per class, such as 100/20, 20/0 or all/all; got {text!r}")


def draw(images: ImageSet, new: Sequence[str], base: Sequence[str], sizes: str, seed: int) -> ImageSet:
    """Draw a support of `sizes`, as NEW/BASE.

    Raises:
        InputError: the data has too few images of a class.
    """
    n_new, n_base = parse_support(sizes)
    counts = images.counts()
    for names, wanted in ((new, n_new), (base, n_base)):
        for name in names:
            there = counts.get(name, 0)
            if wanted != 0 and there < (wanted or 1):
                raise InputError(
                    f"support: {sizes} asks for {wanted or 'all'} images of class {name!r}, but the data has {there}; "
                    f"it has images of {listed([known for known, count in counts.items() if count])}"
                )
    return draw_images(images, new, base, n_new, n_base, torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------- clones
@dataclass(frozen=True)
class CloneFacts:
    """Metadata of a clone file that is needed before its networks are loaded; `all` is all of it."""

    path: Path
    base_classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    all: Mapping[str, Any]


def read_clone_facts(path: Path) -> CloneFacts:
    """Read the metadata of a clone file."""
    facts = clone_file.inspect(path)
    return CloneFacts(path, tuple(facts["base_classes"]), tuple(facts["target"]["input_shape"]), facts)


@dataclass(frozen=True)
class CompositeOptions:
    """Options of clone files and of the networks to attach them with.

    Attributes:
        clones: Files, in the order of their logits.
        sources: One network for all clones, or one for each; none if all files are full.
        target: The network that they were made for.
    """

    clones: Sequence[Path]
    sources: Sequence[ModelOptions]
    target: ModelOptions

    @property
    def files(self) -> list[Path | None]:
        """Input files."""
        return [*self.clones, self.target.file, *(one.file for one in self.sources)]

    def read(self) -> list[CloneFacts]:
        """Check the options before any work, and read the metadata of the clone files."""
        check_trained(self.target, *self.sources)
        read_device(self.target.device)
        return [read_clone_facts(path) for path in self.clones]


def attach_clones(asked: CompositeOptions, clones: Sequence[CloneFacts], images: ImageSet | None = None) -> Composite:
    """Load the networks and the clones, and attach them.

    Args:
        asked: The options.
        clones: From `asked.read()`.
        images: Images that the composite will be run on, to check their shape.
    Raises:
        InputError: the number of sources is wrong, or the images have another shape than the target's.
        MismatchError, FileFormatError, ClassNameError: as `load` and `attach`.
    """
    input_shape = clones[0].input_shape if images is None else images.input_shape
    target = load_network(asked.target, clones[0].base_classes, input_shape)
    if images is not None:
        check_input_shape(images, target)
    models: dict[ModelOptions, LoadedModel] = {}
    loaded = []
    for facts, options in zip(clones, _one_each(asked.sources, len(clones)), strict=True):
        if options is None:
            loaded.append(clone_file.load(facts.path))
            continue
        if options not in models:
            # The source's class names are not used; only their number must match its outputs.
            models[options] = load_network(options, input_shape=facts.input_shape)
        loaded.append(clone_file.load(facts.path, source=models[options].module))
    net = attach(target.module, *loaded)
    for facts in clones:
        if facts.base_classes != target.classes:
            raise ClassNameError(
                f"target-classes: {facts.path} calls the target's outputs {listed(facts.base_classes)}, "
                f"here they are {listed(target.classes)}; use the same names"
            )
    return net


def _one_each(sources: Sequence[ModelOptions], number: int) -> Sequence[ModelOptions | None]:
    if not sources:
        return [None] * number
    if len(sources) not in (1, number):
        raise InputError(f"source: give one for all {number} clones or one for each; got {len(sources)}")
    return sources if len(sources) == number else list(sources) * number


@contextmanager
def named(role: str, omitted: str = "") -> Iterator[None]:
    """Prefix the messages of errors within the block with `role`, in place of `omitted`."""
    try:
        yield
    except PNCError as error:
        text = str(error).removeprefix(omitted)
        raise type(error)(text if text.startswith(f"{role}: ") else f"{role}: {text}") from error
