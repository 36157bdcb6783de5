"""Networks from model specs, with their weights, the names of their outputs and the shape of their images."""

import importlib
import importlib.util
import inspect
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pnc.data import check_class_names, listed, unknown_name
from pnc.errors import FileFormatError, InputError, MismatchError
from pnc.files import METADATA_KEY, read_tensors, write_tensors
from pnc.networks import Shape, cnn, mobilenetv2, resnet, vit_tiny
from pnc.readers import split_spec

FORMAT = "pnc-network"
VERSION = 1

_WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A network and what is known of it.

    Attributes:
        module: In eval mode; maps images (B, C, H, W) to logits (B, len(classes)).
        spec: How to build it: the spec that was asked for, or the one in the file that was asked for.
        classes: Names of the outputs, in order.
        input_shape: (C, H, W).
        facts: What the weights file says of its making, such as recipe and test accuracy; empty where it says nothing.
    """

    module: nn.Module
    spec: str
    classes: tuple[str, ...]
    input_shape: Shape
    facts: Mapping[str, Any] = field(default_factory=dict)


def load_model(
    spec: str,
    weights: str | Path | None = None,
    classes: Sequence[str] | None = None,
    input_shape: Sequence[int] | None = None,
) -> LoadedModel:
    """Build the network that a spec names, with the weights of a file or random ones.

    Args:
        spec: ``zoo:NAME?key=value`` (a reference network); ``py:MODULE:FUNCTION`` or ``py:FILE.py:FUNCTION`` (a
            function without arguments that returns the network); or the path of a .safetensors file that `save_model`
            or `pretrain` wrote, which needs nothing else.
        weights: A .safetensors file, or a checkpoint that ``torch.load(weights_only=True)`` reads: the state dict, or a
            dict with it under "state_dict" or "model". A prefix "module." of all names is removed.
        classes: Names of the outputs, in order; by default those in the file.
        input_shape: (C, H, W) of the images; by default the one in the file.

    Raises:
        InputError: an unknown spec or option, a path that is not there, classes or input shape neither given nor in the
            file, or a network that does not take images of that shape.
        FileFormatError: a file that is damaged, of another format, or of a newer version of it.
        MismatchError: weights that do not fit the network, or another number of outputs than of classes.
    """
    path = Path(spec) if spec.endswith(".safetensors") else None
    if path is None and weights is None:
        return build_model(spec, classes, input_shape)
    if path is not None and weights is not None:
        raise InputError(
            f"weights: {spec} is a file of weights already; give weights= with another spec, such as zoo:..."
        )
    tensors, facts = _read_weights(path or Path(str(weights)))
    if path is not None:
        spec = _own_spec(path, facts)
    known = facts.get("classes")
    if known and classes is not None and len(known) != len(classes):
        raise MismatchError(
            f"classes: {len(classes)} names given for the {len(known)} outputs of {spec}: {listed(known)}"
        )
    model = build_model(spec, known if classes is None else classes, input_shape or facts.get("input_shape"))
    load_tensors(model.module, tensors)
    return replace(model, facts=facts)


def build_model(
    spec: str, classes: Sequence[str] | None, input_shape: Sequence[int] | None, seed: int = 0
) -> LoadedModel:
    """Build a network with random weights, which `seed` alone decides; the global random state stays as it was.

    Raises:
        InputError, MismatchError: as `load_model`.
    """
    scheme, name, options = split_spec(spec, "model")
    if scheme not in _SCHEMES:
        known = ", ".join(f"{known}:..." for known in _SCHEMES)
        raise InputError(f"model: {spec!r} is of no known kind; expected {known} or a .safetensors file of pnc")
    names = None if classes is None else check_class_names(classes, "classes")
    request = _Request(spec, name, options, names, _checked_shape(input_shape))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the accelerators
        model = _SCHEMES[scheme](request)
        _check_outputs(model)
    return model


def save_model(model: LoadedModel, path: str | Path, facts: Mapping[str, Any]) -> None:
    """Write a network to one safetensors file that `load_model` reads by itself: weights, spec, classes, input shape.

    Args:
        model: What to write.
        path: Where to.
        facts: Further JSON values to keep, such as the recipe.

    Raises:
        InputError: the path cannot be written.
    """
    own = {
        "format": FORMAT,
        "version": VERSION,
        "model": model.spec,
        "classes": list(model.classes),
        "input_shape": list(model.input_shape),
    }
    write_tensors(path, model.module.state_dict(), {**facts, **own})


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the parameters and buffers of `module`.

    BatchNorm's counts of batches may be missing: old checkpoints lack them, and in eval mode nothing reads them.

    Raises:
        MismatchError: other names or shapes; the message gives the first of each. `module` is then as before.
        InputError: a tensor holds NaN, with which every answer would be NaN. `module` is then as before.
    """
    state = {name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
    problems = {
        "missing": [name for name in state if name not in tensors and not name.endswith(".num_batches_tracked")],
        "unexpected": [name for name in tensors if name not in state],
        "of another shape": [
            f"{name} ({_size(tensors[name].shape)}, the network's is {_size(tensor.shape)})"
            for name, tensor in state.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ],
    }
    found = [f"{len(names)} {kind}: {listed(names, 3)}" for kind, names in problems.items() if names]
    if found:
        raise MismatchError(f"weights: they do not fit the network; {'; '.join(found)}; check the spec and the file")
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.isnan().any()]
    if broken:
        raise InputError(f"weights: {listed(broken, 3)} hold NaN: the training that made them failed; take other ones")
    module.load_state_dict(dict(tensors), strict=False)


# --------------------------------------------------------------------------------------------------- specs
@dataclass(frozen=True)
class _Request:
    """A parsed model spec with what the caller knows; `classes` and `input_shape` are None where not given."""

    spec: str
    name: str
    options: Mapping[str, str]
    classes: tuple[str, ...] | None
    input_shape: Shape | None

    def known(self) -> tuple[tuple[str, ...], Shape]:
        """Return (classes, input_shape); an InputError says which of them is not given."""
        if self.classes is None:
            raise InputError(f"classes: {self.spec} does not name its outputs; give their names in order as classes=")
        if self.input_shape is None:
            raise InputError(
                f"input_shape: {self.spec} does not say which images it takes; give (C, H, W) as input_shape="
            )
        return self.classes, self.input_shape


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
    classes, input_shape = request.known()
    return LoadedModel(
        _ZOO[request.name](input_shape, len(classes), **values).eval(), request.spec, classes, input_shape
    )


def _number(key: str, text: str, limit: int, whole: bool) -> float:
    """Read an option. Limits, because a spec may come from somebody else's file and must not fill the memory."""
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = 0
    if not 0 < value <= limit:
        raise InputError(f"model: {key}={text}: expected a {'whole ' if whole else ''}number above 0, {limit} at most")
    return value


def _build_py(request: _Request) -> LoadedModel:
    place, _, name = request.name.rpartition(":")
    relative = place.startswith(".") and not place.endswith(".py")
    if not place or relative or request.options:
        raise InputError(f"model: expected py:MODULE:FUNCTION or py:FILE.py:FUNCTION, got {request.spec!r}")
    function = getattr(_imported(place), name, None)
    if not callable(function):
        raise InputError(f"model: there is no function {name!r} in {place}")
    classes, input_shape = request.known()
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise InputError(f"model: {name} in {place}: {error}; give a function that takes no arguments") from error
    except ValueError:  # of a function in C that does not tell its signature: calling it will show
        pass
    network = function()
    if not isinstance(network, nn.Module):
        raise InputError(f"model: {request.spec} returned {type(network).__name__}; expected a torch.nn.Module")
    return LoadedModel(network.eval(), request.spec, classes, input_shape)


def _imported(place: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert spec is not None and spec.loader is not None  # the suffix is that of Python source
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError, OSError) as error:
        raise InputError(
            f"model: cannot import {place}: {error}; give a module that Python finds, or the path of a .py file"
        ) from error
    return module


_SCHEMES: dict[str, Callable[[_Request], LoadedModel]] = {"zoo": _build_zoo, "py": _build_py}


def _checked_shape(input_shape: Sequence[int] | None) -> Shape | None:
    if input_shape is None:
        return None
    if len(input_shape) != 3 or any(not isinstance(size, int) or size < 1 for size in input_shape):
        raise InputError(f"input_shape: expected three positive whole numbers (C, H, W), got {tuple(input_shape)}")
    return input_shape[0], input_shape[1], input_shape[2]


def _check_outputs(model: LoadedModel) -> None:
    """Run the network once: on images that it cannot take, or with outputs that the names do not fit, say so now."""
    parameter = next(model.module.parameters(), torch.empty(0))
    images = torch.zeros(2, *model.input_shape, dtype=parameter.dtype, device=parameter.device)
    try:
        with torch.no_grad():
            output = model.module(images)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"input_shape: {model.spec} does not take images of {_size(model.input_shape)}: {reason}"
        ) from error
    logits = output["logits"] if isinstance(output, Mapping) and "logits" in output else output
    logits = getattr(logits, "logits", logits)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        came = _size(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"model: {model.spec} must return logits (B, K) for B images, for 2 it returned {came}")
    if logits.shape[1] != len(model.classes):
        raise MismatchError(
            f"classes: {model.spec} has {logits.shape[1]} outputs, but {len(model.classes)} names were given; "
            "give one per output"
        )


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


# --------------------------------------------------------------------------------------------------- weights files
def _own_spec(path: Path, facts: Mapping[str, Any]) -> str:
    if not facts:
        raise InputError(
            f"model: {path} does not say which network it is for; give the spec, and this file as weights="
        )
    spec: str = facts["model"]
    if not spec.startswith("zoo:"):
        # Opening a file must not run code that the file names.
        raise InputError(f"model: {path} is for {spec!r}; give this spec yourself, and the file as weights=")
    return spec


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors, and the facts of a file of our own ({} for others)."""
    if not path.is_file():
        raise InputError(f"weights: there is no file {path}")
    if path.suffix != ".safetensors":
        return _plain_names(_read_checkpoint(path)), {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            if METADATA_KEY not in (file.metadata() or {}):
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                return _plain_names(tensors), {}
    except (OSError, SafetensorError) as error:
        raise FileFormatError(f"weights: {path} is not a whole safetensors file ({error}); copy it again") from error
    tensors, facts = read_tensors(path)
    _check_facts(path, facts)
    return tensors, facts


def _check_facts(path: Path, facts: Mapping[str, Any]) -> None:
    if facts.get("format") != FORMAT:
        raise FileFormatError(
            f"weights: {path} holds {facts.get('format')!r}, no network; give a file that pretrain wrote"
        )
    if facts.get("version") != VERSION:
        raise FileFormatError(
            f"weights: {path} is of format version {facts.get('version')}, this pnc reads {VERSION}; use a matching pnc"
        )
    classes, shape = facts.get("classes"), facts.get("input_shape")
    fine = isinstance(facts.get("model"), str) and isinstance(classes, list) and isinstance(shape, list)
    if not fine or not all(isinstance(name, str) for name in classes or ()):
        raise FileFormatError(f"weights: the metadata of {path} is damaged; make the file again")


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FileFormatError(
            f"weights: {path} is no checkpoint of tensors alone ({reason}); save model.state_dict() as safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise FileFormatError(
            f"weights: {path} holds no state dict; save model.state_dict(), or a dict with it under 'state_dict'"
        )
    return dict(state)


def _plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPER_PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
