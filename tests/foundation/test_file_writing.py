import fcntl
import os
import socket
import stat
import threading
from pathlib import Path

import pytest
import torch

from pnc.foundation.errors import FileFormatError, InputError
from pnc.foundation.file_writing import check_place, checked_path, write_file
from pnc.foundation.resumable_steps import Steps
from pnc.foundation.tensor_files import write_tensors


def test_an_unwritable_path_leaves_nothing_behind(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        write_file(tmp_path / "missing" / "f", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        write_file(tmp_path / "folder", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert not list((tmp_path / "folder").iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_file(path, "old")

    def fail(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pnc.foundation.file_writing.os.fsync", fail)
    with pytest.raises(InputError, match="No space left"):
        write_file(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


# --------------------------------------------------------------------------------------------------- leftovers
def test_leftovers_of_killed_processes_go_with_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "a[1].txt"
    for name in (".a[1].txt.pnc-dead", ".other.pnc-dead", ".a[1].txt"):
        (tmp_path / name).write_text("half")
    with (tmp_path / ".a[1].txt.pnc-alive").open("w") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)  # like a process that is still writing
        write_file(path, "new")
    assert path.read_text() == "new"
    assert {p.name for p in tmp_path.iterdir()} == {path.name, ".other.pnc-dead", ".a[1].txt", ".a[1].txt.pnc-alive"}
    write_file(path, "newer")
    assert {p.name for p in tmp_path.iterdir()} == {path.name, ".other.pnc-dead", ".a[1].txt"}


def test_a_temporary_file_that_another_process_removed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pnc.foundation import file_writing

    lock, names = file_writing._locked, []

    def remove_first(descriptor: int, wait: bool = True) -> bool:
        if not names:
            names.extend(tmp_path.iterdir())
            names[0].unlink()
        return lock(descriptor, wait)

    monkeypatch.setattr(file_writing, "_locked", remove_first)
    write_file(tmp_path / "f", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


# --------------------------------------------------------------------------------------------------- what is there
def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_a_fifo_a_socket_and_a_folder_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # paths of sockets must be short
    os.mkfifo("fifo")
    Path("folder").mkdir()
    Path("to_fifo").symlink_to("fifo")
    Path("loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        kinds = {"fifo": "a FIFO", "to_fifo": "a FIFO", "socket": "a socket", "folder": "a folder"}
        before = {name: stat.S_IFMT(Path(name).lstat().st_mode) for name in (*kinds, "loop")}
        for name, kind in kinds.items():
            with pytest.raises(InputError, match=f"cannot write {name}, which is {kind}; "):
                write_file(name, "x")
        with pytest.raises(InputError, match="cannot write loop"):
            write_file("loop", "x")
        assert {name: stat.S_IFMT(Path(name).lstat().st_mode) for name in before} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before])


def test_devices_are_refused_by_the_check_alone() -> None:
    # Never tested by writing: as root, a rename would replace the machine's device.
    with pytest.raises(InputError, match=r"out: cannot write .*null, which is a device; only regular files"):
        check_place(os.devnull, "out")


def test_links_are_followed_and_stay(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "f").write_text("old")
    for link, to in (("one", "real/f"), ("two", "one"), ("new", "real/g"), ("folder", "real")):
        (tmp_path / link).symlink_to(to)
    write_file(tmp_path / "two", "x")
    write_file(tmp_path / "new", "y")
    write_file(tmp_path / "folder" / "h", "z")
    assert all((tmp_path / link).is_symlink() for link in ("one", "two", "new", "folder"))
    assert {p.name: p.read_text() for p in (tmp_path / "real").iterdir()} == {"f": "x", "g": "y", "h": "z"}


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o444, 0o755])
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    path.chmod(kept)
    write_file(path, "new")
    assert (path.read_text(), mode(path)) == ("new", kept)


def test_new_files_follow_the_umask_and_nothing_ever_sets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", None)
        write_file(tmp_path / "f", "x")
        threads = [threading.Thread(target=write_file, args=(tmp_path / f"{n}", "x")) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert {mode(path) for path in tmp_path.iterdir()} == {0o640}


def test_strange_leftovers_neither_hang_nor_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".f.pnc-fifo")
    (tmp_path / ".f.pnc-folder").mkdir()
    (tmp_path / "other").write_text("keep")
    (tmp_path / ".f.pnc-link").symlink_to("other")
    (tmp_path / ".f.pnc-nowhere").symlink_to("missing")
    (tmp_path / ".f.pnc-dead").write_text("half")
    write_file(tmp_path / "f", "x")
    assert (tmp_path / "f").read_text() == "x"
    assert (tmp_path / "other").read_text() == "keep"
    left = {p.name.removeprefix(".f.pnc-") for p in tmp_path.iterdir()}
    assert left == {"f", "other", "fifo", "folder", "link", "nowhere"}


def test_names_as_long_as_file_systems_take_can_be_written(tmp_path: Path) -> None:
    for name in ("a" * 255, "\N{SNOWMAN}" * 85):
        write_file(tmp_path / name, "x")
        write_file(tmp_path / name, "y")
        assert (tmp_path / name).read_text() == "y"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("path", ["a" * 5000, "a\0b", "b/" * 3000, "x" * 256, "\ud800"])
def test_paths_that_cannot_be_looked_up_are_one_error(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (lambda: checked_path(path, "out"), lambda: write_file(path, "x")):
        with pytest.raises(InputError, match="cannot be looked up: .*; take another path") as caught:
            call()
        assert str(caught.value).isprintable() and len(str(caught.value)) < 400
    with pytest.raises(InputError, match="expected a path, got int"):
        checked_path(5, "out")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------- files of steps
@pytest.mark.parametrize("facts", [{}, {"steps": None}, {"steps": []}, {"steps": [["a"]]}, {"steps": {"a": 1}}])
def test_files_of_steps_with_wrong_facts_are_refused(tmp_path: Path, facts: dict[str, object]) -> None:
    path = tmp_path / "s.safetensors"
    write_tensors(path, {"a/b": torch.zeros(1)}, {"format": "pnc-steps", "identity": "i", **facts})
    with pytest.raises(FileFormatError, match=r"resume: .*; remove the file"):
        Steps(path, "i")


def test_paths_of_steps_are_checked(tmp_path: Path) -> None:
    for name in ("a" * 250 + ".safetensors", "a\0.safetensors"):
        with pytest.raises(InputError, match="resume: .* cannot be looked up"):
            Steps(tmp_path / name, "i")
    os.mkfifo(tmp_path / "f.safetensors")
    with pytest.raises(InputError, match="which is a FIFO"):
        Steps(tmp_path / "f.safetensors", "i")
