import json
import os
import signal
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import pnc
from pnc.bench import file_attacks as files_bench
from pnc.bench.file_attacks import Material, damaged, judge, material
from pnc.bench.file_damage import FORGED, MUTATIONS
from pnc.cli.bench_commands import bench
from pnc.clones import clone_file
from pnc.foundation import tensor_files
from pnc.foundation.errors import FileFormatError, PNCError


@cache
def there() -> Material:
    return material()


def test_damaged_files_are_refused_or_give_the_same_bits(tmp_path):
    outcomes = Counter()
    for number in range(480):
        kind, data = damaged(there(), number)
        (tmp_path / "f").write_bytes(data)
        outcomes[judge(there(), tmp_path / "f", kind in FORGED)] += 1
    assert outcomes.keys() == {"refused", "accepted"}
    assert outcomes["refused"] > 400
    assert set(MUTATIONS) == {damaged(there(), number)[0] for number in range(len(MUTATIONS))}


def test_whole_files_are_accepted(tmp_path):
    for data in there().files:
        (tmp_path / "f").write_bytes(data)
        assert judge(there(), tmp_path / "f", forged=False) == "accepted"


def judged(folder: Path, kinds: set[str], limit: int = 3000) -> Counter:
    found = Counter()
    for number in range(limit):
        if list(MUTATIONS)[number % len(MUTATIONS)] in kinds:
            kind, data = damaged(there(), number)
            (folder / "f").write_bytes(data)
            found[judge(there(), folder / "f", kind in FORGED)] += 1
    return found


def test_without_the_digest_flipped_bits_would_be_found_as_other_weights(tmp_path, monkeypatch):
    read = tensor_files.read_tensors
    monkeypatch.setattr(tensor_files, "_digest", lambda tensors, metadata: metadata.get("digest"))

    def with_a_digest(path, check):
        return *read(path, lambda shapes, facts: check(shapes, {**facts, "digest": "0"})), "0"

    monkeypatch.setattr(clone_file, "read_sealed", with_a_digest)
    monkeypatch.setattr(tensor_files.json, "loads", without_digest(tensor_files.json.loads))
    assert judged(tmp_path, {"bit flips"}, 600)["other_weights"] > 2


def without_digest(loads):
    """JSON without the digest, as if files had none."""

    def load(*arguments, **settings):
        value = loads(*arguments, **settings)
        if isinstance(value, dict):
            value.pop("digest", None)
        return value

    return load


def test_errors_of_other_kinds_and_memory_are_told_apart(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(there().files[0])

    def fail(error):
        def attach(*arguments):
            raise error

        monkeypatch.setattr(files_bench, "attach", attach)
        return judge(there(), tmp_path / "f", forged=False)

    assert fail(KeyError("x")) == "crashes"
    assert fail(MemoryError()) == "over_memory"
    assert fail(PNCError("the network fails: DefaultCPUAllocator: can't allocate memory")) == "over_memory"
    assert fail(PNCError("no")) == "refused"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1), st.lists(st.tuples(st.integers(0, 1 << 30), st.binary(max_size=3)), min_size=1, max_size=4))
def test_any_change_of_bytes_is_refused_or_changes_nothing(tmp_path_factory, which, changes):
    data = bytearray(there().files[which])
    for place, new in changes:
        data[place % len(data) : place % len(data) + len(new)] = new
    path = tmp_path_factory.getbasetemp() / "changed"
    path.write_bytes(data)
    try:
        clone = pnc.load(path, source=there().source)
    except PNCError:
        return
    with torch.no_grad():
        assert torch.equal(pnc.attach(there().target, clone)(there().images), there().logits)


def test_the_bench_counts_writes_and_is_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(files_bench, "FINGERPRINT_BYTES", 10**6)
    words = f"files --files 39 --kills 8 --out {tmp_path}"
    found = CliRunner().invoke(bench, words.split(), catch_exceptions=False)
    assert found.exit_code == 0
    facts = json.loads((tmp_path / "files.json").read_text())
    *kinds, kills, timed = facts["rows"]
    assert timed["gigabytes"] == 0.001 and 0 < timed["cpu_seconds"] < 1
    assert sum(row["files"] for row in kinds) == 39 and all(row["files"] == 3 for row in kinds)
    assert sum(row["refused"] + row["accepted"] for row in kinds) == 39
    assert facts["bad"] == []
    assert kills["kills"] == kills["is_thin"] + kills["is_full"] == 8
    assert kills["neither"] == kills["left_behind"] == 0
    by_words = {claim["claim"]: claim for claim in facts["claims"]}
    assert not by_words["damaged files that were read"]["holds"], "39 are not 20,000"
    assert by_words["files that were accepted with other weights"]["holds"]
    assert "| bit flips | 3 |" in (tmp_path / "files.md").read_text()
    monkeypatch.setattr(files_bench, "_process", None)
    assert CliRunner().invoke(bench, words.split(), catch_exceptions=False).exit_code == 0


def die(numbers, folder, memory, connection):
    """A reader that dies at its second file."""
    for index, number in enumerate(numbers):
        connection.send((number, "bit flips", None, 0.0))
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        connection.send((number, "bit flips", "refused", 0.01))


def test_a_reader_that_dies_counts_as_a_crash_of_its_file_and_the_next_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(files_bench, "judge_many", die)
    facts = files_bench._chunk_of_files(range(2), tmp_path, seed=0)
    assert facts["kinds"]["bit flips"] == {"files": 2, "refused": 1, "crashes": 1, "slowest": 0.01}
    assert facts["bad"] == [1]


def test_claims_fall_with_a_single_bad_file():
    rows = [
        {
            "part": "files",
            "chunk": 0,
            "kinds": {k: {"files": 2000, "refused": 2000, "slowest": 0.1} for k in MUTATIONS},
        },
        {"part": "kills", "chunk": 0, "kills": 200, "is_thin": 90, "is_full": 110, "while_writing": 80},
        {"part": "fingerprint", "chunk": 0, "gigabytes": 2.0, "cpu_seconds": 1.5, "seconds": 3.0},
    ]
    assert all(claim.holds for claim in files_bench.claims(rows))
    for outcome in ("crashes", "hangs", "over_memory", "other_weights"):
        rows[0]["kinds"]["bit flips"][outcome] = 1
        assert [claim.holds for claim in files_bench.claims(rows)].count(False) == 1
        del rows[0]["kinds"]["bit flips"][outcome]
    rows[2]["cpu_seconds"] = 2.5
    assert [claim.holds for claim in files_bench.claims(rows)].count(False) == 1
    rows[2]["cpu_seconds"], rows[1]["neither"] = 1.5, 1
    assert [claim.holds for claim in files_bench.claims(rows)].count(False) == 1


def test_a_file_is_refused_by_one_error_with_its_name(tmp_path):
    (tmp_path / "f").write_bytes(there().files[0][:-1])
    with pytest.raises(FileFormatError, match=f"{tmp_path / 'f'} is not a complete safetensors file"):
        pnc.load(tmp_path / "f", source=there().source)
