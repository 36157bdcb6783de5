import hashlib
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pnc.foundation.errors import FileFormatError, InputError
from pnc.foundation.tensor_files import (
    MAX_HEADER,
    METADATA_KEY,
    canonical_json,
    read_sealed,
    read_tensors,
    write_tensors,
)

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
    with pytest.raises(FileFormatError, match="not a complete safetensors file"):
        read_tensors(path)
    with pytest.raises(FileFormatError, match="no file"):
        read_tensors(tmp_path / "missing")


# --------------------------------------------------------------------------------------------------- reading is total
def framed(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header: an object, or raw bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + body


META = {"__metadata__": {METADATA_KEY: "{}"}}


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {**META, "x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


EIGHT = bytes(8)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it has 0 bytes, fewer than its header needs"),
        (framed(META, length=1 << 63), "fewer than its header needs"),
        (framed(b" " * (MAX_HEADER + 1)), "its header has 2097153 bytes, more than 2097152"),
        (framed(b"\xff\xfe"), "can't decode"),
        (framed(b"[1]"), "expected an object, got list"),
        (framed(b"{" * 5000), "not a complete safetensors file"),
        (framed(b'{"a":' * 17 + b"1" + b"}" * 17), "nested deeper than 16"),
        (framed(b'{"a":1,"a":2}'), "a key appears twice"),
        (framed(b'{"a":NaN}'), "NaN is not a finite number"),
        (framed(b'{"a":1e999}'), "1e999 is not a finite number"),
        (framed(b'{"a":' + b"9" * 5000 + b"}"), "not a complete safetensors file"),
        (framed({**META, "x": 1}), "the entry of 'x' is 1"),
        (framed({**META, "x": {**entry()["x"], "more": 1}}, EIGHT), "the entry of 'x' is"),
        (framed(entry(dtype="F8_E4M3", shape=[8]), EIGHT), "has the dtype 'F8_E4M3'"),
        (framed(entry(dtype=["F32"]), EIGHT), "has the dtype"),
        (framed(entry(shape=[3]), EIGHT), "'x' has 12 bytes, but its offsets are"),
        (framed(entry(shape=[2.0]), EIGHT), "'x' has the shape"),
        (framed(entry(shape=[True, 2]), EIGHT), "'x' has the shape"),
        (framed(entry(shape=[-1, -2]), EIGHT), "'x' has the shape"),
        (framed(entry(shape=[1] * 9), EIGHT), "'x' has the shape"),
        (framed(entry(shape=[1 << 41], offsets=[0, 1 << 43]), EIGHT), "'x' has the shape"),
        (framed(entry(shape=[0, 1 << 50], offsets=[0, 0])), "'x' has the shape"),
        (framed(entry(offsets=[0, 8, 16]), EIGHT), "but its offsets are"),
        (framed(entry(offsets=[4, 12]), bytes(12)), "the bytes of 'x' do not follow"),
        (framed(entry(), bytes(7)), "its tensors have 8 bytes, the file has 7"),
        (framed(entry(), bytes(9)), "its tensors have 8 bytes, the file has 9"),
        (framed({**entry(), "y": entry()["x"]}, EIGHT), "the bytes of 'y' do not follow"),
        (
            framed(entry(shape=[1 << 30], offsets=[0, 1 << 32]), EIGHT),
            "its tensors have 4294967296 bytes, the file has 8",
        ),
        (framed(entry(dtype="BOOL", shape=[8]), b"\x02" * 8), "neither true nor false"),
        (framed({"__metadata__": [1]}), "no metadata"),
        (framed({"__metadata__": {METADATA_KEY: 5}}), "no metadata"),
    ],
)
def test_a_header_that_lies_is_refused_before_memory_is_taken(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "f").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError, match=words):
            read_tensors(tmp_path / "f")
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
headers = st.dictionaries(
    st.sampled_from(["__metadata__", "x", "y", ""]),
    json_values
    | st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "U8", "F64", "BOOL", "Q4"]),
            "shape": st.lists(st.integers(-1, 4), max_size=3),
            "data_offsets": st.lists(st.integers(0, 32), min_size=2, max_size=2),
        }
    )
    | st.fixed_dictionaries({METADATA_KEY: json_values.map(json.dumps)}),
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200) | st.builds(framed, headers | st.binary(max_size=40), st.binary(max_size=64)))
def test_any_bytes_give_tensors_or_one_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(data)
    try:
        tensors, metadata = read_tensors(path)
    except FileFormatError:
        return
    assert isinstance(metadata, dict)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= len(data)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(FileFormatError, match="it is not a regular file"):
            read_tensors(path)


def test_every_changed_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_tensors(path, {"x": torch.arange(4.0), "flag": torch.tensor([True])}, {"name": "a"})
    whole, seen = path.read_bytes(), read_tensors(path)
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        try:
            tensors, metadata = read_tensors(path)
        except FileFormatError:
            continue
        # A change in the header's padding or in the digest's key leaves the content the same.
        assert metadata.items() >= seen[1].items()
        assert all(torch.equal(tensors[name], seen[0][name]) for name in seen[0])


def test_the_digest_is_as_documented_and_files_without_one_are_read(tmp_path: Path) -> None:
    x = torch.tensor([[1.0, -2.0]])
    write_tensors(tmp_path / "f", {"x": x}, {"b": 1, "a": "é"})
    tensors, metadata, digest = read_sealed(tmp_path / "f")
    text = canonical_json([metadata, [["x", "F32", [1, 2], hashlib.sha256(x.numpy().tobytes()).hexdigest()]]])
    assert text.startswith('[{"a":"\\u00e9","b":1},[["x","F32",[1,2],"')
    assert digest == hashlib.sha256(text.encode()).hexdigest()
    save_file(tensors, tmp_path / "old", {METADATA_KEY: canonical_json(metadata)})
    assert read_sealed(tmp_path / "old")[2] is None
    save_file(tensors, tmp_path / "wrong", {METADATA_KEY: canonical_json({**metadata, "digest": "0"})})
    with pytest.raises(FileFormatError, match="damaged: its content does not match its digest"):
        read_tensors(tmp_path / "wrong")


def test_all_types_come_back_and_others_are_refused(tmp_path: Path) -> None:
    types = (
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.bool,
    )
    tensors = {str(dtype): torch.tensor([[0, 1], [1, 0]]).to(dtype) for dtype in types}
    write_tensors(tmp_path / "f", tensors, {})
    found, known = read_tensors(tmp_path / "f")[0], load_file(tmp_path / "f")
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        assert torch.equal(known[name], tensor), "any safetensors reader reads the same"
    with pytest.raises(InputError, match="x is complex64; files hold float32"):
        write_tensors(tmp_path / "g", {"x": torch.zeros(1, dtype=torch.complex64)}, {})
    with pytest.raises(InputError, match="names and metadata take .* bytes, a file holds 2097152"):
        write_tensors(tmp_path / "g", {"x": torch.zeros(1)}, {"a": "b" * MAX_HEADER})
    assert not (tmp_path / "g").exists()


# --------------------------------------------------------------------------------------------------- sizes
def sparse(path: Path, n_bytes: int, written: bytes = b"") -> None:
    """A file whose only tensor has `n_bytes` bytes, all a hole except the first."""
    header = {"__metadata__": {METADATA_KEY: "{}"}, "x": entry("U8", [n_bytes], [0, n_bytes])["x"]}
    with path.open("wb") as file:
        file.write(framed(header, written))
        file.truncate(file.tell() - len(written) + n_bytes)


@pytest.mark.parametrize("n_bytes", [1 << 28, 1 << 31, 1 << 40])
def test_files_of_holes_are_refused_before_they_are_read(tmp_path: Path, n_bytes: int) -> None:
    for written in (b"", b"x" * 100_000):
        sparse(tmp_path / "f", n_bytes, written)
        with pytest.raises(FileFormatError, match="bytes, but holds only "):
            read_tensors(tmp_path / "f")
    (tmp_path / "f").unlink()


def test_a_smaller_file_with_holes_is_read(tmp_path: Path) -> None:
    sparse(tmp_path / "f", 1 << 20)
    assert not read_tensors(tmp_path / "f")[0]["x"].any()


def test_too_little_memory_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors(tmp_path / "f", {"x": torch.zeros(3)}, {})

    def full(*_args: object, **_settings: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("pnc.foundation.tensor_files.torch.empty", full)
    with pytest.raises(FileFormatError, match="'x' takes 12 bytes, more than the memory available"):
        read_tensors(tmp_path / "f")


def test_the_caller_sees_shapes_and_metadata_before_values_are_read(tmp_path: Path) -> None:
    write_tensors(tmp_path / "f", {"x": torch.ones(2, 3)}, {"a": 1})
    seen: list[Any] = []

    def check(shapes: Any, metadata: Any) -> None:
        seen.append((shapes["x"].shape, shapes["x"].device.type, metadata["a"]))
        raise InputError("not this one")

    with pytest.raises(InputError, match="not this one"):
        read_tensors(tmp_path / "f", check)
    assert seen == [((2, 3), "meta", 1)]
