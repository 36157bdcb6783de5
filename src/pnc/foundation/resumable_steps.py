"""The results of a job's long steps, kept in a file so that a killed job resumes where it stopped."""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pnc.foundation.errors import FileFormatError, InputError
from pnc.foundation.file_writing import check_place
from pnc.foundation.process_team import ALONE, Team
from pnc.foundation.tensor_files import read_tensors, write_tensors

FORMAT = "pnc-steps"

Result = Mapping[str, Tensor]


class Steps:
    """Results of long steps by name. Every `keep` rewrites the file, completely or not at all.

    Args:
        path: The file; the steps of another job are replaced. None keeps nothing.
        identity: Digest of everything that determines the results.
        team: Its main process writes; all processes must be able to read.
    Raises:
        InputError: `path` is another kind of file.
        FileFormatError: the file is damaged.
    """

    def __init__(self, path: Path | None = None, identity: str = "", team: Team = ALONE) -> None:
        self._path, self._identity, self._team, self._place = path, identity, team, ""
        self._found: dict[str, dict[str, Tensor]] = {}
        if path is None:
            return
        check_steps_path(path)
        exists = path.exists()
        if exists:
            try:
                tensors, facts = read_tensors(path)
            except FileFormatError as error:
                raise FileFormatError(
                    f"resume: {path} is damaged; delete it to start again, or choose another path"
                ) from error
            if facts.get("format") != FORMAT:
                raise InputError(
                    f"resume: {path} holds {facts.get('format')!r}, not the steps of a clone; delete it, or choose "
                    "another path"
                )
            if facts.get("identity") == identity:
                self._found = _steps(path, tensors, facts.get("steps"))
        if not team.agree(torch.tensor([len(self._found), exists])):
            self._found = {}  # not all processes see the same file

    def at(self, place: str) -> "Steps":
        """The same steps, with every name prefixed by `place`."""
        own = copy.copy(self)
        own._place = f"{place}: "
        return own

    def get(self, name: str) -> Result | None:
        """The result kept under `name`; None if there is none."""
        return self._found.get(self._place + name)

    def keep(self, name: str, result: Result) -> None:
        """Keep the result of a step, for a later run."""
        if self._path is None:
            return
        self._found[self._place + name] = dict(result)
        if self._team.is_main:
            tensors = {f"{step}/{key}": tensor for step, one in self._found.items() for key, tensor in one.items()}
            facts = {"format": FORMAT, "identity": self._identity, "steps": sorted(self._found)}
            write_tensors(self._path, tensors, facts)

    def finish(self) -> None:
        """Remove the file, unless it is still another job's: this one is done."""
        if self._path is not None and self._found and self._team.is_main:
            self._path.unlink(missing_ok=True)


def check_steps_path(path: object) -> None:
    """Check, before any work, that steps can be kept at `path`.

    Raises:
        InputError: it is not a path, has another suffix, is a folder, or its folder does not exist.
    """
    if not isinstance(path, str | Path):
        raise InputError(f"resume: expected a path that ends in .safetensors, got {type(path).__name__}")
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"resume: expected a path that ends in .safetensors, got {path}")
    check_place(path, "resume")
    if not path.parent.is_dir():
        raise InputError(f"resume: there is no folder {path.parent}; create it first")


def _steps(path: Path, tensors: Mapping[str, Tensor], names: object) -> dict[str, dict[str, Tensor]]:
    """Group the tensors of a file by step; `names` are the steps that its metadata lists."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FileFormatError(f"resume: the metadata of {path} is damaged: it has no list of steps; remove the file")
    found: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for name, tensor in tensors.items():
        step = max((step for step in found if name.startswith(f"{step}/")), key=len, default=None)
        if step is None:
            raise FileFormatError(f"resume: {path} is damaged: {name[:80]!r} is in no listed step; remove the file")
        found[step][name.removeprefix(f"{step}/")] = tensor
    return found


NO_STEPS = Steps()
"""Keeps nothing."""
