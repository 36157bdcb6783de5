"""The results of a job's long steps, kept in a file, so that a job that was killed goes on where it was."""

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
    """Results of long steps by name. Every `keep` writes the file anew, whole or not at all.

    Args:
        path: The file; one that was written for something else is replaced. None keeps nothing.
        identity: Of all that decides the results.
        team: Of it the main process writes; all must be able to read.
    Raises:
        InputError: there is something else than such a file at `path`.
        FileFormatError: the file is damaged.
    """

    def __init__(self, path: Path | None = None, identity: str = "", team: Team = ALONE) -> None:
        self._path, self._identity, self._team, self._place = path, identity, team, ""
        self._found: dict[str, dict[str, Tensor]] = {}
        if path is None:
            return
        check_steps_path(path)
        there = path.exists()
        if there:
            tensors, facts = read_tensors(path)
            if facts.get("format") != FORMAT:
                raise InputError(
                    f"resume: {path} holds {facts.get('format')!r}, no steps of a clone; take another path"
                )
            if facts.get("identity") == identity:
                self._found = _steps(path, tensors, facts.get("steps"))
        if not team.agree(torch.tensor([len(self._found), there])):
            self._found = {}  # not all processes see the file

    def at(self, place: str) -> "Steps":
        """The same steps, with names that are told from those at other places."""
        own = copy.copy(self)
        own._place = f"{place}: "
        return own

    def get(self, name: str) -> Result | None:
        """What was kept under a name before; None where nothing was."""
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
        """Remove the file: nothing is left to go on with."""
        if self._path is not None and self._team.is_main:
            self._path.unlink(missing_ok=True)


def check_steps_path(path: object) -> None:
    """Refuse a path that no steps can be kept at, before any work.

    Raises:
        InputError: it is no path, has another suffix, its folder does not exist, or it is a folder itself.
    """
    if not isinstance(path, str | Path):
        raise InputError(f"resume: expected a path that ends in .safetensors, got {type(path).__name__}")
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"resume: expected a path that ends in .safetensors, got {path}")
    check_place(path, "resume")
    if not path.parent.is_dir():
        raise InputError(f"resume: there is no folder {path.parent}; make it first")


def _steps(path: Path, tensors: Mapping[str, Tensor], names: object) -> dict[str, dict[str, Tensor]]:
    """The tensors of a file by step, each of which the file names."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FileFormatError(f"resume: the metadata of {path} is damaged: it has no list of steps; remove the file")
    found: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for name, tensor in tensors.items():
        step, _, key = name.rpartition("/")
        if step not in found:
            raise FileFormatError(f"resume: {path} is damaged: {name[:80]!r} is of no step it names; remove the file")
        found[step][key] = tensor
    return found


NO_STEPS = Steps()
"""Keeps nothing."""
