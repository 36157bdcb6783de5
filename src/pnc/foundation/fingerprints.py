"""Fingerprints, which name a network's architecture and weights and say where two networks begin to differ."""

import hashlib
import zlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pnc.foundation.tensor_bits import DTYPES, as_bytes, dtype_name, value_digests


@dataclass(frozen=True)
class Fingerprint:
    """Names the structure and the weights of one network: the entries of its state dict, in the order of sorted names.

    It does not depend on device, memory format, version of torch, or wrappers such as `DataParallel` and
    `torch.compile`. All digests are the first hex digits of SHA-256.

    Attributes:
        structure: Of names, dtypes and shapes, 32 digits.
        weights: Of the structure and all values, 32 digits.
        tensors: For each entry 4 digits of its name, 4 of its dtype and shape, 8 of its values: these only say where
            two networks begin to differ.
    """

    structure: str
    weights: str
    tensors: tuple[str, ...]


def fingerprint(module: nn.Module) -> Fingerprint:
    """Compute the fingerprint of the state dict of `module`: parameters and persistent buffers."""
    state = plain_state(module)
    texts = [_structure_text(tensor.dtype, tensor.shape) for tensor in state.values()]
    values = value_digests(list(state.values()))
    structure = _hex("".join(f"{name}:{text};" for name, text in zip(state, texts, strict=True)), 32)
    entries = zip(state, texts, values, strict=True)
    return Fingerprint(
        structure,
        _hex(structure + "".join(values), 32),
        tuple(_hex(name, 4) + _hex(text, 4) + value[:8] for name, text, value in entries),
    )


class KnownFingerprint:
    """The fingerprint of one network, computed anew only where something speaks for a change of its tensors.

    Compared are their memory, torch's count of changes in place, and a checksum of their bytes in order, which also
    sees what was written past that count.
    """

    def __init__(self) -> None:
        self._seen: tuple[object, ...] | None = None
        self._found: Fingerprint | None = None

    def of(self, module: nn.Module) -> Fingerprint:
        """Give the fingerprint of a network, the same one each time."""
        seen = tuple(_trace(name, tensor) for name, tensor in plain_state(module).items())
        if self._found is None or seen != self._seen:
            self._found, self._seen = fingerprint(module), seen
        return self._found


def _trace(name: str, tensor: Tensor) -> tuple[object, ...]:
    """What changes with a tensor, at the cost of reading it once."""
    version = None if tensor.is_inference() else tensor._version
    checksum = zlib.crc32(as_bytes(tensor).cpu().numpy().data)
    return name, tensor.dtype, tuple(tensor.shape), tensor.data_ptr(), version, checksum


def first_difference(
    module: nn.Module, expected: Fingerprint, found: Fingerprint | None = None, *, structure_only: bool = False
) -> str | None:
    """Say in words where `module` first departs from `expected`; None where it does not.

    Args:
        module: A network.
        expected: Fingerprint of the network that it should be.
        found: Its own fingerprint, if that was just computed.
        structure_only: Let the values differ.
    """
    found = found or fingerprint(module)
    if found == expected or (structure_only and found.structure == expected.structure):
        return None
    if found.structure != expected.structure:
        return f"another architecture: {_first_in_structure(plain_state(module), found, expected)}"
    for name, ours, theirs in zip(plain_state(module), found.tensors, expected.tensors, strict=False):
        if ours != theirs:
            return f"the values of {name!r} differ"
    return "the values differ"


def _first_in_structure(state: Mapping[str, Tensor], found: Fingerprint, expected: Fingerprint) -> str:
    """Say which entry is the first that only one of two networks has, or has in another dtype or shape."""
    theirs = expected.tensors
    previous = ""
    for index, (name, ours) in enumerate(zip(state, found.tensors, strict=True)):
        if index == len(theirs) or (ours[:4] != theirs[index][:4] and _is_later(theirs[index], found.tensors[index:])):
            return f"{name!r} is a tensor that it should not have"
        if ours[:4] != theirs[index][:4]:
            return f"a tensor is missing {f'behind {previous!r}' if previous else 'in front'}, where it has {name!r}"
        if ours[4:8] != theirs[index][4:8]:
            return _other_dtype_or_shape(name, state[name], theirs[index][4:8])
        previous = name
    if len(theirs) > len(state):
        return f"{len(theirs) - len(state)} tensors are missing {f'behind {previous!r}' if previous else ''}".rstrip()
    return "names, dtypes or shapes differ"


def _is_later(entry: str, entries: Sequence[str]) -> bool:
    return any(entry[:4] == other[:4] for other in entries)


def _other_dtype_or_shape(name: str, tensor: Tensor, expected: str) -> str:
    """Say which of the two differs: the dtype can be found by trying, as there are few."""
    for dtype in DTYPES:
        if _hex(_structure_text(dtype, tensor.shape), 4) == expected:
            return f"{name!r} is {dtype_name(tensor.dtype)}, expected {dtype_name(dtype)}"
    return f"{name!r} has the shape {tuple(tensor.shape)} in {dtype_name(tensor.dtype)}, expected another one"


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict, sorted by name, with the names that it has outside of wrappers."""
    wrapped = {
        f"{name}.{child}".lstrip(".")
        for name, part in module.named_modules(remove_duplicate=False)
        if (child := _wrapped_child(part))
    }
    state = {_plain_name(name, wrapped): value for name, value in module.state_dict().items()}
    return {name: value for name, value in sorted(state.items()) if isinstance(value, Tensor)}


def _wrapped_child(module: nn.Module) -> str | None:
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    if "_orig_mod" in module._modules:  # what torch.compile returns
        return "_orig_mod"
    wraps: str | None = getattr(type(module), "WRAPS", None)  # ours that only choose what a network gives
    return wraps if wraps in module._modules else None


def _plain_name(name: str, wrapped: Set[str]) -> str:
    if not wrapped:
        return name
    parts = name.split(".")
    return ".".join(part for i, part in enumerate(parts) if ".".join(parts[: i + 1]) not in wrapped)


def _structure_text(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{dtype_name(dtype)}{list(shape)}"


def _hex(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
