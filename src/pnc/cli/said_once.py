"""What every command repeats, said once: in `pnc.toml` in the working folder, or in environment variables."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pnc.foundation.errors import InputError

FILE = Path("pnc.toml")
"""Read from the working folder, if it is there."""

KEYS = (
    *("target", "source", "data", "classes"),
    *("target_weights", "source_weights", "target_classes", "source_classes", "device", "threads"),
)
"""What it may set, each named like an option of the commands."""

COMMANDS = ("clone", "scan", "eval", "predict", "calibrate", "report", "export", "verify", "serve")
"""The commands that read it."""


def read_defaults(commands: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Read `pnc.toml` as defaults of options, by command; empty without such a file.

    Args:
        commands: The commands by name.
    Raises:
        InputError: it cannot be read, is not TOML, or has an unknown key or a value of the wrong type.
    """
    try:
        given = tomllib.loads(FILE.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{FILE}: cannot be read: {' '.join(str(error).split())}; mend or remove it") from error
    values = {key.replace("-", "_"): _joined(value) for key, value in given.items()}
    for key, value in values.items():
        if key not in KEYS:
            raise InputError(f"{FILE}: {key!r} is none of {', '.join(KEYS)}; remove it")
        if not isinstance(value, int if key == "threads" else str) or isinstance(value, bool):
            wanted = "a text, or a list of names without commas" if key.endswith("classes") else "a text"
            wanted = "a whole number" if key == "threads" else wanted
            raise InputError(f"{FILE}: {key}: expected {wanted}, got {value!r:.80}")
    return {name: _defaults(commands[name].params, values) for name in COMMANDS}


def _joined(value: Any) -> Any:
    """A list of texts without commas as the text that the command line takes; anything else as it is."""
    is_list = isinstance(value, list) and all(isinstance(one, str) and "," not in one for one in value)
    return ",".join(value) if is_list else value


def _defaults(parameters: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values for the options that a command has; a repeatable option gets a list."""
    found = {one.name: one for one in parameters}
    return {
        key: [value] if getattr(found[key], "multiple", False) else value
        for key, value in values.items()
        if key in found
    }
