"""Fingerprints, which identify a network's architecture and weights and show where two networks first differ."""

import hashlib
import zlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pnc.foundation.tensor_bits import DTYPES, as_bytes, dtype_name, value_digests


@dataclass(frozen=True)
class Fingerprint:
    """Identifies the structure and the weights of one network: the entries of its state dict, sorted by name.

    It does not depend on device, memory format, version of torch, or wrappers such as `DataParallel` and
    `torch.compile`. All digests are the first hex digits of SHA-256.

    Attributes:
        structure: Digest of names, dtypes and shapes, 32 digits.
        weights: Digest of the structure and all values, 32 digits.
        tensors: For each entry, 4 digits of its name, 4 of its dtype and shape, 8 of its values; used only to show
            where two networks first differ.
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
    """Caches the fingerprint of one network, and recomputes it only if its tensors seem to have changed.

    It compares their memory addresses, torch's counts of in-place changes, and a checksum of their bytes, which also
    detects changes that torch does not count.
    """

    def __init__(self) -> None:
        self._states: tuple[object, ...] | None = None
        self._fingerprint: Fingerprint | None = None

    def of(self, module: nn.Module) -> Fingerprint:
        """Return the fingerprint of the network, which must be the same one at every call."""
        states = tuple(_tensor_state(name, tensor) for name, tensor in plain_state(module).items())
        if self._fingerprint is None or states != self._states:
            self._fingerprint, self._states = fingerprint(module), states
        return self._fingerprint


def _tensor_state(name: str, tensor: Tensor) -> tuple[object, ...]:
    """A key that changes whenever the tensor does, at the cost of reading it once."""
    version = None if tensor.is_inference() else tensor._version
    checksum = zlib.crc32(as_bytes(tensor).cpu().numpy().data)
    return name, tensor.dtype, tuple(tensor.shape), tensor.data_ptr(), version, checksum


def first_difference(
    module: nn.Module, expected: Fingerprint, found: Fingerprint | None = None, *, structure_only: bool = False
) -> str | None:
    """Describe where `module` first differs from `expected`; None if it does not.

    Args:
        module: A network.
        expected: Fingerprint of the network that it should be.
        found: Its own fingerprint, if already computed.
        structure_only: Ignore the values.
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
    """Describe the first entry that only one of the two networks has, or whose dtype or shape differs."""
    theirs = expected.tensors
    previous = ""
    for index, (name, ours) in enumerate(zip(state, found.tensors, strict=True)):
        if index == len(theirs) or (ours[:4] != theirs[index][:4] and _is_later(theirs[index], found.tensors[index:])):
            return f"{name!r} is a tensor that it should not have"
        if ours[:4] != theirs[index][:4]:
            return f"a tensor is missing {f'after {previous!r}' if previous else 'at the start'}, before {name!r}"
        if ours[4:8] != theirs[index][4:8]:
            return _other_dtype_or_shape(name, state[name], theirs[index][4:8])
        previous = name
    if len(theirs) > len(state):
        return f"{len(theirs) - len(state)} tensors are missing {f'after {previous!r}' if previous else ''}".rstrip()
    return "names, dtypes or shapes differ"


def _is_later(entry: str, entries: Sequence[str]) -> bool:
    return any(entry[:4] == other[:4] for other in entries)


def _other_dtype_or_shape(name: str, tensor: Tensor, expected: str) -> str:
    """Describe which of the two differs; the expected dtype is found by trying all of them."""
    for dtype in DTYPES:
        if _hex(_structure_text(dtype, tensor.shape), 4) == expected:
            return f"{name!r} is {dtype_name(tensor.dtype)}, expected {dtype_name(dtype)}"
    return f"{name!r} has another shape than expected; it is {tuple(tensor.shape)} in {dtype_name(tensor.dtype)}"


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict, sorted by name, with the names that its entries have without wrappers."""
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
    wraps: str | None = getattr(type(module), "WRAPS", None)  # our own wrappers, such as `Output`
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
