import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pnc.bench import result_files
from pnc.bench.result_files import (
    Cells,
    Claim,
    at_least,
    at_most,
    commit,
    environment,
    over_seeds,
    table,
    write_results,
)
from pnc.foundation.errors import FileFormatError, InputError


def test_a_bound_itself_is_kept() -> None:
    assert at_least("accuracy", 0.74, 0.74).holds
    assert not at_least("accuracy", 0.74, 0.7399).holds
    assert at_most("KL", 1e-6, 1e-6).holds
    assert not at_most("KL", 1e-6, 2e-6).holds
    assert at_most("KL", 1e-6, float("nan")).holds is False
    assert at_least("accuracy", 0.5, float("nan")).holds is False


def test_results_hold_command_commit_environment_rows_and_claims(tmp_path: Path) -> None:
    claims = [at_least("accuracy", 0.74, 0.75), at_most("KL", 1e-6, 0.5), Claim("bits equal", "true", True, True)]
    write_results(tmp_path, "job", "pnc bench job", {"rows": [{"a": 1}], "note": "x"}, claims, "| a |\n|---|\n| 1 |\n")
    facts = json.loads((tmp_path / "job.json").read_text())
    assert set(facts) == {"command", "commit", "environment", "rows", "note", "claims"}
    assert facts["rows"] == [{"a": 1}]
    assert [claim["holds"] for claim in facts["claims"]] == [True, False, True]
    assert set(facts["claims"][0]) == {"claim", "must", "value", "spread", "holds"}
    assert {"python", "torch", "threads", "device"} <= set(facts["environment"])
    text = (tmp_path / "job.md").read_text()
    assert text.startswith("`pnc bench job`, commit ")
    assert "| a |\n|---|\n| 1 |\n" in text
    assert "| KL | <= 1e-06 | 0.500 | **no** |" in text, "a claim that falls short stays, and shows"
    assert "| bits equal | true | True | yes |" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.json", "job.md"]


def test_without_claims_there_is_no_table_of_them(tmp_path: Path) -> None:
    write_results(tmp_path, "job", "command", {"rows": []}, [], "text")
    assert "claim" not in (tmp_path / "job.md").read_text()


def test_results_need_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        write_results(tmp_path / "no", "job", "command", {"rows": []}, [], "text")


def test_numbers_in_tables_are_short() -> None:
    lines = table(
        ("what", "n"), [("a", 0.12345), ("b", 1234567), ("c", 0.0), ("d", 1.5e-7), ("e", True), ("f", 12345.6)]
    )
    assert lines.splitlines() == [
        "| what | n |",
        "|---|---|",
        "| a | 0.123 |",
        "| b | 1,234,567 |",
        "| c | 0.000 |",
        "| d | 1.5e-07 |",
        "| e | True |",
        "| f | 1.2e+04 |",
    ]


def test_the_commit_is_that_of_the_code_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    foreign = tmp_path / "results.py"
    foreign.touch()
    monkeypatch.setattr(result_files, "__file__", str(foreign))
    assert commit() is None, "installed within another checkout"
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", str(tmp_path), "add", "."], check=True)
    subprocess.run(["git", "-C", str(tmp_path), *author, "commit", "--quiet", "-m", "first"], check=True)
    made = commit()
    assert made is not None and len(made) >= 12 and not made.endswith("+")
    foreign.write_text("changed")
    assert commit() == made + "+"

    def missing(*words: Any, **settings: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert commit() is None


def test_the_environment_names_no_machine() -> None:
    import platform

    assert platform.node() not in json.dumps(environment())


def test_a_stopped_bench_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    cells = Cells(path, {"size": 1}, ["method", "seed"])
    cells.add({"method": "a", "seed": 0, "value": 0.5})
    cells.add({"method": "a", "seed": 1, "value": 0.25})
    with path.open("a") as file:
        file.write('{"method": "b", "se')  # killed while it wrote
    again = Cells(path, {"size": 1}, ["method", "seed"])
    assert {"method": "a", "seed": 1} in again and {"method": "b", "seed": 0} not in again
    again.add({"method": "b", "seed": 0, "value": 1.0})
    assert [row["value"] for row in Cells(path, {"size": 1}, ["method", "seed"]).rows] == [0.5, 0.25, 1.0]


def test_cells_of_other_settings_and_other_files_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    Cells(path, {"size": 1}, ["seed"]).add({"seed": 0})
    before = path.read_text()
    with pytest.raises(InputError, match=r"rows of other settings \(\{'size': 1\}\)"):
        Cells(path, {"size": 2}, ["seed"])
    assert path.read_text() == before
    for content in (b"something\nelse\n", b"\xff\xfe\n", b"[1]\n"):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match="no rows of a bench"):
            Cells(path, {}, ["seed"])
        assert path.read_bytes() == content


def test_a_file_cut_at_any_byte_keeps_every_row_before_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    cells = Cells(path, {"size": 1}, ["seed"])
    for seed in range(3):
        cells.add({"seed": seed, "value": "é"})
    whole = path.read_bytes()
    for n_bytes in range(0, len(whole) + 1, 5):
        path.write_bytes(whole[:n_bytes])
        rows = Cells(path, {"size": 1}, ["seed"]).rows
        assert len(rows) == max(0, whole[:n_bytes].count(b"\n") - 1)


def test_over_seeds_the_mean_reaches_a_lower_bound_and_every_value_keeps_an_upper_one() -> None:
    assert over_seeds("accuracy", ">=", 0.5, [0.4, 0.6]) == Claim("accuracy", ">= 0.5", 0.5, True, pytest.approx(0.1))
    assert not over_seeds("accuracy", ">=", 0.51, [0.4, 0.6]).holds
    assert over_seeds("MACs", "<=", 0.6, [0.4, 0.6]).holds
    assert not over_seeds("MACs", "<=", 0.55, [0.4, 0.6]).holds
