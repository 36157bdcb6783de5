"""Atomic writing of files: a file is written completely or not at all, and only regular files are replaced.

The new content goes to a temporary file beside the old one and is renamed over it, so that a reader sees either the old
file or the new one. Devices, FIFOs and sockets are refused: renaming over them would remove them.
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
except ImportError:  # Windows: leftovers of a killed process look like files being written, and stay
    fcntl = None  # type: ignore[assignment]

_MAX_NAME = 200
"""Longest name, in bytes, that its temporary file repeats: with the additions, file systems allow 255."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a broken link",
}


def checked_path(path: str | Path, argument: str) -> Path:
    """Return `path` after checking that it can be looked up; it need not exist.

    Raises:
        InputError: it is longer than the system allows, contains NUL, leads through a folder without access, or is not
            a path; the message begins with `argument`.
    """
    try:
        made = Path(path)
        made.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # it does not exist: the caller decides whether that matters
    except TypeError as error:
        raise InputError(f"{argument}: expected a path, got {type(path).__name__}") from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"{argument}: {path_text(path)} cannot be looked up: {_reason(error)}; take another path"
        ) from error
    return made


def path_text(path: str | Path) -> str:
    """Format a path for a message: shortened if long, with control characters escaped."""
    text = str(path)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 200 else f"{text[:120]}...{text[-60:]}"


def check_place(path: str | Path, argument: str = "path") -> Path:
    """Check that a file may be written at `path`, and return the real path: links are followed.

    Raises:
        InputError: the path exists and is not a regular file, or cannot be looked up.
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
        kind = _KINDS.get(stat.S_IFMT(mode), "not a regular file")
        hint = (
            "give the path of a file in it"
            if stat.S_ISDIR(mode)
            else "only regular files are replaced; take another path"
        )
        raise InputError(f"{argument}: cannot write {path_text(given)}, which is {kind}; {hint}")
    return place


def write_file(path: str | Path, data: bytes | str) -> None:
    """Write `data` to `path` through a temporary file beside it: a reader sees the whole old file or the whole new one.

    Links are followed: the file that a link points to is replaced, and the link stays. A replaced file keeps its
    permissions and its group (if the group cannot be kept, group permissions are dropped); a new file gets the
    process's default permissions. A process that is killed while writing leaves its temporary file, ``.NAME.pnc-*``;
    the next write to the same path removes it.

    Raises:
        InputError: the folder does not exist or is not writable, or the path exists and is not a regular file; nothing
            is left behind.
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
                file.close()  # Windows renames only closed files
            check_place(path)  # something else may have been put there meanwhile
            temporary.replace(place)
    except OSError as error:
        raise InputError(
            f"cannot write {path_text(path)}: {_reason(error)}; choose a folder that exists and is writable"
        ) from error


def _take_over(descriptor: int, temporary: Path, old: os.stat_result) -> None:
    """Give a new file the group and the permissions of the file that it replaces."""
    mode = stat.S_IMODE(old.st_mode) & 0o777
    if hasattr(os, "fchown") and os.fstat(descriptor).st_gid != old.st_gid:
        try:
            os.fchown(descriptor, -1, old.st_gid)
        except PermissionError:
            mode &= ~0o070  # these were for another group
    temporary.chmod(mode)


@contextmanager
def _temporary(path: Path, mode: int) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file beside `path`, open for writing and locked while its process lives; removed after the block.

    The system applies the process's umask to `mode`: reading the umask here would change it for other threads.
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
        os.close(descriptor)  # another process removed it as a leftover before it was locked
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file, temporary
    finally:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that were killed while writing `path`: those that nobody has locked.

    Anything of such a name that is not a regular file, or belongs to another user, is not ours and stays.
    """
    if fcntl is None:
        return
    for leftover in path.parent.glob(f"{glob.escape(_prefix(path))}*"):
        try:
            if not stat.S_ISREG(leftover.lstat().st_mode):
                continue
            descriptor = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # already removed, or not ours to open
            continue
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode) and _locked(descriptor, wait=False):
                _unlink(leftover)
        finally:
            os.close(descriptor)


def _unlink(leftover: Path) -> None:
    try:
        leftover.unlink(missing_ok=True)
    except PermissionError:  # another user's file in a sticky folder
        return


def _locked(descriptor: int, wait: bool = True) -> bool:
    """Try to lock an open file; False if another process holds the lock, or the file system has no locks."""
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
