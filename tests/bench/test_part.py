import json

import pytest
import torch
from typer.testing import CliRunner

from digits import network
from pnc.bench import part
from pnc.cli.bench_commands import bench
from pnc.foundation.errors import InputError
from pnc.models.model_specs import save_model


@pytest.fixture
def folder(tmp_path):
    for name, classes in (("t", "01234"), ("s", "56789")):
        save_model(network(tuple(classes)), tmp_path / f"{name}.safetensors", {})
    return tmp_path


def run(folder, forms, support="20/5", *more):
    words = ["part", "--source", folder / "s.safetensors", "--target", folder / "t.safetensors", "--data", "digits"]
    words += ["--support", support, "--no-flip", "--seeds", 1, "--out", folder, "--pair", "digits", "--forms", forms]
    words += ["--some", "5,7", *more]
    return CliRunner().invoke(bench, list(map(str, words)), catch_exceptions=False)


def test_parts_stand_beside_the_whole_source_and_rows_are_made_once(folder, monkeypatch):
    assert run(folder, "whole,0.5 low-rank").exit_code == 0
    assert run(folder, "whole,seconds").exit_code == 0
    facts = json.loads((folder / "part.json").read_text())
    rows = {row["form"]: row for row in facts["rows"]}
    assert list(rows) == ["whole", "0.5 low-rank", "seconds"] and len(facts["rows"]) == 3
    assert rows["0.5 low-rank"]["tune"] == "low-rank" and rows["whole"]["tune"] is None
    assert all(row["base_logits_equal"] and row["removed_equal"] and row["target_unchanged"] for row in rows.values())
    text = (folder / "part.md").read_text()
    assert all(f"| {form} | 1 |" in text for form in rows)
    monkeypatch.setattr(part, "fit", None)
    assert run(folder, "whole").exit_code == 0
    assert json.loads((folder / "part.json").read_text())["rows"] == facts["rows"]


def test_unlabelled_images_are_others_than_those_of_the_support(folder, monkeypatch):
    given = []
    prepare = part.prepare_task

    def watched(source, target, support, *, background, **arguments):
        given.append((support, background))
        return prepare(source, target, support, background=background, **arguments)

    monkeypatch.setattr(part, "prepare_task", watched)
    assert run(folder, "whole", "20/5", "--unlabelled", 3).exit_code == 0
    ((support, background),) = given
    assert len(background) == 5 * 3
    both = torch.cat([support.images, background]).flatten(1)
    assert len(both.unique(dim=0)) == len(both)
    (made,) = json.loads((folder / "part.json").read_text())["rows"]
    assert made["support"] == "20/5 and 3 unlabelled"
    with pytest.raises(InputError, match="unlabelled: 5000 per class, but beside the support some have [0-9]+ left"):
        run(folder, "whole", "20/5", "--unlabelled", 5000)


def row(form, average, score, macs, seed=0, support="100/20"):
    promises = dict.fromkeys(("base_logits_equal", "removed_equal", "target_unchanged"), True)
    names = {
        "pair": "CIFAR-10",
        "classes": "a+b+c+d+e",
        "support": support,
        "form": form,
        "seed": seed,
        "not_cloned": None,
    }
    return {**names, **promises, "average": average, "score": score, "macs_share": macs, "seconds": 80.0}


def test_what_is_claimed_is_the_loss_against_the_whole_source_on_the_same_supports():
    rows = [
        row(form, 0.8 - lost + 0.1 * seed, 0.85 - lost + off + 0.1 * seed, macs, seed)
        for seed in (0, 1)
        for form, lost, off, macs in (
            ("whole", 0, 0, 1.0),
            ("0.5 weights", 0.002, 0, 0.5),
            ("default", 0.02, 0.03, 0.3),
        )
    ]
    found = {claim.claim: claim for claim in part.claims(rows)}
    half = found["CIFAR-10, 100/20: 0.5 weights loses against the whole source"]
    assert (half.must, half.holds) == ("<= 0.003", True) and half.value == pytest.approx(0.002)
    default = found["CIFAR-10, 100/20: default loses against the whole source"]
    assert (default.must, default.holds) == ("<= 0.01", False)
    assert not found["CIFAR-10, 100/20: default, how much further the held-out score is from test accuracy"].holds
    assert found["CIFAR-10: seconds of the job, default"].holds
    broken = part.claims([{**rows[0], "removed_equal": False}])
    assert not next(c for c in broken if "promise" in c.claim).holds


@pytest.mark.parametrize("forms", ["half", "0.5", "2 weights", "0.5 all", "whole,"])
def test_other_forms_are_refused(forms):
    with pytest.raises(InputError, match="forms: expected whole, default, seconds, small, or such as '0.5 weights'"):
        part.parse_forms(forms)


def test_the_largest_file_of_the_residual_networks_is_bounded():
    rows = [
        {**row("0.5 low-rank", 0.7, 0.7, 0.5, seed), "pair": part.RESNETS, "bytes": n_bytes}
        for seed, n_bytes in enumerate((55_000, 61_000))
    ]
    claim = next(one for one in part.claims(rows) if "bytes of the file, 0.5 low-rank" in one.claim)
    assert not claim.holds
    rows[1]["bytes"] = 60_000
    assert next(one for one in part.claims(rows) if "bytes of the file, 0.5 low-rank" in one.claim).holds
