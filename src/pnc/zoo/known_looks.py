"""Looks kept in a file, one JSON line each: a stopped ranking continues, and a later one looks only at what is new."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pnc.foundation.errors import FileFormatError, InputError
from pnc.foundation.file_writing import check_place, path_text, write_file
from pnc.foundation.tensor_files import canonical_json

_FORMAT = "pnc-zoo-looks"
_VERSION = 2


class KnownLooks:
    """The looks that a file holds; without a path, they are only in memory.

    Args:
        path: The file; made if it is missing. An incomplete last line, of a killed process, is dropped.
        identity: Whatever looks depend on but the source.
    Raises:
        InputError: the file holds looks of another target, support or request.
        FileFormatError: the file holds something else.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self._path = None if path is None else check_place(path, "resume")
        self._found: dict[str, dict[str, Any]] = {}
        if self._path is None:
            return
        head = {"format": _FORMAT, "version": _VERSION, "identity": identity}
        lines = [canonical_json(head)]
        if self._path.is_file():
            lines = self._path.read_bytes().decode(errors="replace").rpartition("\n")[0].splitlines() or lines
        try:
            first, *rows = [json.loads(line) for line in lines]
            same, is_ours = first == head, first["format"] == _FORMAT
            self._found = {row["key"]: row["look"] for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(f"resume: {path_text(self._path)} holds no looks at a zoo; move it away") from error
        if not is_ours or not same:
            raise InputError(
                f"resume: {path_text(self._path)} is of another target, support, request or version; remove it, or "
                "take another path"
            )
        write_file(self._path, "\n".join(lines) + "\n")

    def get(self, key: str) -> dict[str, Any] | None:
        """The facts kept under a key, or None."""
        return self._found.get(key)

    def keep(self, key: str, look: Mapping[str, Any]) -> None:
        """Keep the facts of a look."""
        self._found[key] = dict(look)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(canonical_json({"key": key, "look": self._found[key]}) + "\n")
