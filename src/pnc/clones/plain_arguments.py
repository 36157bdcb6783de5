"""Arguments of recorded operations as JSON, and back: numbers, texts, collections, references to earlier operations."""

import math
from collections.abc import Callable, Mapping
from reprlib import repr as shortened
from typing import Any

import torch
from torch import fx

from pnc.clones.allowed_operations import DTYPES, MEMORY_FORMATS
from pnc.clones.metadata_object import Fail
from pnc.foundation.errors import InputError

MAX_NUMBER = 1 << 62
_MAX_DEPTH, _MAX_TEXT = 5, 100


def plain(value: Any, places: Mapping[fx.Node, int]) -> Any:
    """An argument as JSON; everything but numbers, texts, lists and None is an object with one key.

    Args:
        value: The argument.
        places: Index of each earlier operation.
    Raises:
        InputError: files cannot hold it.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int) and abs(value) <= MAX_NUMBER:
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, fx.Node):
        return {"node": places[value]}
    if isinstance(value, tuple):
        return {"tuple": [plain(part, places) for part in value]}
    if isinstance(value, list):
        return [plain(part, places) for part in value]
    if isinstance(value, slice):
        return {"slice": [plain(part, places) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: plain(part, places) for key, part in value.items()}}
    for key, names in _NAMED.items():
        found = next((name for name, one in names.items() if one is value or one == value), None)
        if found is not None:
            return {key: found}
    raise InputError(f"clone: files cannot hold the argument {shortened(value)}")


_NAMED: Mapping[str, Mapping[str, Any]] = {
    "dtype": DTYPES,
    "memory_format": MEMORY_FORMATS,
    "device": {"cpu": torch.device("cpu")},
    "layout": {"strided": torch.strided},
    "constant": {"...": ...},
}


def parsed(value: Any, found: Callable[[int], Any], fail: Fail, depth: int = _MAX_DEPTH) -> Any:
    """An argument from its JSON.

    Args:
        value: The JSON.
        found: Gives the operation of an index; it refuses one that does not exist yet.
        fail: Raises the error.
        depth: How deep collections may be nested.
    """
    if value is None or isinstance(value, bool) or (isinstance(value, int | float) and abs(value) <= MAX_NUMBER):
        return value
    if isinstance(value, str) and len(value) <= _MAX_TEXT and value.isprintable():
        return value
    if isinstance(value, list) and depth:
        return [parsed(part, found, fail, depth - 1) for part in value]
    if isinstance(value, dict) and len(value) == 1 and depth:
        ((key, content),) = value.items()
        if key in ("tuple", "slice") and isinstance(content, list) and (key == "tuple" or len(content) == 3):
            parts = [parsed(part, found, fail, depth - 1) for part in content]
            return tuple(parts) if key == "tuple" else slice(*parts)
        if key == "dict" and isinstance(content, dict):
            return {name: parsed(part, found, fail, depth - 1) for name, part in content.items()}
        if key == "node" and type(content) is int:
            return found(content)
        if key == "float" and content in ("inf", "-inf", "nan"):
            return float(content)
        if key in _NAMED and isinstance(content, str) and content in _NAMED[key]:
            return _NAMED[key][content]
    return fail(f"part: {shortened(value)} is no argument of an operation")
