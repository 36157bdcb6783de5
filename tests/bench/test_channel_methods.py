import json

import pytest
from typer.testing import CliRunner

from digits import network
from pnc.bench import channel_methods
from pnc.cli.bench_commands import bench
from pnc.method.localization import localizer
from pnc.method.positions import Scan
from pnc.models.model_specs import save_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("GATES_STEPS", "NORMS_STEPS", "SURROGATE_STEPS"):
        monkeypatch.setattr(localizer, name, 4)
    monkeypatch.setattr(Scan, "choose", lambda found: next(p for p in found.positions if p.is_exact))
    for name, classes in (("t", "01234"), ("s", "56789")):
        save_model(network(tuple(classes)), tmp_path / f"{name}.safetensors", {})
    return tmp_path


def run(folder):
    networks = f"--source {folder / 's.safetensors'} --target {folder / 't.safetensors'}"
    words = f"localize {networks} --data digits --some 5,7 --support 20/5 --no-flip --seeds 1 --n-test 10"
    words = f"{words} --out {folder}"
    return CliRunner().invoke(bench, words.split(), catch_exceptions=False)


def test_all_methods_stand_side_by_side_and_rows_are_made_once(folder, monkeypatch):
    found = run(folder)
    assert found.exit_code == 0
    facts = json.loads((folder / "localize.json").read_text())
    rows = {tuple(row[key] for key in channel_methods.KEYS): row for row in facts["rows"]}
    assert len(rows) == len(facts["rows"]) == 2 * (1 + 2 * 5)
    full = rows["5+7", 0, "full", 1.0]
    assert full["relative"] == 1.0 and full["part_macs_share"] == pytest.approx(1.0)
    assert full["cloned"] > 0.9 and full["not_cloned"] > 0.9, "the whole source knows all of its classes"
    half = rows["5+7", 0, "magnitude", 0.5]
    assert half["relative"] == half["average_accuracy"] / full["average_accuracy"]
    assert 0.4 < half["part_macs_share"] <= 0.55
    assert rows["5+6+7+8+9", 0, "gates", 0.3]["not_cloned"] is None
    assert sum("classes not cloned" in claim["claim"] for claim in facts["claims"]) == 2
    text = (folder / "localize.md").read_text()
    assert "Cloned: 5+7" in text and text.count("| local-surrogate |") == 4
    monkeypatch.setattr(channel_methods, "fit", None)
    assert run(folder).exit_code == 0
    assert json.loads((folder / "localize.json").read_text())["rows"] == facts["rows"]


def test_claims_compare_gates_with_every_rival_at_every_density():
    rows = [
        {
            **dict(zip(channel_methods.KEYS, ("a", seed, method, density), strict=True)),
            "average_accuracy": 0.5 + 0.1 * (method == "gates") - 0.02 * seed,
            "relative": 0.97 if method == "gates" else 0.9,
            "not_cloned": 0.05 + 0.1 * seed,
        }
        for seed in (0, 1)
        for method, density in [
            ("full", 1.0),
            *((m, d) for m in channel_methods.METHODS for d in channel_methods.DENSITIES),
        ]
    ]
    claims = {claim.claim: claim for claim in channel_methods.claims(rows)}
    assert len(claims) == 2 + 4 * 2 + 2
    assert not claims["a: share of full accuracy that gates keep at density 0.5"].holds
    assert claims["a: share of full accuracy that gates keep at density 0.3"].holds
    assert claims["a: accuracy of gates above taylor at density 0.3"].value == pytest.approx(0.1)
    forgotten = claims["a: accuracy of the masked source on classes not cloned, gates, density 0.5"]
    assert (forgotten.value, forgotten.spread, forgotten.holds) == (pytest.approx(0.1), pytest.approx(0.05), False)
