"""One backbone, two networks: digits stand for Tiny-ImageNet, and a network that knows them for the public one."""

import json

import pytest
import torch
from typer.testing import CliRunner

from digits import network
from pnc.bench import backbone, backbone_networks
from pnc.bench.backbone_networks import FineTuning
from pnc.cli import rival_benches
from pnc.cli.bench_commands import bench
from pnc.data.image_set import images_as_float
from pnc.data.readers import load_data
from pnc.foundation.errors import InputError
from pnc.foundation.tensor_files import read_tensors
from pnc.graph.recording import record
from pnc.graph.shared_trunk import shared_cut

ALL = tuple("0123456789")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(backbone_networks, "N_BASE", 5)
    monkeypatch.setattr(backbone_networks, "N_NEW", 3)
    monkeypatch.setattr(backbone_networks, "N_TUNED", 20)
    monkeypatch.setattr(backbone, "BUDGET", backbone.Budget(1, 1, 2, 1, 16))
    monkeypatch.setitem(backbone_networks.WAYS, "last third", FineTuning(1 / 3, 1, 1e-3))
    monkeypatch.setitem(backbone_networks.WAYS, "all", FineTuning(1.0, 1, 1e-3))
    monkeypatch.setattr(rival_benches, "public_network", lambda shape: network(ALL))


def images():
    return load_data("digits", "train"), load_data("digits", "test")


def run(folder, *words):
    given = ["backbone", "--data", "digits", "--support", "8/4", "--seeds", 1, "--n-test", 10, "--out", folder]
    given += ["--runs", folder, *words]
    return CliRunner().invoke(bench, list(map(str, given)), catch_exceptions=False)


@pytest.mark.parametrize(("way", "kept"), [("head", 1.0), ("last third", 2 / 3), ("all", 0.0)])
def test_a_target_differs_from_the_public_network_only_where_it_was_tuned(small, tmp_path, way, kept):
    public = network(ALL)
    setting = backbone_networks.pair(public, images(), way, tmp_path)
    recordings = [record(one.module, images_as_float(setting.test.images[:4])) for one in (setting.target, public)]
    _, cut = shared_cut(*recordings)
    everything = sum(node.meta["pnc"].n_macs for node in recordings[1].module.graph.nodes)
    assert cut.n_macs / everything <= kept
    assert (cut.n_macs == 0) == (way == "all") and (way != "head" or cut.n_macs / everything > 0.95)
    accuracy = (setting.target.module(setting.test.images[setting.test.labels < 5]).argmax(1)).eq(
        setting.test.labels[setting.test.labels < 5]
    )
    assert accuracy.float().mean() > 0.9


def test_no_image_of_the_support_tuned_the_target_and_what_was_trained_is_kept(small, tmp_path, monkeypatch):
    seen = []
    train = backbone_networks._train
    monkeypatch.setattr(backbone_networks, "_train", lambda *a: (seen.append(a[2]), train(*a))[1])
    setting = backbone_networks.pair(network(ALL), images(), "head", tmp_path)
    assert setting.target.classes == ALL[:5] and setting.train.classes == ALL[:8]
    tuned = {image.numpy().tobytes() for image in seen[0].images}
    assert len(seen[0]) == 100
    counts, given = setting.train.counts(), images()[0].counts()
    least = min(given[name] for name in ALL[:5]) - 20
    assert counts == {name: least if name in ALL[:5] else given[name] for name in ALL[:8]}
    same = [image.numpy().tobytes() in tuned for image in setting.train.images]
    assert sum(same) <= 2  # of the digits a few are equal
    tensors, _ = read_tensors(tmp_path / "backbone_head.safetensors")
    assert len(tensors) == 2
    again = backbone_networks.pair(network(ALL), images(), "head", tmp_path)
    assert len(seen) == 1
    state, other = setting.target.module.state_dict(), again.target.module.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_rows_are_made_once_and_the_clone_starts_where_the_networks_differ(small, tmp_path, monkeypatch):
    some = f"clone,{backbone.SECONDS},direct ensemble,LoRA (last stage)"
    assert run(tmp_path, "--tuned", "head,last third", "--methods", some).exit_code == 0
    facts = json.loads((tmp_path / "backbone.json").read_text())
    rows = {(row["tuned"], row["method"]): row for row in facts["rows"]}
    assert len(rows) == 8
    for (tuned, method), row in rows.items():
        assert row["verified"]["target_unchanged"] and 0 <= row["auroc"] <= 1
        if method in ("clone", backbone.SECONDS):
            assert row["verified"]["base_logits_equal"] and row["verified"]["removed_equal"]
            assert row["added_macs_share"] <= {"head": 0.02, "last third": 0.6}[tuned]
    assert rows["head", "direct ensemble"]["added_macs_share"] == pytest.approx(1.0)
    text = (tmp_path / "backbone.md").read_text()
    assert "## Tuned: last third; support 8/4" in text
    claimed = {claim["claim"]: claim for claim in facts["claims"]}
    assert claimed["head tuned, 8/4: added MACs as a share of the source's"]["holds"]
    monkeypatch.setattr(rival_benches, "public_network", None)
    assert run(tmp_path, "--tuned", "head", "--methods", "clone").exit_code == 0


def test_names_that_are_unknown_are_refused(small, tmp_path):
    with pytest.raises(InputError, match="tuned: expected some of head, last third, all; got 'body'"):
        run(tmp_path, "--tuned", "body")
    with pytest.raises(InputError, match="support: images of new and of base classes are needed"):
        run(tmp_path, "--support", "8/0")


def row(tuned, method, kind, average, macs, seed):
    promises = dict.fromkeys(("target_unchanged",), True)
    return {
        **{"tuned": tuned, "support": "20/5", "method": method, "kind": kind, "seed": seed},
        **{"average_accuracy": average, "added_macs_share": macs, "verified": promises},
    }


def test_claims_compare_the_clone_with_the_best_stacked_and_the_best_tuning_rival_on_the_same_seeds():
    rows = [
        row("last third", method, kind, average + 0.1 * seed, macs, seed)
        for seed in (0, 1)
        for method, kind, average, macs in (
            ("clone", "clone", 0.800, 0.3),
            (backbone.STACKED[0], "ensemble", 0.804, 1.0),
            (backbone.STACKED[1], "ensemble", 0.790, 1.0),
            ("LwF (last stage)", "tuning", 0.65, 0.0),
            ("LoRA (last stage)", "tuning", 0.72, 0.0),
        )
    ]
    found = {claim.claim: claim for claim in backbone.claims(rows)}
    above = found[f"last third tuned, 20/5: average accuracy above {backbone.STACKED[0]}"]
    assert above.value == pytest.approx(-0.004) and above.holds
    tuning = found[
        "last third tuned, 20/5: average accuracy above LoRA (last stage), the best rival that tunes the target"
    ]
    assert tuning.value == pytest.approx(0.08) and not tuning.holds
    assert found["last third tuned, 20/5: added MACs as a share of the source's"].holds
    assert found["target unchanged in each of 10 cells"].holds
