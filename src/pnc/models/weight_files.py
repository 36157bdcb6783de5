"""Files of weights, from pnc and from other programs, read without running code."""

import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pnc.foundation.class_names import listed
from pnc.foundation.errors import FileFormatError, InputError, MismatchError
from pnc.foundation.file_writing import checked_path, path_text
from pnc.foundation.tensor_bits import dtype_name
from pnc.foundation.tensor_files import DIGEST_KEY, DTYPE_OF, METADATA_KEY, read_tensors
from pnc.models.preprocessing import shape_text

FORMAT = "pnc-network"
VERSION = 1

CheckFile = Callable[[Mapping[str, Tensor], Mapping[str, Any]], None]
"""Called before the values of a file are read, with its tensors on the meta device and its metadata."""

_COMPILED = "_orig_mod."  # torch.compile, at any depth
_PARALLEL = "module."  # DataParallel and similar wrappers
_AVERAGED = "n_averaged"  # a count that torch's AveragedModel stores with the weights
_STATE_KEYS = ("state_dict", "model_state_dict", "model")
_COUNTS = "num_batches_tracked"

_OTHER_FILES = (
    (rb"version https://git-lfs", "a git-lfs pointer to a file that is not fetched yet; run `git lfs pull`"),
    (rb"(?i)\s*<(!doctype|html|head|\?xml|!--)", "a web page; download the file itself, not the page that shows it"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "a compressed file; unpack it first"),
    (rb"\x89HDF", "an HDF5 file, such as Keras writes; save the network's state dict with PyTorch"),
    (rb"GGUF", "a GGUF file; save the network's state dict with PyTorch"),
    (rb"\s*[\[{]", "JSON text; give the file of weights that it belongs to"),
)
"""How files begin that are often mistaken for weights, and what they are."""

# Everything that torch.load raises for damaged files.
_LOADING_ERRORS = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError, OSError),
    *(ImportError, AssertionError, ArithmeticError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile),
)


# --------------------------------------------------------------------------------------------------- into a network
def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the parameters and buffers of `module`.

    BatchNorm's counts of batches may be missing: old checkpoints lack them, and in eval mode nothing reads them.
    A tensor that the network has under several names may be given under one of them.

    Raises:
        MismatchError: names, shapes or kinds of numbers differ; the message gives the first of each. `module` is not
            changed.
        InputError: a tensor has NaN or infinity where the network has none. `module` is not changed.
    """
    check_fit(module, tensors)
    state = _state(module)
    broken = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not _is_finite(tensor) and (_has_nan(tensor) or _is_finite(state[name][1]))
    ]
    if broken:
        what = "NaN: their training failed"
        if not any(_has_nan(tensors[name]) for name in broken):
            what = "infinity, which float16 makes of values above 65504"
        raise InputError(f"weights: {listed(broken, 3)} contain {what}; use other weights")
    module.load_state_dict({state[name][0]: tensor for name, tensor in tensors.items()}, strict=False)


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise a `MismatchError` unless the tensors, which may be on the meta device, have the network's names and shapes.

    Kinds of numbers must agree as well: floating point, whole or complex.
    """
    state = _state(module)
    places: dict[object, list[str]] = {}
    for name, (_, tensor) in state.items():
        places.setdefault(_place(tensor), []).append(name)
    tied = {name: names for names in places.values() for name in names}
    missing = [
        name for name in state if not any(one in tensors for one in tied[name]) and name.rpartition(".")[2] != _COUNTS
    ]
    problems = {
        "missing": missing,
        "unexpected": [name for name in tensors if name not in state],
        "of another shape": [
            f"{name} ({shape_text(tensors[name].shape)}, the network's is {shape_text(tensor.shape)})"
            for name, (_, tensor) in state.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ],
        "of another kind": [
            f"{name} ({dtype_name(tensors[name].dtype)}, the network's is {dtype_name(tensor.dtype)})"
            for name, (_, tensor) in state.items()
            if name in tensors and _kind(tensors[name]) != _kind(tensor) and name.rpartition(".")[2] != _COUNTS
        ],
    }
    found = [f"{len(names)} {kind}: {listed(names, 3)}" for kind, names in problems.items() if names]
    if found:
        raise MismatchError(f"weights: they do not fit the network; {'; '.join(found)}; check the spec and the file")
    for names in places.values():
        given = [name for name in names if name in tensors and not tensors[name].is_meta]
        if len(given) > 1 and not all(torch.equal(tensors[given[0]], tensors[name]) for name in given[1:]):
            raise MismatchError(
                f"weights: {listed(given, 3)} are one tensor in the network, but differ in the file; check the spec "
                "and the file"
            )


def _state(module: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Name and tensor of each entry of a state dict, by its name without wrappers."""
    own = {name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
    return {plain: (name, own[name]) for plain, name in _plain_names(list(own)).items()}


def _place(tensor: Tensor) -> object:
    """A key that is equal for tensors over the same memory, and different for all others."""
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "floating point" if tensor.is_floating_point() else "whole"


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.float().isfinite().all())


def _has_nan(tensor: Tensor) -> bool:
    return bool(tensor.float().isnan().any())


# --------------------------------------------------------------------------------------------------- out of a file
def read_weights(path: Path, check: CheckFile | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors, and the metadata of a file of our own ({} for others).

    Args:
        path: A file of safetensors or of `torch.save`.
        check: Raises if the caller cannot use the file's tensors, before their values are read. It is not called for
            files of `torch.save`, whose tensors are known only after reading.
    Raises:
        InputError: there is no such file.
        FileFormatError: the file is damaged, in another format, or written by a newer version.
    """
    if not checked_path(path, "weights").is_file():
        raise InputError(f"weights: there is no file {path_text(path)}")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise InputError(f"weights: {path_text(path)} cannot be read: {error.strerror or error}") from error
    is_safetensors = head[8:9] == b"{"  # after the length of the header, whose bytes may have any values
    other = next((words for beginning, words in _OTHER_FILES if not is_safetensors and re.match(beginning, head)), None)
    is_checkpoint = not is_safetensors and head.startswith((b"PK", b"\x80"))  # a zip archive or a pickle
    if other is None and path.suffix == ".safetensors" and is_checkpoint:
        other = "a file of torch.save, not of safetensors; rename it to .pt"
    if other is not None:
        raise FileFormatError(f"weights: {path_text(path)} is {other}")
    if not is_safetensors and path.suffix != ".safetensors":
        tensors = _read_checkpoint(path)
        return {plain: tensors[name] for plain, name in _plain_names(list(tensors)).items()}, {}
    found = _read_safetensors(path, check)
    return (found, {}) if found is not None else read_tensors(path, partial(_check_own, path, check))


def _read_safetensors(path: Path, check: CheckFile | None) -> dict[str, Tensor] | None:
    """The tensors of another program's file, including those it stores only once for several names; None for ours."""
    with _file_errors(path), safe_open(path, framework="pt", device="cpu") as file:
        facts = file.metadata() or {}
        if METADATA_KEY in facts:
            return None
        shapes = {name: _on_meta(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118 (no mapping)
    same = {name: kept for name, kept in facts.items() if kept in shapes and name not in shapes}
    plain = {short: same.get(name, name) for short, name in _plain_names([*shapes, *same]).items()}
    if check is not None:  # outside of `_file_errors`: its errors are the caller's
        check({short: shapes[name] for short, name in plain.items()}, {})
    with _file_errors(path), safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in shapes}
    return {short: tensors[name] for short, name in plain.items()}


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: not enough memory
        raise FileFormatError(f"weights: {path} is not a complete safetensors file ({error}); copy it again") from error


def _on_meta(one: Any) -> Tensor:
    """A tensor on the meta device for a slice of a file; dtypes that our own files do not hold count as float32."""
    return torch.empty(one.get_shape(), dtype=DTYPE_OF.get(one.get_dtype(), torch.float32), device="meta")


def _check_own(path: Path, check: CheckFile | None, shapes: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Check the metadata of a file of our own, then call the caller's check."""
    if facts.get("format") != FORMAT:
        raise FileFormatError(
            f"weights: {path} holds {facts.get('format')!r:.80}, not a network; give a file written by pretrain"
        )
    if facts.get("version") != VERSION:
        raise FileFormatError(
            f"weights: {path} has format version {facts.get('version')!r:.80}, this pnc reads {VERSION}; "
            "use a matching pnc"
        )
    classes, shape = facts.get("classes"), facts.get("input_shape")
    fine = isinstance(facts.get("model"), str) and isinstance(classes, list) and isinstance(shape, list)
    if not fine or not all(isinstance(name, str) for name in classes or ()):
        raise FileFormatError(f"weights: the metadata of {path} is damaged; create the file again")
    if not isinstance(facts.get(DIGEST_KEY), str):
        raise FileFormatError(f"weights: the metadata of {path} has no digest of the content; create the file again")
    if check is not None:
        check(shapes, facts)


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _LOADING_ERRORS as error:
        raise FileFormatError(
            f"weights: {path} is not a checkpoint of only tensors ({_reason(path, error)}); "
            "save model.state_dict() as safetensors"
        ) from error
    for key in _STATE_KEYS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise FileFormatError(
            f"weights: {path} has no state dict; save model.state_dict(), or a dict with it under 'state_dict'"
        )
    wrong = [
        name
        for name, value in state.items()
        if not isinstance(name, str) or value.layout != torch.strided or value.is_quantized
    ]
    if wrong:
        raise FileFormatError(f"weights: {path} holds {wrong[0]!r:.80}, which is not a plain tensor with a name")
    return dict(state)


def _reason(path: Path, error: Exception) -> str:
    """Why torch cannot read a file, without torch's own advice, which is to run the code in it."""
    text = str(error)
    if not path.stat().st_size:
        return "it is empty"
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it also contains {found[1]}, and reading that could run code"
    if "TorchScript" in text:
        return "it is a TorchScript archive"
    return "it is damaged, or not written by torch.save"


def _plain_names(names: list[str]) -> dict[str, str]:
    """Each name by its plain form, without the prefixes of wrappers, in whatever order these wrap the network."""
    plain = {name.replace(_COMPILED, ""): name for name in names}
    while plain:
        kept = {name: own for name, own in plain.items() if name != _AVERAGED}
        if not kept or not all(name.startswith(_PARALLEL) for name in kept):
            break
        plain = {name.removeprefix(_PARALLEL): own for name, own in kept.items()}
    return plain
