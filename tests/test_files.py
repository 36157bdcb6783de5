import json

import pytest
import torch
from safetensors.torch import save_file

from pnc.errors import FileFormatError, InputError
from pnc.files import METADATA_KEY, read_tensors, write_file, write_tensors

TENSORS = {"b": torch.arange(6).view(2, 3).T, "a": torch.zeros(0, 3), "scalar": torch.tensor(1.5)}


def test_round_trip_and_equal_bytes(tmp_path):
    for name, order in (("one", TENSORS), ("two", dict(reversed(TENSORS.items())))):
        write_tensors(tmp_path / name, order, {"z": 1, "a": ["ü", None]})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    tensors, metadata = read_tensors(tmp_path / "one")
    assert metadata == {"z": 1, "a": ["ü", None]}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_shared_memory_is_written_out(tmp_path):
    weight = torch.arange(4.0)
    write_tensors(tmp_path / "f", {"x": weight, "y": weight[:2]}, {})
    assert torch.equal(read_tensors(tmp_path / "f")[0]["y"], weight[:2])


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

    monkeypatch.setattr("pnc.files.os.fsync", fail)
    with pytest.raises(InputError, match="No space left"):
        write_file(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (None, "no metadata"),
        ({"other": "{}"}, "no metadata"),
        ({METADATA_KEY: "{"}, "damaged"),
        ({METADATA_KEY: "[1]"}, "expected an object"),
        ({METADATA_KEY: "[" * 100_000}, "damaged"),
    ],
)
def test_foreign_or_damaged_metadata_is_refused(tmp_path, metadata, words):
    save_file({"x": torch.zeros(1)}, tmp_path / "f", metadata)
    with pytest.raises(FileFormatError, match=words):
        read_tensors(tmp_path / "f")


def test_truncated_and_other_files_are_refused(tmp_path):
    path = tmp_path / "f"
    write_tensors(path, TENSORS, {"x": 1})
    whole = path.read_bytes()
    for n_bytes in range(0, len(whole), 7):
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(FileFormatError):
            read_tensors(path)
    path.write_text(json.dumps({"not": "tensors"}))
    with pytest.raises(FileFormatError, match="not a whole safetensors file"):
        read_tensors(path)
    with pytest.raises(FileFormatError, match="no file"):
        read_tensors(tmp_path / "missing")
