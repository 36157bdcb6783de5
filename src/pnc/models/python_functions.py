"""Networks that functions of the user's own return: errors of that code are one line."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from pnc.foundation.errors import InputError


def python_function(name: str, spec: str) -> Callable[[], Any]:
    """Find a function without arguments.

    Args:
        name: MODULE:FUNCTION or FILE.py:FUNCTION.
        spec: The whole of it, for messages.
    Raises:
        InputError: there is none, or importing it fails.
    """
    place, _, name = name.rpartition(":")
    if not place or (place.startswith(".") and not place.endswith(".py")):
        raise InputError(f"model: expected py:MODULE:FUNCTION or py:FILE.py:FUNCTION, got {spec!r}")
    function = getattr(_imported(place), name, None)
    if not callable(function):
        raise InputError(f"model: there is no function {name!r} in {place}")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise InputError(f"model: {name} in {place}: {error}; give a function that takes no arguments") from error
    except ValueError:  # a function in C without a signature: the call will show
        pass
    found: Callable[[], Any] = function
    return found


def called(function: Callable[[], Any], spec: str) -> nn.Module:
    """Call a function for its network.

    Raises:
        InputError: it raises, or returns something else.
    """
    try:
        network = function()
    except Exception as error:
        raise InputError(f"model: {spec} raised {_told(error)}") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"model: {spec} returned {type(network).__name__}; expected a torch.nn.Module")
    return network


def _imported(place: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert spec is not None and spec.loader is not None  # because of the suffix .py
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError, OSError) as error:
        raise InputError(
            f"model: cannot import {place}: {error}; give an importable module, or the path of a .py file"
        ) from error
    except Exception as error:
        raise InputError(f"model: cannot import {place}: it raised {_told(error)}") from error
    return module


def _told(error: Exception) -> str:
    """What an error of somebody else's code says, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
