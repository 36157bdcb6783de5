"""Clones and rivals on corrupted digits: rows are made once, and claims compare the same seeds."""

import json

import pytest
from typer.testing import CliRunner

from digits import pair
from pnc.bench import corruptions
from pnc.cli.bench_commands import bench
from pnc.models.model_specs import save_model


def run(folder):
    words = ["corruptions", "--source", folder / "s.safetensors", "--target", folder / "t.safetensors"]
    words += ["--data", "digits", "--support", "8/4", "--no-flip", "--seeds", 1, "--n-test", 10, "--out", folder]
    words += ["--methods", "clone,direct ensemble"]
    return CliRunner().invoke(bench, list(map(str, words)), catch_exceptions=False)


def test_rows_are_made_once_and_corrupted_images_are_harder(tmp_path, monkeypatch):
    save_model(pair().target, tmp_path / "t.safetensors", {})
    save_model(pair().source, tmp_path / "s.safetensors", {})
    assert run(tmp_path).exit_code == 0
    facts = json.loads((tmp_path / "corruptions.json").read_text())
    rows = {(row["method"], row["corruption"], row["severity"]): row for row in facts["rows"]}
    assert len(rows) == 20
    clean, pale = rows["clone", "none", 0], rows["clone", "contrast", 3]
    assert clean["average"] > pale["average"] and clean["auroc"] > 0.9
    assert "| contrast | 3 | clone |" in (tmp_path / "corruptions.md").read_text()
    monkeypatch.setattr(corruptions, "_fitted", None)
    assert run(tmp_path).exit_code == 0
    assert json.loads((tmp_path / "corruptions.json").read_text())["rows"] == facts["rows"]


def test_claims_compare_the_clone_with_the_ensemble_on_the_same_seeds():
    rows = [
        {"corruption": "blur", "severity": 1, "method": method, "seed": seed, "average": average + 0.1 * seed}
        for method, average in (("clone", 0.5), ("direct ensemble", 0.48))
        for seed in (0, 1)
    ]
    (claim,) = corruptions.claims([*rows, {**rows[0], "seed": 2, "average": 0.0}])
    assert claim.value == pytest.approx(0.02) and claim.holds
    assert claim.claim == "blur, severity 1: average accuracy above the direct ensemble"
