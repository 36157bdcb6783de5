"""The sources that a server knows, and clones read from files with the source that each needs."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from pnc.clones.clone import Clone
from pnc.clones.clone_file import inspect, load
from pnc.foundation.errors import MismatchError, PNCError
from pnc.foundation.fingerprints import Fingerprint, fingerprint


class CloneSources:
    """Sources by their fingerprints.

    Args:
        sources: Networks with what messages call them.
    """

    def __init__(self, sources: Sequence[tuple[str, nn.Module]]) -> None:
        self._sources = [(name, module, fingerprint(module)) for name, module in sources]

    @property
    def names(self) -> list[str]:
        """What messages call the sources."""
        return [name for name, *_ in self._sources]

    def load(self, path: Path, name: str, input_shape: tuple[int, ...]) -> Clone:
        """Read a clone, and give it a name.

        Args:
            path: A clone file.
            name: The name to attach it under; also what messages call the file.
            input_shape: (C, H, W) of the server's images.
        Raises:
            MismatchError: no source fits the file, or it is for other images.
            FileFormatError: it is damaged or not a clone file.
            InputError: the name cannot be one.
        """
        try:
            facts = inspect(path)
            source = self._source(facts["kind"], facts["source"]) if facts["needs_source"] else None
            return load(path, source=source, input_shape=input_shape).renamed(name)
        except PNCError as error:
            raise type(error)(str(error).replace(str(path), f"the file of {name!r}")) from error

    def _source(self, kind: str, wanted: object) -> nn.Module:
        """The source that a file was made from; for a full file that lacks its structure, any of the architecture."""
        assert isinstance(wanted, dict)
        key = "structure" if kind == "full" else "weights"
        for _, module, known in self._sources:
            if _part(known, key) == wanted[key]:
                return module
        have = f"this server has {', '.join(self.names)}" if self._sources else "this server has no source"
        if kind == "full":
            raise MismatchError(
                f"the clone needs a network of its source's architecture (fingerprint {wanted[key]}), and {have}; "
                "start the server with --source and any network of that architecture"
            )
        raise MismatchError(
            f"the clone is a thin file, which needs the source that it was made from (fingerprint {wanted[key]}), and "
            f"{have}; start the server with --source, once for each source"
        )


def _part(known: Fingerprint, key: str) -> str:
    return known.structure if key == "structure" else known.weights
