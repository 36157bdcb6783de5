"""Networks from model specs, with their weights, the names of their outputs and the shape of their images."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pnc.foundation.class_names import check_class_names, listed, unknown_name
from pnc.foundation.errors import InputError, MismatchError, RecordingError
from pnc.foundation.network_state import like_images
from pnc.foundation.plain_text import few_names
from pnc.foundation.specs import split_spec
from pnc.foundation.tensor_files import write_tensors
from pnc.graph.logits import pick_logits
from pnc.models.library_networks import (
    HF_OPTIONS,
    TIMM_OPTIONS,
    TORCHVISION_OPTIONS,
    LibraryNetwork,
    LibraryRequest,
    hf_network,
    timm_network,
    torchvision_network,
)
from pnc.models.outputs import Output
from pnc.models.preprocessing import Preprocessed, checked_shape, shape_text
from pnc.models.python_functions import called, python_function
from pnc.models.reference_networks import Shape, cnn, mobilenetv2, resnet, vit_tiny
from pnc.models.weight_files import FORMAT, VERSION, check_fit, load_tensors, read_weights


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A network and what is known about it.

    Attributes:
        module: In eval mode; maps images in [0, 1], (B, C, H, W), to logits (B, len(classes)). A network of a library
            is wrapped in `Preprocessed`, which applies the preprocessing of its config.
        spec: How to build it: the given spec, or the one in the given file.
        classes: Names of the outputs, in order.
        input_shape: (C, H, W) of the images that `module` takes.
        facts: Metadata of the weights file, such as recipe and test accuracy; empty if it has none.
    """

    module: nn.Module
    spec: str
    classes: tuple[str, ...]
    input_shape: Shape
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        accuracy = self.facts.get("test_accuracy")
        known = f", test accuracy {accuracy:.3f}" if isinstance(accuracy, float) else ""
        return (
            f"LoadedModel({self.spec}: images {shape_text(self.input_shape)} to {len(self.classes)} classes, "
            f"{few_names(self.classes)}{known})"
        )


def load_model(
    spec: str,
    weights: str | Path | None = None,
    classes: Sequence[str] | None = None,
    input_shape: Sequence[int] | None = None,
    *,
    unnamed: bool = False,
) -> LoadedModel:
    """Build the network that a spec names, with weights from a file or its library, or random ones.

    Specs:
        - ``zoo:NAME?key=value``: a reference network.
        - ``timm:NAME``, ``torchvision:NAME``, ``hf:ID``: a classifier of timm (also ``timm:hf-hub:ID``,
          ``timm:local-dir:FOLDER``), torchvision or transformers (the ID of a repository, or a folder written by
          `save_pretrained`, with the image processor). Without `weights` it comes with the library's own, which the
          library downloads if necessary; ``?pretrained=false`` gives random ones. It takes images of any size, grey or
          colour: see `Preprocessed`. ``?size=N`` resizes them to another size than that of the config. Further options:
          ``in_chans`` (timm), ``weights``, an entry such as IMAGENET1K_V2 (torchvision), ``revision`` (hf).
          Preprocessing and class names come from the config; classes with a common name get the index of the output
          appended, such as "crane (134)" and "crane (517)".
        - ``py:MODULE:FUNCTION``, ``py:FILE.py:FUNCTION``: the result of a function of yours without arguments.
        - The path of a .safetensors file written by `save_model` or `pretrain`, which needs nothing else.

    Args:
        spec: As above.
        weights: A .safetensors file, or a checkpoint that ``torch.load(weights_only=True)`` reads: the state dict, or a
            dict with it under "state_dict", "model_state_dict" or "model". What wrappers put in front of names is
            removed. With it, nothing is downloaded, and a network of timm or torchvision gets as many outputs as there
            are classes.
        classes: Names of the outputs, in order; by default those in the file, or of the library.
        input_shape: (C, H, W) of the images; by default the one in the file, or of the library's config.
        unnamed: Number the outputs where nothing names them, instead of an error.

    Raises:
        InputError: an unknown spec, option or name, a missing path or package, a library that cannot load its weights,
            unknown classes or input shape, or a network that does not take images of that shape.
        FileFormatError: a file that is damaged, of another format, or of a newer version of it.
        MismatchError: weights that do not fit the network, or another number of outputs than of classes.

    >>> load_model("zoo:cnn?width=0.25", classes=["cat", "dog"], input_shape=(1, 8, 8)).classes
    ('cat', 'dog')
    """
    path = Path(spec) if spec.endswith(".safetensors") else None
    if path is None and weights is None:
        return _built(spec, classes, input_shape, seed=0, pretrained=True, unnamed=unnamed)
    if path is not None and weights is not None:
        raise InputError(
            f"weights: {spec} is already a file of weights; give weights= only with another spec, such as zoo:..."
        )
    built: list[LoadedModel] = []

    def build(shapes: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Build the network as soon as names and shapes of the file are known, and compare them: before values are."""
        own = spec if path is None else _own_spec(path, facts)
        known = facts.get("classes")
        if known and classes is not None and len(known) != len(classes):
            raise MismatchError(
                f"classes: {len(classes)} names given for the {len(known)} outputs of {own}: {listed(known)}"
            )
        names, shape = known if classes is None else classes, input_shape or facts.get("input_shape")
        model = _built(own, names, shape, seed=0, pretrained=False, unnamed=unnamed, like=shapes)
        check_fit(stored_network(model.module, shapes), shapes)
        built.append(model)

    tensors, facts = read_weights(path or Path(str(weights)), build)
    if not built:  # a file that shows its shapes by being read only
        build(tensors, facts)
    load_tensors(stored_network(built[0].module, tensors), tensors)
    return replace(built[0], facts=facts)


def has_own_weights(spec: str) -> bool:
    """Whether a spec comes with trained weights, without a further file.

    Raises:
        InputError: the option "pretrained" is neither true nor false.
    """
    scheme, _, options = split_spec(spec, "model")
    if scheme not in _LIBRARIES:
        return scheme != "zoo"
    asked = options.get("pretrained", "true")
    if asked not in ("true", "false"):
        raise InputError(f"model: pretrained={asked}: expected true or false")
    return asked == "true"


def build_model(
    spec: str,
    classes: Sequence[str] | None,
    input_shape: Sequence[int] | None,
    seed: int = 0,
    like: Mapping[str, torch.Tensor] | None = None,
) -> LoadedModel:
    """Build a network with random weights, determined by `seed`; the global random state does not change.

    Nothing is downloaded but, for ``hf:ID``, the config. Reference networks are built without memory first.

    Args:
        spec: As for `load_model`.
        classes: As for `load_model`.
        input_shape: As for `load_model`.
        seed: Of the weights.
        like: Tensors that will be its weights, on the meta device: a reference network of other shapes is not built.

    Raises:
        InputError, MismatchError: as `load_model`.
    """
    return _built(spec, classes, input_shape, seed, False, like=like)


def _built(
    spec: str,
    classes: Sequence[str] | None,
    input_shape: Sequence[int] | None,
    seed: int,
    pretrained: bool,
    unnamed: bool = False,
    like: Mapping[str, torch.Tensor] | None = None,
) -> LoadedModel:
    scheme, name, options = split_spec(spec, "model")
    if scheme not in _SCHEMES:
        known = ", ".join(f"{known}:..." for known in _SCHEMES if known != "pt2")
        raise InputError(f"model: {spec!r} is of no known kind; expected {known} or a .safetensors file of pnc")
    names = None if classes is None else check_class_names(classes, "classes")
    shape = None if input_shape is None else checked_shape(input_shape)
    request = _Request(spec, name, options, names, shape, has_own_weights(spec) and pretrained, unnamed)
    with torch.random.fork_rng(devices=[]):
        if scheme == "zoo":  # whatever a file says, it takes neither memory nor time yet
            with torch.device("meta"):
                tried = _build_zoo(request)
            if like is not None:
                check_fit(tried.module, like)
            n_outputs = len(tried.classes)  # and it takes images of any size
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the accelerators
        model = _SCHEMES[scheme](request)
        if scheme != "zoo":
            n_outputs = _check_outputs(model)
    if unnamed and names is None and n_outputs != len(model.classes):
        return replace(model, classes=tuple(map(str, range(n_outputs))))
    if n_outputs != len(model.classes):
        raise MismatchError(
            f"classes: {model.spec} has {n_outputs} outputs, but {len(model.classes)} names were given; "
            "give one per output"
        )
    return model


def stored_network(module: nn.Module, names: Iterable[str] = ()) -> nn.Module:
    """The network whose weights are in files: without `Preprocessed` around it, which comes from the spec.

    Nor `Output`, unless tensors with these names belong to it: a file may hold the weights with or without it.
    """
    while isinstance(module, Preprocessed) or (
        isinstance(module, Output) and not set(names) & set(module.state_dict())
    ):
        module = module.network
    return module


def save_model(model: LoadedModel, path: str | Path, facts: Mapping[str, Any]) -> None:
    """Write a network to one safetensors file for `load_model`: weights, spec, classes and input shape.

    Args:
        model: The network.
        path: The file.
        facts: Further JSON values to keep, such as the recipe.

    Raises:
        InputError: the path cannot be written to.
    """
    own = {
        "format": FORMAT,
        "version": VERSION,
        "model": model.spec,
        "classes": list(model.classes),
        "input_shape": list(model.input_shape),
    }
    write_tensors(path, stored_network(model.module).state_dict(), {**facts, **own})


# --------------------------------------------------------------------------------------------------- specs
_N_UNNAMED = 10
"""Outputs of a reference network whose number nobody said."""


@dataclass(frozen=True)
class _Request:
    """A parsed model spec with what the caller knows; `classes` and `input_shape` are None if not given."""

    spec: str
    name: str
    options: Mapping[str, str]
    classes: tuple[str, ...] | None
    input_shape: Shape | None
    pretrained: bool
    unnamed: bool = False

    def known_classes(self, own: Sequence[str] | None = None) -> tuple[str, ...]:
        """Return the names that were given, else the network's own; an InputError where there are none."""
        if self.classes is None and own is None and self.unnamed:
            return tuple(map(str, range(_N_UNNAMED)))
        if self.classes is None and own is None:
            raise InputError(f"classes: {self.spec} does not name its outputs; give their names in order as classes=")
        return check_class_names(own or (), "classes") if self.classes is None else self.classes

    def known_shape(self, network: nn.Module | None = None) -> Shape:
        """Return the given shape, or else that of a `Preprocessed` network; an InputError if there is none."""
        if self.input_shape is not None:
            return self.input_shape
        if isinstance(network, Preprocessed):
            return network.input_shape
        raise InputError(f"input_shape: {self.spec} does not say which images it takes; give (C, H, W) as input_shape=")


_ZOO: dict[str, Callable[..., nn.Module]] = {
    "cnn": cnn,
    "resnet20": partial(resnet, n_blocks=3),
    "resnet32": partial(resnet, n_blocks=5),
    "resnet56": partial(resnet, n_blocks=9),
    "mobilenetv2": mobilenetv2,
    "vit_tiny": vit_tiny,
}
_TRANSFORMER_SIZES = {"patch": 256, "dim": 2048, "depth": 64, "n_heads": 64}
_WIDTH_LIMIT = 16


def _build_zoo(request: _Request) -> LoadedModel:
    if request.name not in _ZOO:
        raise InputError(f"model: {unknown_name(request.name, list(_ZOO), 'reference network')}")
    limits = _TRANSFORMER_SIZES if request.name == "vit_tiny" else {"width": _WIDTH_LIMIT}
    values: dict[str, float] = {}
    for key, text in request.options.items():
        if key not in limits:
            raise InputError(f"model: zoo:{request.name}: {unknown_name(key, list(limits), 'option')}")
        values[key] = _number(key, text, limits[key], whole=key in _TRANSFORMER_SIZES)
    classes, input_shape = request.known_classes(), request.known_shape()
    return LoadedModel(
        _ZOO[request.name](input_shape, len(classes), **values).eval(), request.spec, classes, input_shape
    )


def _number(key: str, text: str, limit: int, whole: bool) -> float:
    """Read an option; limited, because a spec may come from an untrusted file and must not fill the memory."""
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = 0
    if not 0 < value <= limit:
        raise InputError(f"model: {key}={text}: expected a {'whole ' if whole else ''}number above 0, {limit} at most")
    return value


def _build_py(request: _Request) -> LoadedModel:
    if request.options:
        raise InputError(f"model: expected py:MODULE:FUNCTION or py:FILE.py:FUNCTION, got {request.spec!r}")
    function, classes = python_function(request.name, request.spec), request.known_classes()
    network = called(function, request.spec)
    return LoadedModel(network.eval(), request.spec, classes, request.known_shape(network))


_LIBRARIES: dict[str, tuple[Callable[[LibraryRequest], LibraryNetwork], Sequence[str]]] = {
    "timm": (timm_network, TIMM_OPTIONS),
    "torchvision": (torchvision_network, TORCHVISION_OPTIONS),
    "hf": (hf_network, HF_OPTIONS),
}


def _build_from_library(request: _Request) -> LoadedModel:
    scheme = request.spec.partition(":")[0]
    build, known = _LIBRARIES[scheme]
    for key in request.options:
        if key not in known:
            raise InputError(f"model: {scheme}: {unknown_name(key, known, 'option')}")
    n_classes = None if request.classes is None or request.pretrained else len(request.classes)
    found = build(LibraryRequest(request.spec, request.name, request.options, request.pretrained, n_classes))
    network = found.network.eval()
    return LoadedModel(network, request.spec, request.known_classes(found.classes), request.known_shape(network))


def _refuse_pt2(request: _Request) -> LoadedModel:
    raise InputError(
        f"model: {request.spec} is not opened, because torch.export.load runs code that such a file may hold; if it is "
        "yours, write a function that returns pnc.from_exported(torch.export.load(...)), and give py:FILE.py:FUNCTION"
    )


_SCHEMES: dict[str, Callable[[_Request], LoadedModel]] = {
    "zoo": _build_zoo,
    **dict.fromkeys(_LIBRARIES, _build_from_library),
    "py": _build_py,
    "pt2": _refuse_pt2,
}


def _check_outputs(model: LoadedModel) -> int:
    """Run the network once: if it cannot take its images, say so now; the number of its outputs."""
    like = like_images(model.module)
    images = torch.zeros(2, *model.input_shape, dtype=like.dtype, device=like.device)
    try:
        with torch.no_grad():
            output = model.module(images)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"input_shape: {model.spec} does not take images of {shape_text(model.input_shape)}: {reason}"
        ) from error
    try:
        logits = pick_logits(output)
    except RecordingError as error:
        raise InputError(f"model: {model.spec}: {error}") from error
    return logits.shape[1]


def _own_spec(path: Path, facts: Mapping[str, Any]) -> str:
    if not facts:
        raise InputError(f"model: {path} does not name its network; give the spec, and this file as weights=")
    spec: str = facts["model"]
    if not spec.startswith("zoo:"):
        # Opening a file must not run code named in the file.
        raise InputError(f"model: {path} is for {spec!r}; give this spec yourself, and the file as weights=")
    return spec
