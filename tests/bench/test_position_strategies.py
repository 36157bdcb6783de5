import json

import pytest
from typer.testing import CliRunner

import pnc
from digits import network
from pnc.bench import position_strategies
from pnc.cli.bench_commands import bench
from pnc.method import paper_search, refinement
from pnc.method.refinement import Schedule
from pnc.models.model_specs import save_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(refinement, "SCHEDULE", Schedule(0.0003, n_steps=6, n_snapshots=3))
    monkeypatch.setattr(paper_search, "N_STEPS", 10)
    monkeypatch.setattr(paper_search, "LEARNING_RATES", (0.01,))
    for name, classes in (("t", "01234"), ("s", "56789")):
        save_model(network(tuple(classes)), tmp_path / f"{name}.safetensors", {})
    return tmp_path


def run(folder, words=""):
    networks = f"--source {folder / 's.safetensors'} --target {folder / 't.safetensors'}"
    command = f"positions {networks} --data digits --support 20/5 --no-flip --seeds 1 --out {folder} {words}"
    return CliRunner().invoke(bench, command.split(), catch_exceptions=False)


def test_all_strategies_stand_side_by_side_and_rows_are_made_once(folder, monkeypatch):
    found = run(folder)
    assert found.exit_code == 0
    facts = json.loads((folder / "positions.json").read_text())
    rows = {row["strategy"]: row for row in facts["rows"]}
    assert list(rows) == list(position_strategies.STRATEGIES) and len(facts["rows"]) == len(rows)
    free = rows["closed form"]
    assert free["average_accuracy"] > 0.94 and free["conditional_kl"] <= 1e-6
    assert rows["closed form, 30% of the MACs"]["macs_share"] <= 0.3
    assert rows["sequential"]["learning_rate"] == 0.01 and free["learning_rate"] is None
    claims = {claim["claim"]: claim for claim in facts["claims"]}
    above = claims["closed form above the sequential reference"]
    assert above["value"] == pytest.approx(free["average_accuracy"] - rows["sequential"]["average_accuracy"])
    assert claims["average accuracy at the free choice"]["holds"]
    assert all(f"| {name} |" in (folder / "positions.md").read_text() for name in rows)
    monkeypatch.setattr(position_strategies, "clone", None)
    assert run(folder).exit_code == 0
    assert json.loads((folder / "positions.json").read_text())["rows"] == facts["rows"]


def test_a_claim_is_about_the_mean_over_seeds_and_a_bound_on_cost_about_every_one():
    rows = [
        {
            "strategy": name,
            "seed": seed,
            "density": 1.0,
            "average_accuracy": 0.7 + 0.1 * seed,
            "macs_share": share,
            "seconds": 2.0,
        }
        for name in position_strategies.STRATEGIES
        for seed, share in ((0, 0.2), (1, 0.4))
    ]
    claims = {claim.claim: claim for claim in position_strategies.claims(rows)}
    free = claims["average accuracy at the free choice"]
    assert (free.value, free.spread, free.holds) == (pytest.approx(0.75), pytest.approx(0.05), False)
    assert claims["added MACs under the bound of 60%"].holds
    assert not claims["added MACs under the bound of 30%"].holds
    assert claims["closed form faster than the sequential reference, times"].value == 1


def test_a_support_without_base_images_is_refused(folder):
    with pytest.raises(pnc.InputError, match="support: images of new and of base classes are needed"):
        run(folder, "--support 20/0")
