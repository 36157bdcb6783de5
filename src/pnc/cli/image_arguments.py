"""Images named on the command line: files, folders, patterns, standard input."""

import glob
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pnc.data.image_files import image_suffixes
from pnc.foundation.class_names import listed
from pnc.foundation.errors import InputError

STANDARD_INPUT = "-"


@contextmanager
def image_files(words: Sequence[str]) -> Iterator[Mapping[Path, str]]:
    """Find the image files that the given words name.

    Args:
        words: Paths of files; folders, searched recursively; patterns; or "-", standard input: an image, or one path
            per line.
    Yields:
        Path and display name of each file, in order; the file for standard input exists only within the block.
    Raises:
        InputError: a folder has no image, a pattern matches no file, or standard input is empty.
    """
    with tempfile.TemporaryDirectory() as folder:
        found: dict[Path, str] = {}
        for word in words:
            for path, name in _named(word, Path(folder)):
                found.setdefault(path, name)
        yield found


def _named(word: str, folder: Path) -> list[tuple[Path, str]]:
    if word == STANDARD_INPUT:
        return _from_standard_input(folder)
    if not word:
        raise InputError("images: one of the names is empty; name a file, a folder or a pattern")
    path = Path(word)
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in image_suffixes())
        if not inside:
            raise InputError(f"images: there is no image in {path}; its files end in {_suffixes(path)}")
        return [(file, str(file)) for file in inside]
    if not path.exists() and glob.has_magic(word):
        root = Path(path.anchor or ".")
        files = sorted(file for file in root.glob(str(path.relative_to(path.anchor))) if file.is_file())
        if not files:
            raise InputError(f"images: no file matches {word}; put patterns in quotes, or name files")
        return [(file, str(file)) for file in files]
    return [(path, str(path))]


def _from_standard_input(folder: Path) -> list[tuple[Path, str]]:
    """The paths in standard input if it is text, otherwise the image that it contains."""
    content = sys.stdin.buffer.read()
    if not content.strip():
        raise InputError("images: standard input is empty; give an image, or one path per line")
    lines = [] if b"\0" in content else content.decode(errors="surrogateescape").splitlines()
    if any(Path(line).exists() for line in lines[:1]):
        return [one for line in lines if line for one in _named(line, folder)]
    if lines and lines[0].isprintable() and all(line.isprintable() for line in lines):
        raise InputError(f"images: there is no file {lines[0]:.200}, which standard input names")
    path = folder / "standard input"
    path.write_bytes(content)
    return [(path, STANDARD_INPUT)]


def _suffixes(folder: Path) -> str:
    found = sorted({file.suffix or "(no suffix)" for file in folder.rglob("*") if file.is_file()})
    return listed(found, 5)
