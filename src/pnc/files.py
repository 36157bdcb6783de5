"""Our own files: safetensors with one metadata key that holds canonical JSON, written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pnc.errors import FileFormatError, InputError

METADATA_KEY = "pnc"  # one key only: several are written in hash order, and equal inputs would give unequal bytes


def canonical_json(value: Any) -> str:
    """Write `value` as JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_file(path: str | Path, data: bytes | str) -> None:
    """Write `data` to `path` through a temporary file beside it: a reader sees the old file or the new one, whole.

    Raises:
        InputError: the folder does not exist or cannot be written to; nothing is left behind.
    """
    path = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; give it what an ordinary new file gets.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; choose a folder that exists and is writable"
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file whose metadata key `pnc` holds `metadata`; equal inputs give equal bytes.

    Raises:
        InputError: as `write_file`.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(tensors.items())}
    write_file(path, save(plain, {METADATA_KEY: canonical_json(metadata)}))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote: the tensors, on the CPU, and the metadata.

    Raises:
        FileFormatError: no such file, not safetensors, damaged, or without our metadata.
    """
    try:
        with safe_open(Path(path), framework="pt", device="cpu") as file:
            metadata = _parse_metadata(path, file.metadata())
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (no mapping)
    except FileNotFoundError as error:
        raise FileFormatError(f"there is no file {path}") from error
    except (OSError, SafetensorError) as error:
        raise FileFormatError(f"{path} is not a whole safetensors file ({error}); copy or make it again") from error


def _parse_metadata(path: str | Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get(METADATA_KEY)
    if text is None:
        raise FileFormatError(f"{path} has no metadata of pnc: it holds weights only, made by another program")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"the metadata of {path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"the metadata of {path} is damaged: expected an object, got {type(value).__name__}")
    return value
