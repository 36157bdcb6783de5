"""A folder with the clones that were attached over HTTP, so that they survive a restart.

`clones.json` names them; their files lie beside it, named by their content. A file is written before `clones.json`
names it, and removed after it no longer does: a server that is killed at any moment finds a consistent folder.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from pnc.foundation.errors import FileFormatError, InputError
from pnc.foundation.file_writing import path_text, write_file

try:
    import fcntl
except ImportError:  # Windows: two servers with one folder are not noticed
    fcntl = None  # type: ignore[assignment]

FORMAT, VERSION = "pnc-serve", 1


class StateFolder:
    """The clones of one server on disk.

    Args:
        folder: Created if missing.
    Raises:
        InputError: it cannot be created or written to, or another server uses it.
        FileFormatError: it holds another kind of `clones.json`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._list = folder, folder / "clones.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise InputError(
                f"state: cannot use {path_text(folder)}: {error.strerror or error}; give another folder"
            ) from error
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(self._lock)
                raise InputError(
                    f"state: another server uses {path_text(folder)}; stop it, or give another folder"
                ) from error
        self._files = self._read()

    @property
    def files(self) -> Mapping[str, Path]:
        """Files of the clones, by name, in the order in which they were attached."""
        return {name: self._folder / file for name, file in self._files.items()}

    def put(self, name: str, content: bytes) -> None:
        """Keep the file of a clone; one of the same name is replaced."""
        file = f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
        write_file(self._folder / file, content)
        self._write({**{other: kept for other, kept in self._files.items() if other != name}, name: file})

    def remove(self, name: str) -> None:
        """Forget a clone."""
        self._write({other: kept for other, kept in self._files.items() if other != name})

    def close(self) -> None:
        """Let another server use the folder."""
        os.close(self._lock)

    def _write(self, files: Mapping[str, str]) -> None:
        clones = [{"name": name, "file": file} for name, file in files.items()]
        facts = {"format": FORMAT, "version": VERSION, "clones": clones}
        write_file(self._list, json.dumps(facts, indent=2) + "\n")
        unused = set(self._files.values()) - set(files.values())
        self._files = dict(files)
        for file in unused:
            (self._folder / file).unlink(missing_ok=True)

    def _read(self) -> dict[str, str]:
        if not self._list.exists():
            return {}
        try:
            facts = json.loads(self._list.read_text())
            known = facts["format"], facts["version"]
            files = {one["name"]: one["file"] for one in facts["clones"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileFormatError(
                f"state: {path_text(self._list)} is damaged; remove it to start without clones"
            ) from error
        if known != (FORMAT, VERSION):
            raise FileFormatError(
                f"state: {path_text(self._list)} is {known[0]!r} version {known[1]!r}, not that of a server"
            )
        if any(not isinstance(file, str) or Path(file).name != file for file in files.values()):
            raise FileFormatError(f"state: {path_text(self._list)} names files outside of its folder; remove it")
        return files
