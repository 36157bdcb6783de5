"""Our own files: safetensors with canonical JSON under one metadata key, written completely or not at all.

Reading trusts nothing: every size is checked against the file's size before memory is allocated, only listed dtypes are
accepted, JSON is limited in length and depth, and a digest covers the whole content. So reading any bytes gives either
what was written or one `FileFormatError`.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, BinaryIO, Never

import torch
from safetensors.torch import save
from torch import Tensor

from pnc.foundation.errors import FileFormatError, InputError, PNCError
from pnc.foundation.file_writing import path_text, write_file
from pnc.foundation.tensor_bits import DTYPES, as_bytes, dtype_name, value_digests

METADATA_KEY = "pnc"  # only one: several keys are written in hash order, so equal inputs would give different bytes
DIGEST_KEY = "digest"
"""Metadata key for the digest of tensors and metadata; added by `write_tensors`, removed by `read_tensors`."""

MAX_HEADER = 1 << 21
"""Maximum size of a file's header, in bytes: enough for 20,000 tensors."""

MAX_DEPTH = 16
"""Maximum nesting of lists and objects in a header."""

_MAX_DIMS, _MAX_NUMEL = 8, 1 << 40
_MANY_BYTES, _HOLES = 1 << 28, 64
"""Files from `_MANY_BYTES` on must hold data for at least one byte in `_HOLES`: holes cost nothing on disk."""

_CODES = ("F32", "F16", "BF16", "F64", "I64", "I32", "I16", "I8", "U8", "BOOL")
DTYPE_OF = dict(zip(_CODES, DTYPES, strict=True))
"""Dtypes by their codes in safetensors."""

_CODE_OF = dict(zip(DTYPES, _CODES, strict=True))


def canonical_json(value: Any) -> str:
    """Serialize `value` as JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


# ------------------------------------------------------------------------------------------------------------- writing
def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file whose metadata key `pnc` holds `metadata` and a digest; equal inputs give equal bytes.

    Raises:
        InputError: as `write_file`; also if a tensor has a dtype that files do not hold, or names and metadata are
            longer than `read_tensors` accepts.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(tensors.items())}
    for name, tensor in plain.items():
        if tensor.dtype not in _CODE_OF:
            known = ", ".join(map(dtype_name, DTYPES))
            raise InputError(f"tensors: {name} is {dtype_name(tensor.dtype)}; files hold {known}")
    sealed = {**metadata, DIGEST_KEY: _digest(plain, metadata)}
    data = save(plain, {METADATA_KEY: canonical_json(sealed)})
    n_header = int.from_bytes(data[:8], "little")
    if n_header > MAX_HEADER:
        raise InputError(f"tensors: names and metadata take {n_header} bytes, a file holds {MAX_HEADER}; shorten them")
    write_file(path, data)


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """SHA-256, 64 hex digits, of a file's whole content: names, dtypes, shapes and values of tensors, and metadata."""
    known = {name: tensors[name] for name in sorted(tensors)}
    values = value_digests(list(known.values()))
    listed = [[name, _CODE_OF[t.dtype], list(t.shape), v] for (name, t), v in zip(known.items(), values, strict=True)]
    rest = {key: value for key, value in metadata.items() if key != DIGEST_KEY}
    return hashlib.sha256(canonical_json([rest, listed]).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- reading
Check = Callable[[Mapping[str, Tensor], dict[str, Any]], None]
"""Called before any value is read, with the tensors on the meta device and the metadata including the digest."""


def read_tensors(path: str | Path, check: Check | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote: the tensors, on the CPU, and the metadata.

    Args:
        path: The file.
        check: Raises if the caller cannot use the names, dtypes, shapes or metadata: before memory is allocated.
    Raises:
        FileFormatError: no such file, not safetensors, damaged, larger than memory, or without our metadata.
    """
    tensors, metadata, _ = read_sealed(path, check)
    return tensors, metadata


def read_sealed(path: str | Path, check: Check | None = None) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    """Like `read_tensors`, but also return the verified digest; None if the file has none."""
    if not isinstance(path, str | Path):
        raise InputError(f"path: expected a path, got {type(path).__name__}")
    path = Path(path)
    with ExitStack() as stack:
        with _file_errors(path):
            if not stat.S_ISREG(path.stat().st_mode):
                _refuse(path, "it is not a regular file")
            file = stack.enter_context(path.open("rb"))
            entries, metadata, n_before = _read_header(path, file)
        if check is not None:  # outside of `_file_errors`: its errors are the caller's
            check({e.name: torch.empty(e.shape, dtype=e.dtype, device="meta") for e in entries}, metadata)
        with _file_errors(path):
            _refuse_holes(path, file)
            tensors = {entry.name: _read_tensor(path, file, entry, n_before) for entry in entries}
    digest = metadata.pop(DIGEST_KEY, None)
    if digest is not None and digest != _digest(tensors, metadata):
        raise FileFormatError(f"{path} is damaged: its content does not match its digest; copy or create it again")
    return dict(sorted(tensors.items())), metadata, digest


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors within the block into a `FileFormatError` that names the file."""
    try:
        yield
    except PNCError:
        raise
    except FileNotFoundError as error:
        raise FileFormatError(f"there is no file {path_text(path)}") from error
    except (OSError, ValueError) as error:  # ValueError: a path with NUL
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise FileFormatError(f"{path_text(path)} cannot be read: {reason}") from error


def _refuse_holes(path: Path, file: BinaryIO) -> None:
    """Refuse a large file that is nearly all holes: reading it would take memory and time for nothing but zeros."""
    size, seek_data = os.fstat(file.fileno()).st_size, getattr(os, "SEEK_DATA", None)
    if size < _MANY_BYTES or seek_data is None:
        return
    before = os.lseek(file.fileno(), 0, os.SEEK_CUR)
    place = n_data = 0
    while place < size and n_data < size // _HOLES:
        try:
            start = os.lseek(file.fileno(), place, seek_data)
            place = os.lseek(file.fileno(), start, os.SEEK_HOLE)
        except OSError:  # the rest is a hole
            break
        n_data += place - start
    os.lseek(file.fileno(), before, os.SEEK_SET)  # where the buffered reader expects it
    if n_data < size // _HOLES:
        _refuse(path, f"it has {size} bytes, but holds only {n_data}")


@dataclass(frozen=True)
class _Entry:
    """One tensor as the header describes it; `start` and `stop` are byte offsets from the end of the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def _read_header(path: Path, file: BinaryIO) -> tuple[list[_Entry], dict[str, Any], int]:
    """The tensors in file order, the metadata, and the offset of the first tensor; all sizes fit the file's size."""
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    n_header = int.from_bytes(first, "little")
    if len(first) < 8 or n_header > size - 8:
        _refuse(path, f"it has {size} bytes, fewer than its header needs")
    if n_header > MAX_HEADER:
        _refuse(path, f"its header has {n_header} bytes, more than {MAX_HEADER}")
    header = _parse_json(path, file.read(n_header), "header")
    metadata = _parse_metadata(path, header.pop("__metadata__", None))
    entries = sorted((_entry(path, *item) for item in header.items()), key=lambda entry: (entry.start, entry.stop))
    reached = 0
    for entry in entries:
        if entry.start != reached:
            _refuse(path, f"the bytes of {shortened(entry.name)} do not follow those of the tensor before")
        reached = entry.stop
    if reached != size - 8 - n_header:
        _refuse(path, f"its tensors have {reached} bytes, the file has {size - 8 - n_header} for them")
    return entries, metadata, 8 + n_header


def _entry(path: Path, name: str, facts: Any) -> _Entry:
    if not isinstance(facts, dict) or facts.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"the entry of {shortened(name)} is {shortened(facts)}")
    dtype = DTYPE_OF.get(facts["dtype"]) if isinstance(facts["dtype"], str) else None
    if dtype is None:
        _refuse(path, f"{shortened(name)} has the dtype {shortened(facts['dtype'])}")
    shape, offsets = facts["shape"], facts["data_offsets"]
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS or math.prod(filter(None, shape)) > _MAX_NUMEL:
        _refuse(path, f"{shortened(name)} has the shape {shortened(shape)}")
    n_bytes = math.prod(shape) * dtype.itemsize
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != n_bytes:
        _refuse(path, f"{shortened(name)} has {n_bytes} bytes, but its offsets are {shortened(offsets)}")
    return _Entry(name, dtype, tuple(shape), *offsets)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 60 for value in values)


def _read_tensor(path: Path, file: BinaryIO, entry: _Entry, n_before: int) -> Tensor:
    try:
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
    except RuntimeError as error:  # what torch raises if there is not enough memory
        n_bytes = math.prod(entry.shape) * entry.dtype.itemsize
        raise FileFormatError(
            f"{path} cannot be read: {shortened(entry.name)} takes {n_bytes} bytes, more than the memory available"
        ) from error
    raw = as_bytes(tensor)
    file.seek(n_before + entry.start)
    if len(raw) and file.readinto(raw.numpy()) != len(raw):  # type: ignore[attr-defined] # BinaryIO lacks it
        _refuse(path, f"the bytes of {shortened(entry.name)} end early")
    if entry.dtype == torch.bool and bool((raw > 1).any()):
        _refuse(path, f"{shortened(entry.name)} holds values that are neither true nor false")
    return tensor


def _parse_metadata(path: Path, metadata: Any) -> dict[str, Any]:
    text = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise FileFormatError(f"{path} has no metadata of pnc: it holds only weights, written by another program")
    return _parse_json(path, text, "metadata")


def _parse_json(path: Path, text: str | bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object with unique keys, finite numbers and limited depth."""
    try:
        value = json.loads(
            text.decode() if isinstance(text, bytes) else text,
            object_pairs_hook=_with_keys_once,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except (ValueError, RecursionError) as error:
        reason = str(error)
    else:
        if not isinstance(value, dict):
            reason = f"expected an object, got {type(value).__name__}"
        elif _is_deeper(value, MAX_DEPTH):
            reason = f"it is nested deeper than {MAX_DEPTH}"
        else:
            return value
    if what == "header":
        _refuse(path, reason)
    raise FileFormatError(f"the metadata of {path} is damaged: {reason}")


def _with_keys_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key appears twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def _is_deeper(value: Any, limit: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return limit == 0 or any(_is_deeper(part, limit - 1) for part in parts)


def _refuse(path: Path, reason: str) -> Never:
    raise FileFormatError(f"{path} is not a complete safetensors file ({reason}); copy or create it again")
