"""A watched folder: each clone file in it is attached under the file's name, and detached when the file is removed."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from pnc.foundation.errors import InputError, PNCError
from pnc.serving.deployment import Deployment

SECONDS = 1.0
"""Time between two looks."""

SUFFIX = ".safetensors"
_LOG = logging.getLogger(__name__)
_Stamp = tuple[int, int, int]


class WatchedFolder:
    """Follows the clone files of a folder. A file that cannot be attached is tried again when it or the set changes.

    Args:
        folder: An existing folder.
        deployment: Receives the clones.
        most_bytes: Larger files are refused.
    Raises:
        InputError: there is no such folder.
    """

    def __init__(self, folder: Path, deployment: Deployment, most_bytes: int) -> None:
        if not folder.is_dir():
            raise InputError(f"watch: there is no folder {folder}; create it first")
        self._folder, self._deployment, self._most_bytes = folder, deployment, most_bytes
        self._attached: dict[str, _Stamp] = {}
        self._refused: dict[str, tuple[_Stamp, int, str]] = {}

    @property
    def refused(self) -> Mapping[str, str]:
        """Why files were not attached, by file name."""
        return {f"{name}{SUFFIX}": reason for name, (*_, reason) in self._refused.items()}

    def look(self) -> None:
        """Attach new and changed files, and detach the clones of removed ones."""
        found = self._found()
        for name in self._attached.keys() - found.keys():
            self._deployment.detach(name, "folder")
            del self._attached[name]
        for name in self._refused.keys() - found.keys():
            del self._refused[name]
        for name, stamp in found.items():
            generation = self._deployment.current.generation
            known = self._refused.get(name)
            if self._attached.get(name) == stamp and known is None:
                continue
            if known is not None and known[:2] == (stamp, generation):
                continue
            self._try(name, stamp)

    def _try(self, name: str, stamp: _Stamp) -> None:
        try:
            if stamp[1] > self._most_bytes:
                raise InputError(f"the file has {stamp[1]:,} bytes; at most {self._most_bytes:,} are read")
            content = (self._folder / f"{name}{SUFFIX}").read_bytes()
            self._deployment.attach(name, content, "folder")
        except (PNCError, OSError) as error:
            self._refused[name] = stamp, self._deployment.current.generation, str(error)
            _LOG.warning("%s%s is not attached: %s", name, SUFFIX, error)
        else:
            self._attached[name] = stamp
            self._refused.pop(name, None)

    def _found(self) -> dict[str, _Stamp]:
        """Time, size and number of each clone file, by name without the suffix, sorted."""
        found = {}
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIX) and not entry.name.startswith(".") and entry.is_file():
                    try:
                        facts = entry.stat()
                    except FileNotFoundError:  # removed a moment ago
                        continue
                    found[entry.name.removesuffix(SUFFIX)] = facts.st_mtime_ns, facts.st_size, facts.st_ino
        return dict(sorted(found.items()))
