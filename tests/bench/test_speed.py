import json

import pytest
import torch
from typer.testing import CliRunner

import pnc
from digits import network
from pnc.bench import job_times, latency, speed
from pnc.bench.rivals import rival
from pnc.cli.app import app
from pnc.method import paper_search, refinement
from pnc.method.refinement import Schedule
from pnc.models.model_specs import save_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(refinement, "SCHEDULE", Schedule(0.0003, n_steps=6, n_snapshots=3))
    monkeypatch.setattr(paper_search, "N_STEPS", 10)
    monkeypatch.setattr(paper_search, "LEARNING_RATES", (0.01,))
    monkeypatch.setattr(job_times, "Budget", lambda: rival.Budget(1, 2, 3, n_second=1))
    monkeypatch.setattr(
        job_times, "CLONES", {**job_times.CLONES, job_times.GATES: {"density": 0.5, "method": "taylor"}}
    )
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    monkeypatch.setattr(latency, "MIN_ROUNDS", 2)
    monkeypatch.setattr(latency, "N_DISTINCT", 1)
    for bench in (latency, job_times):
        monkeypatch.setattr(bench, "peak_memory", lambda work, _: (work(), 7))
    monkeypatch.setattr(latency, "BATCHES", (1, 64))
    monkeypatch.setattr(job_times, "N_REPEATS", {job_times.CLOSED: 2})
    monkeypatch.setattr(latency, "LARGE", "zoo:cnn?width=0.25")
    monkeypatch.setattr(speed, "LARGE", "zoo:cnn?width=0.25")
    for name, classes in (("t", "01234"), ("s", "56789")):
        save_model(network(tuple(classes)), tmp_path / f"{name}.safetensors", {})
    return tmp_path


def run(folder, words=""):
    networks = f"--source {folder / 's.safetensors'} --target {folder / 't.safetensors'}"
    command = f"bench speed {networks} --data digits --support 20/5 --no-flip --json {folder / 'speed.json'} {words}"
    return CliRunner().invoke(app, command.split(), catch_exceptions=False)


def test_everything_stands_side_by_side_and_is_measured_once(folder, monkeypatch):
    assert run(folder, "--layouts channels_last").exit_code == 0
    facts = json.loads((folder / "speed.json").read_text())
    rows = {(row["case"], row["form"]): row for row in facts["rows"]}
    assert len(rows) == len(facts["rows"])
    one, many = "one clone, batch 64", "many clones, batch 1"
    target, whole, plumbing = (rows[one, form] for form in (latency.TARGET, latency.WHOLE, latency.PLUMBING))
    assert target["of_target"] == 1 and whole["of_whole"] == 1 and rows[many, "target + 16 sources"]["of_whole"] == 1
    assert 0 < plumbing["n_macs"] - target["n_macs"] < 0.1 * target["n_macs"]
    assert whole["n_macs"] == rows[one, latency.FOLDED]["n_macs"]
    macs = [rows[one, f"density {density:g}"]["n_macs"] for density in latency.DENSITIES]
    assert macs[0] > macs[1] > macs[2] > target["n_macs"]
    assert all(row["lower_ms"] <= row["median_ms"] <= row["upper_ms"] for row in rows.values() if "rounds" in row)
    assert rows["channels_last, batch 64", "density 0.5, fused"]["rounds"] == 2
    assert not any("compiled" in case for case, _ in rows)
    assert set(job_times.FORMS) == {form for case, form in rows if case == "seed 0"}
    once, search = rows["seed 0", job_times.TUNED], rows["seed 0", job_times.SEARCH]
    assert once["chosen"] == search["chosen"] and once["seconds"] < search["seconds"]
    closed = rows["seed 0", job_times.CLOSED]
    assert len(closed["all_seconds"]) == 2
    assert closed["n_macs"] > closed["once_macs"] > 0 and once["n_macs"] > 0
    claims = {claim["claim"]: claim for claim in facts["claims"]}
    share = rows[one, "density 0.5"]["n_macs"] / whole["n_macs"]
    assert share == pytest.approx(rows["one clone, batch 1", "density 0.5"]["n_macs"] / whole["n_macs"])
    assert claims["composite at density 0.5, batch 1: MACs, likewise"]["value"] == pytest.approx(share)
    faster = claims["closed form faster than the sequential reference, times"]["value"]
    assert faster == rows["seed 0", job_times.SEQUENTIAL]["seconds"] / rows["seed 0", job_times.CLOSED]["seconds"]
    assert all(f"### {case}" in (folder / "speed.md").read_text() for case, _ in rows if "batch" in case)
    monkeypatch.setattr(latency, "run_case", None)
    monkeypatch.setattr(latency, "run_life", None)
    monkeypatch.setattr(job_times, "_row", None)
    assert run(folder, "--layouts channels_last").exit_code == 0
    assert json.loads((folder / "speed.json").read_text())["rows"] == facts["rows"]


def test_claims_are_about_what_was_measured():
    assert speed.claims([]) == []
    macs = {"n_macs": 700, "once_macs": 100}
    job = [
        {"part": "job", "case": f"seed {seed}", "form": form, "seconds": seconds, **macs}
        for seed, pairs in enumerate(
            [((job_times.CLOSED, 2.0), (job_times.SEQUENTIAL, 22.0)), ((job_times.CLOSED, 1.0),)]
        )
        for form, seconds in pairs
    ]
    faster, passes = speed.claims(job)
    assert (faster.value, faster.holds) == (11, True)
    assert (passes.value, passes.holds) == (7, False)
    fields = {"part": "latency", "of_whole": 0.9, "of_target": 1.2, "n_macs": 70}
    names = [(latency.WHOLE, 100), ("density 0.5", 70), (latency.PLUMBING, 51)]
    rows = [{**fields, "case": "one clone, batch 1", "form": form, "n_macs": n} for form, n in names]
    found = {claim.claim: (claim.value, claim.holds) for claim in speed.claims(rows)}
    assert found == {
        "composite at density 0.5, batch 1: latency as a share of target + source": (0.9, False),
        "composite at density 0.5, batch 1: MACs, likewise": (0.7, True),
        "plumbing at batch 1, as a share of the target's latency": (pytest.approx(0.2), False),
    }


def test_where_no_compiler_works_the_reason_is_written_down(monkeypatch):
    def broken(calls, *_):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(latency, "measure", broken)

    class Forms:
        images = torch.rand(1, 1, 8, 8)

        def laid_out(self, layout):
            return {latency.TARGET: torch.nn.Identity()}

    (row,) = latency.run_case(Forms(), "compiled, batch 1", 1, "compiled")
    assert row["skipped"] == "no C++ compiler"
    assert "Not measured: no C++ compiler" in speed.markdown([row], _Setting())
    with pytest.raises(RuntimeError, match="no C"):
        list(latency.run_case(Forms(), "channels_last, batch 1", 1, "channels_last"))


class _Setting:
    words = "digits"
    source = target = type("Model", (), {"spec": "zoo:cnn"})


def test_wrong_parts_are_refused(folder):
    with pytest.raises(pnc.InputError, match="parts: expected some of latency, job, separated by commas; got 'life'"):
        run(folder, "--parts life")
