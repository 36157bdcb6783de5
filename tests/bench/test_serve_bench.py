"""The bench of servers: its load, its mutated uploads, its claims; all of it in the slow test."""

import asyncio
import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from digits import NEW, pair
from pnc.bench.load_generator import Load, make_load
from pnc.bench.serve_report import ALONE, CLONES, WHOLE, claims, memory_growth
from pnc.bench.upload_attacks import images_as_files, upload
from pnc.data.image_files import decode
from pnc.data.image_set import images_as_float
from pnc.models.model_specs import save_model
from pnc.serving.limits import Limits
from running_server import TOKEN, clone_file, deployment, image_bytes, running

IMAGES = image_bytes(3)


def expected(net, classes):
    with torch.inference_mode():
        rows = net(images_as_float(decode(IMAGES, ["x"] * 3, 1, (8, 8)))).softmax(1).tolist()
    return [dict(zip(classes, row, strict=True)) for row in rows]


def made(server, known):
    images = [base64.b64encode(one).decode() for one in IMAGES]
    load = Load(server.port, 3, images, seconds=0.3, warm=0.05, expected=known, top=100)
    return asyncio.run(make_load(load, asyncio.Event()))


def test_a_load_counts_answers_and_finds_mixed_and_failed_ones() -> None:
    found = deployment(None, "dog")
    right = expected(found.current.net, found.current.classes)
    with running(found, Limits(wait_ms=1)) as server:
        good = made(server, {"dog": right})
        assert good["n_answers"] > 3 and good["mixed"] == 0 and not good["failed"]
        assert good["sets"] == {"dog": sum(good["sets"].values())} and 0 < good["p50_ms"] <= good["p99_ms"]
        mixed = made(server, {"dog": right[1:] + right[:1]})
        assert mixed["mixed"] > 0
        assert made(server, {"elk": right})["mixed"] > 0, "a set that nobody attached"
    with running(deployment(), Limits(body_bytes=10)) as server:
        assert set(made(server, {})["failed"]) == {"413"}
    assert made(server, {})["failed"]["ConnectionRefusedError"] > 0


def test_mutated_uploads_are_answered() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8), dtype=np.uint8)
    images = images_as_files(pixels)
    assert len(images) == 18
    with running(deployment(None, "dog"), Limits(wait_ms=0)) as server:
        for content_type, body in images:
            answer = server.post(body, headers={"Content-Type": content_type})
            assert answer.status_code == 200, (content_type, answer.text)
        found = upload(server.url, TOKEN, range(120), images, [clone_file("elk")])
        assert server.server.deployment.current.names == ("dog",)
    assert found["errors"] == found["hangs"] == found["lost"] == 0
    assert sum(found["statuses"].values()) == 120 and {"image 422", "clone 422"} <= found["statuses"].keys()


def row(part, case, number, **facts):
    return {"part": part, "case": case, "round": number, **facts}


def test_claims_compare_servers_and_show_what_fails() -> None:
    rates = {ALONE: (100, 10), CLONES: (90, 7), WHOLE: (20, 4)}
    rows = [
        row("throughput", case, number, per_second=rate, mean_batch=20.0, failed=0)
        for case, both in rates.items()
        for number, rate in enumerate(both)
    ]
    rows += [row("same", "batch 1", 0, different=1)]
    memory = [(0, 100), (0, 104), (1, 200), (1, 190)]
    same = {"cycles": 500, "n_answers": 30_000, "failed": 0}
    rows += [
        row("churn", "cycles", number, process=process, memory=bytes_, mixed=number, **same)
        for number, (process, bytes_) in enumerate(memory)
    ]
    rows += [row("uploads", "mutated", 0, n=10_000, errors=1, hangs=0, lost=0)]
    found = {one.claim: one for one in claims(rows)}
    shares = [one for name, one in found.items() if name.startswith("throughput")]
    assert [one.value for one in shares] == pytest.approx([(0.9 + 0.7) / 2, (90 / 20 + 7 / 4) / 2])
    assert all(one.holds for one in shares)
    failed = {name for name, one in found.items() if not one.holds}
    assert failed == {
        "answers that differ from the fused form's in Python",
        "mixed answers meanwhile",
        "answers 5xx to them, except 503",
    }
    assert memory_growth([one for one in rows if one["part"] == "churn"]) == pytest.approx(0.04)
    assert claims([]) == []


@pytest.mark.slow
def test_the_bench_measures_real_servers_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from pnc.cli import app

    for name, model in (("target", pair().target), ("source", pair().source)):
        save_model(model, tmp_path / f"{name}.safetensors", {})
    words = ["pnc", "bench", "serve", "--source", str(tmp_path / "source.safetensors"), "--data", "digits"]
    words += [
        "--target",
        str(tmp_path / "target.safetensors"),
        "--support",
        "10/5",
        "--rounds",
        "1",
        "--seconds",
        "0.5",
    ]
    words += ["--cycles", "50", "--uploads", "100", "--max-macs", "1", "--out", str(tmp_path)]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stopped:
            app.main()
        assert not stopped.value.code
    facts = json.loads((tmp_path / "serve.json").read_text())
    held = {one["claim"]: one["holds"] for one in facts["claims"]}
    assert held["answers that differ from the fused form's in Python"] and held["mixed answers meanwhile"]
    assert len(facts["rows"]) == 3 + 4 + 1 + 1, "rows that are there are not measured again"
    assert NEW[0] in (tmp_path / "serve.md").read_text()
