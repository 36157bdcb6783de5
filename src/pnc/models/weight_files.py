"""Files of weights: those that pnc writes, and the state dicts of others, read without running code."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pnc.foundation.class_names import listed
from pnc.foundation.errors import FileFormatError, InputError, MismatchError
from pnc.foundation.tensor_files import METADATA_KEY, read_tensors
from pnc.models.preprocessing import shape_text

FORMAT = "pnc-network"
VERSION = 1

_WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile


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
            f"{name} ({shape_text(tensors[name].shape)}, the network's is {shape_text(tensor.shape)})"
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


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors, and the facts of a file of our own ({} for others).

    Raises:
        InputError: there is no such file.
        FileFormatError: a file that is damaged, of another format, or of a newer version of it.
    """
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
