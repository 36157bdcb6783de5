import json

import pytest

from pnc.bench import export as export_bench
from pnc.bench.export import PAIRS, Pair, chosen
from pnc.bench.result_files import Cells
from pnc.cli.app import app
from pnc.composite import program_files
from pnc.foundation.errors import InputError


def test_the_pairs_are_what_was_asked_for():
    kinds = {name.partition(":")[0] for pair in PAIRS for name in (pair.target, *pair.sources)}
    assert len(PAIRS) >= 10 and kinds == {"zoo", "timm", "torchvision", "transformers"}
    assert sum(len(pair.sources) == 2 for pair in PAIRS) >= 2
    assert all(len({pair.size, *(Pair(name, ()).size for name in pair.sources)}) == 1 for pair in PAIRS)
    assert [pair.target for pair in chosen("zoo:vit*, timm:conv*")] == ["zoo:vit_tiny", "timm:convnext_atto"]
    with pytest.raises(InputError, match=r"pairs: 'lenet' is none of the \d+ pairs, such as 'zoo:resnet20 <- "):
        chosen("lenet")


def test_a_row_holds_what_was_measured(monkeypatch):
    monkeypatch.setattr(export_bench, "SECONDS", 0.0)
    row = export_bench.measure(Pair("zoo:cnn?width=0.25", ("zoo:cnn?width=0.5",)))
    assert row["reason"] == "" and row["comes_and_goes"] and row["unchanged"]
    assert set(row["difference"]) == set(row["bytes"]) == {"ONNX", ".pt2", "split"}
    assert max(row["difference"].values()) <= program_files.TOLERANCE
    assert all(value > 0 for times in row["ms"].values() for value in times.values())
    assert all(claim.holds for claim in export_bench.claims([row] * 10))


def test_what_cannot_be_exported_has_its_reason(monkeypatch):
    monkeypatch.setattr(export_bench, "SECONDS", 0.0)
    for name in ("export", "export_split"):
        monkeypatch.setattr(export_bench, name, refused)
    row = export_bench.measure(Pair("zoo:cnn?width=0.25", ("zoo:cnn?width=0.25",)))
    assert row["reason"].startswith("ONNX: no such luck. ") and not row["comes_and_goes"]
    assert [claim.holds for claim in export_bench.claims([row])] == [False, False, False, False, False, True]
    text = export_bench.markdown([row])
    assert "| refused | refused | refused |" in text and "- zoo:cnn" in text


def refused(*_):
    raise InputError("no such luck")


def test_the_command_writes_results_and_goes_on(tmp_path, monkeypatch, torchvision):
    measured = []

    def measure(pair):
        measured.append(pair.name)
        times = dict.fromkeys(export_bench.FORMS, 3.0)
        sizes = {"difference": {"ONNX": 1e-6}, "bytes": {"ONNX": [5]}, "weights_bytes": 10}
        facts = {"pair": pair.name, "size": 8, "n_clones": 1, "unchanged": True, "comes_and_goes": True, "reason": ""}
        return {**facts, **sizes, "ms": {"1": times, "16": times}}

    monkeypatch.setattr(export_bench, "measure", measure)
    for _ in range(2):
        app(["bench", "export", "--pairs", "zoo:vit*", "--json", str(tmp_path / "export.json")], standalone_mode=False)
    assert measured == ["zoo:vit_tiny <- zoo:resnet20"], "the second run has nothing left to do"
    facts = json.loads((tmp_path / "export.json").read_text())
    assert {claim["claim"]: claim["holds"] for claim in facts["claims"]}["share of pairs exported, ONNX"] is True
    assert "| zoo:vit_tiny <- zoo:resnet20 | 16 | 3.000 |" in (tmp_path / "export.md").read_text()


def test_a_row_is_kept_under_its_pair(tmp_path):
    cells = Cells(tmp_path / "rows.jsonl", {}, export_bench.KEYS)
    cells.add({"pair": PAIRS[0].name, "size": 1})
    assert export_bench.bench(PAIRS[:1]).measure(cells, None) == [{"pair": PAIRS[0].name, "size": 1}]
