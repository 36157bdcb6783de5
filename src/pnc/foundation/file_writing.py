"""Files written whole or not at all, in place of regular files only; paths that cannot be looked up are refused.

The new content goes to a temporary file beside the old one, which then takes its name. So a reader sees the old file or
the new one. Nothing but a regular file is ever replaced: renaming over a device, a FIFO or a socket would remove it.
"""

import glob
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pnc.foundation.errors import InputError

try:
    import fcntl
except ImportError:  # Windows, where leftovers of a killed process are not told from files at work, and stay
    fcntl = None  # type: ignore[assignment]

_MAX_NAME = 200
"""Bytes of a name that its temporary file repeats: with what is added, file systems take 255."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a link that leads nowhere",
}


def checked_path(path: str | Path, argument: str) -> Path:
    """Return a path that can be looked up, whether something is there or not.

    Raises:
        InputError: it is longer than the system allows, holds NUL, leads through a folder that may not be entered, or
            is no path at all; the message begins with `argument`.
    """
    try:
        made = Path(path)
        made.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # nothing is there, which is for the caller to judge
    except TypeError as error:
        raise InputError(f"{argument}: expected a path, got {type(path).__name__}") from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"{argument}: {path_text(path)} cannot be looked up: {_reason(error)}; take another path"
        ) from error
    return made


def path_text(path: str | Path) -> str:
    """Write a path for a message: long ones shortened, characters that a terminal would obey escaped."""
    text = str(path)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 200 else f"{text[:120]}...{text[-60:]}"


def check_place(path: str | Path, argument: str = "path") -> Path:
    """Check that a file can be put at `path`, and return where it really goes: links are followed.

    Raises:
        InputError: something that is no regular file is there, or the path cannot be looked up.
    """
    given = checked_path(path, argument)
    place = Path(os.path.realpath(given))
    try:
        mode = place.lstat().st_mode
    except FileNotFoundError:
        return place
    except OSError as error:
        raise InputError(f"{argument}: cannot write {path_text(given)}: {_reason(error)}; take another path") from error
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        hint = (
            "give the path of a file in it"
            if stat.S_ISDIR(mode)
            else "only regular files are replaced; take another path"
        )
        raise InputError(f"{argument}: cannot write {path_text(given)}, which is {kind}; {hint}")
    return place


def write_file(path: str | Path, data: bytes | str) -> None:
    """Write `data` to `path` through a temporary file beside it: a reader sees the old file or the new one, whole.

    A link is followed: the file that it leads to is replaced, and the link stays. A file that is replaced keeps its
    permissions (and its group, or the group loses them); a new one gets what the process gives new files. A process
    that is killed while it writes leaves its temporary file, ``.NAME.pnc-*``; the next write to the same path removes
    it.

    Raises:
        InputError: the folder does not exist or cannot be written to, or something else than a regular file is there;
            nothing is left behind.
    """
    place = check_place(path)
    raw = data.encode() if isinstance(data, str) else data
    try:
        _remove_leftovers(place)
        old = place.lstat() if place.exists() else None
        with _temporary(place, 0o666 if old is None else 0o600) as (file, temporary):
            file.write(raw)
            file.flush()
            if old is not None:
                _take_over(file.fileno(), temporary, old)
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames closed files only
            check_place(path)  # what came there meanwhile is not replaced either
            temporary.replace(place)
    except OSError as error:
        raise InputError(
            f"cannot write {path_text(path)}: {_reason(error)}; choose a folder that exists and is writable"
        ) from error


def _take_over(descriptor: int, temporary: Path, old: os.stat_result) -> None:
    """Give a new file the group and the permissions of the one that it replaces."""
    mode = stat.S_IMODE(old.st_mode) & 0o777
    if hasattr(os, "fchown") and os.fstat(descriptor).st_gid != old.st_gid:
        try:
            os.fchown(descriptor, -1, old.st_gid)
        except PermissionError:
            mode &= ~0o070  # they were meant for another group
    temporary.chmod(mode)


@contextmanager
def _temporary(path: Path, mode: int) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file beside `path`, open for writing and locked for as long as its owner lives; gone afterwards.

    The system takes the process's umask off `mode`: reading the umask would change it for other threads.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    while True:
        temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(4)}")
        try:
            descriptor = os.open(temporary, flags, mode)
        except FileExistsError:
            continue
        if fcntl is None or not _locked(descriptor) or temporary.exists():
            break
        os.close(descriptor)  # another process took it for a leftover before it was locked
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file, temporary
    finally:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of processes that were killed while they wrote `path`: those that nobody locks.

    What has such a name and is no regular file, or belongs to somebody else, was not left by us and stays.
    """
    if fcntl is None:
        return
    for leftover in path.parent.glob(f"{glob.escape(_prefix(path))}*"):
        try:
            if not stat.S_ISREG(leftover.lstat().st_mode):
                continue
            descriptor = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # its owner was quicker, or it is not ours to open
            continue
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode) and _locked(descriptor, wait=False):
                _unlink(leftover)
        finally:
            os.close(descriptor)


def _unlink(leftover: Path) -> None:
    try:
        leftover.unlink(missing_ok=True)
    except PermissionError:  # somebody else's, in a folder where each may remove only his own
        return


def _locked(descriptor: int, wait: bool = True) -> bool:
    """Try to lock an open file; False where another process keeps it locked, or the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _prefix(path: Path) -> str:
    name = path.name
    if len(os.fsencode(name)) > _MAX_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return f".{name}.pnc-"


def _reason(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
