"""A watched folder: its clone files are attached, replaced and detached as they come and go."""

import time

import pytest

import pnc
from pnc.serving import web_app
from pnc.serving.watched_folder import WatchedFolder
from running_server import clone_file, deployment, running


def test_files_come_change_and_go(tmp_path):
    found = deployment(None, "dog")
    watched = WatchedFolder(tmp_path, found, 10**6)
    watched.look()
    path = tmp_path / "pets.safetensors"
    path.write_bytes(clone_file("elk"))
    (tmp_path / "notes.txt").write_text("no clone")
    (tmp_path / ".pets.safetensors.pnc-1").write_text("half")
    watched.look()
    assert found.current.names == ("dog", "pets") and found.owners["pets"] == "folder"
    generation = found.current.generation
    watched.look()
    assert found.current.generation == generation, "nothing changed"
    path.write_bytes(clone_file("elk", kind="full"))
    watched.look()
    assert found.current.generation == generation + 1 and found.current.names == ("dog", "pets")
    path.write_bytes(b"half a file")
    watched.look()
    assert "not a complete safetensors file" in watched.refused["pets.safetensors"]
    assert found.current.names == ("dog", "pets"), "the last good one stays"
    path.unlink()
    watched.look()
    assert found.current.names == ("dog",) and not watched.refused


def test_a_refused_file_is_tried_again_when_the_set_changes(tmp_path):
    found = deployment(None, "dog")
    watched = WatchedFolder(tmp_path, found, 10**6)
    (tmp_path / "other.safetensors").write_bytes(clone_file("dog"))
    watched.look()
    assert "has a class 'dog' already" in watched.refused["other.safetensors"]
    found.detach("dog")
    watched.look()
    assert found.current.names == ("other",) and not watched.refused


def test_large_files_and_missing_folders_are_refused(tmp_path):
    watched = WatchedFolder(tmp_path, deployment(), 10)
    (tmp_path / "a.safetensors").write_bytes(b"x" * 11)
    watched.look()
    assert watched.refused == {"a.safetensors": "the file has 11 bytes; at most 10 are read"}
    with pytest.raises(pnc.InputError, match="watch: there is no folder"):
        WatchedFolder(tmp_path / "no", deployment(), 10)


def test_a_server_follows_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(web_app, "SECONDS", 0.05)
    (tmp_path / "dog.safetensors").write_bytes(clone_file("dog"))
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    with running(deployment(), watch=tmp_path) as server, server.client() as client:
        end = time.monotonic() + 10
        while not client.is_ready() and time.monotonic() < end:
            time.sleep(0.02)
        assert client.clones() == {"dog": ("dog",)}, "ready once its files are attached"
        assert [one["file"] for one in client.status()["refused"]] == ["bad.safetensors"]
        with pytest.raises(pnc.MismatchError, match="remove its file"):
            client.detach("dog")
        (tmp_path / "dog.safetensors").unlink()
        while client.clones() and time.monotonic() < end:
            time.sleep(0.02)
        assert client.clones() == {}
