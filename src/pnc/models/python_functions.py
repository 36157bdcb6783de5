"""Networks from the user's own functions; any error in that code becomes one line."""

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
        spec: The whole spec, for messages.
    Raises:
        InputError: there is no such function, or importing it fails.
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
    except ValueError:  # a C function without a signature: the call will show
        pass
    found: Callable[[], Any] = function
    return found


def called(function: Callable[[], Any], spec: str) -> nn.Module:
    """Call a function and return its network.

    Raises:
        InputError: the function raises an error, or returns something other than a network.
    """
    try:
        network = function()
    except Exception as error:
        raise InputError(f"model: {spec} raised {_error_line(error)}") from error
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
        raise InputError(f"model: cannot import {place}: it raised {_error_line(error)}") from error
    return module


def _error_line(error: Exception) -> str:
    """An error of the user's code on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
