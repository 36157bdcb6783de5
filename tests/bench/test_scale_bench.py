import pytest
import torch

from pnc.bench import scale
from pnc.bench.result_files import Cells
from pnc.foundation.process_team import ALONE


def rows():
    made = [
        {"cell": cell["cell"], "n": cell["n"], "seconds": 1.0, "cpu_seconds": 2.0 * cell["n"], "peak_gib": 1.0,
         "positions": 3, "cuts": cell["n"], "macs_share": None}
        for cell in scale.cells(400, 200, 300)
    ]  # fmt: skip
    for row in made[-2:]:
        row |= {f"{what}_seconds": 0.01 for what in ("scan", "attach", "attach_again", "detach", "fingerprint")}
        row |= {"scan_peak_gib": 7.0, "file_bytes": 1000}
    return made


def test_claims_follow_from_the_rows_and_one_that_fails_stays():
    found = {claim.claim: claim for claim in scale.claims(rows())}
    assert len(found) == 10
    assert found["scan time over samples, fitted exponent"].value == pytest.approx(1.0)
    assert not found["scan of 200 samples of 224x224, ResNet-50 pair, GiB"].holds
    assert found["clone of 400 samples of 32x32 by streaming, GiB"].holds
    text = scale.markdown(rows(), 2, "scale.png")
    assert "![scan time](scale.png)" in text and "clone, ResNet-50" in text


def test_sizes_are_apart_by_sixteen_and_images_repeat_themselves():
    assert max(scale.SAMPLES) / min(scale.SAMPLES) >= 16 and max(scale.CUTS) / min(scale.CUTS) >= 16
    one, two = scale.Noise(30, 8), scale.Noise(30, 8)
    assert torch.equal(one[7][0], two[7][0]) and one[27][1] == 7 and len(one) == 30


def test_the_large_network_is_a_resnet_50():
    network = scale.resnet50(1000)
    assert sum(p.numel() for p in network.parameters()) == 25_557_032  # of torchvision's
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_a_cell_is_measured_once_in_a_process_of_its_own(tmp_path):
    kept = Cells(tmp_path / "rows.jsonl", {}, scale.KEYS)
    wanted = [{"cell": "scan, cuts", "n": 2}]
    measure = scale.bench(wanted, threads=1).measure
    (row,) = measure(kept, None)
    assert row["cuts"] == 2 and row["positions"] >= 2 and row["peak_gib"] > 0 and row["cpu_seconds"] > 0
    assert measure(kept, None) == [row]


def test_memory_and_time_of_a_clone_are_measured(monkeypatch):
    row = scale._clone(*scale._pair(torch.device("cpu"), 1, 0.25), scale.Noise(60, 32), ALONE)
    assert row["macs_share"] > 0 and row["seconds"] > 0


def test_without_the_large_network_the_other_claims_stay():
    few = [row for row in rows() if row["cell"] not in (scale.LARGE, scale.LARGE_HALF)]
    assert [claim.claim for claim in scale.claims(few)] == [
        claim.claim for claim in scale.claims(rows()) if "ResNet-50" not in claim.claim
    ]
    assert "The ResNet-50 pair was not measured." in scale.markdown(few, 2, None)
    assert not any("ResNet-50" in cell["cell"] for cell in scale.cells(100, 0, 100))
