"""Folders of image files, one folder per class; every file is either listed as an image or counted as skipped."""

import errno
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pnc.data.image_files import image_suffixes
from pnc.data.splits import Split, find, other
from pnc.foundation.class_names import listed
from pnc.foundation.errors import InputError
from pnc.foundation.file_writing import checked_path, path_text

_SYSTEM_FILES = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
"""Files that operating systems put into folders; they are not counted."""


@dataclass
class Skipped:
    """What was skipped, counted by reason."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str) -> None:
        """Count one more."""
        self.counts[reason] += 1

    @property
    def text(self) -> str:
        """The counts in words; empty if nothing was skipped."""
        return listed([f"{count} {reason}" for reason, count in sorted(self.counts.items())], 6) if self.counts else ""


@dataclass(frozen=True)
class FolderFiles:
    """The image files of one split.

    Attributes:
        classes: Names of the folders, sorted.
        files: Class and path of each file, sorted.
        skipped: What was skipped, in words.
    """

    classes: tuple[str, ...]
    files: tuple[tuple[int, Path], ...]
    skipped: str


def list_folder(body: str, split: Split, options: Mapping[str, str]) -> FolderFiles:
    """List the images below ROOT/SPLIT/CLASS/ or, if no folder is named like a split, below ROOT/CLASS/.

    Links to folders are followed; within a class each folder is read once.

    Raises:
        InputError: no such folder, no folder for the split, a folder that cannot be read, or no image.
    """
    root = checked_path(body, "spec")
    if not root.is_dir():
        raise InputError(f"spec: there is no folder {path_text(body)}")
    try:
        return _listed(_split_folder(root, split, options))
    except OSError as error:
        place = path_text(error.filename or root)
        raise InputError(f"spec: {place} cannot be read: {error.strerror or error}") from error


def _split_folder(root: Path, split: Split, options: Mapping[str, str]) -> Path:
    """The folder of a split; the root itself if it has none. A folder is a split only if it contains folders."""
    names = [
        folder.name for folder in _folders(root) if split in options or other(split) in options or _folders(folder)
    ]
    name = find(split, options, names, path_text(root))
    if name is not None:
        return root / name
    if split in options or find(other(split), options, names, path_text(root)) is not None:
        raise InputError(
            f"spec: {path_text(root)} has no folder for the split {split}; give {split}=NAME (it has {listed(names)})"
        )
    return root


def _listed(root: Path) -> FolderFiles:
    skipped, folders = Skipped(), _folders(root)
    for entry in root.iterdir():
        if not entry.is_dir():
            _count(entry, skipped, " beside the folders of classes")
        elif entry.name.startswith("."):
            skipped.add("hidden folder")
    files = [(number, file) for number, folder in enumerate(folders) for file in _images(folder, skipped)]
    if not files:
        found = f"; skipped: {skipped.text}" if skipped.text else ""
        raise InputError(f"spec: no image in {path_text(root)}/CLASS/; expected one folder of images per class{found}")
    return FolderFiles(tuple(folder.name for folder in folders), tuple(files), skipped.text)


def _folders(root: Path) -> list[Path]:
    return sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _images(folder: Path, skipped: Skipped) -> list[Path]:
    """The images in a folder and below, sorted; all other files are counted."""
    found = []
    for path in _files(folder, set(), skipped):
        if path.suffix.lower() in image_suffixes() and not path.name.startswith(".") and path.is_file():
            found.append(path)
        else:
            _count(path, skipped, "")
    return sorted(found)


def _files(folder: Path, seen: set[tuple[int, int]], skipped: Skipped) -> Iterator[Path]:
    """All files below a folder, following links; a folder that was read already is skipped, which ends loops."""
    place = folder.stat()
    if (place.st_dev, place.st_ino) in seen:
        skipped.add("linked folder that was read already")
        return
    seen.add((place.st_dev, place.st_ino))
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not _is_folder(entry):
                yield Path(entry.path)
            elif entry.name.startswith("."):
                skipped.add("hidden folder")
            else:
                yield from _files(Path(entry.path), seen, skipped)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether an entry is a folder or a link to one; a link that leads to itself is not."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _count(path: Path, skipped: Skipped, where: str) -> None:
    """Count a skipped file by its kind."""
    if path.name in _SYSTEM_FILES:
        return
    if path.is_symlink() and not path.exists():
        skipped.add(f"broken link{where}")
    elif not path.is_file():
        skipped.add(f"not a regular file{where}")
    elif path.name.startswith("."):
        skipped.add(f"hidden file{where}")
    else:
        skipped.add(f"{path.suffix.lower()[:20] or 'file without suffix'}{where}")
