import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from digits import BASE, NEW
from pnc.bench import lifecycle, random_lives
from pnc.bench.lifecycle import CloneMaker, shares
from pnc.bench.result_files import Cells
from pnc.bench.setting import Setting
from pnc.cli.bench_commands import bench
from pnc.data.image_set import ImageSet
from pnc.data.support import Support
from pnc.foundation.errors import InputError
from pnc.models.model_specs import build_model, load_model, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Untrained networks: what they know does not matter here."""
    folder = tmp_path_factory.mktemp("bench")
    for seed, (name, classes) in enumerate((("t", BASE), ("s", NEW), ("r", NEW), ("x", NEW[:4]))):
        save_model(build_model("zoo:cnn?width=0.25", classes, (1, 8, 8), seed), folder / f"{name}.safetensors", {})
    (folder / "keep").mkdir()
    return folder


def run(folder, second="r", n_sequences=3):
    files = [folder / f"{name}.safetensors" for name in ("s", second, "t")]
    words = f"lifecycle --source {files[0]} --source {files[1]} --target {files[2]} --data digits --support 6/3"
    words = f"{words} --no-flip --seeds 1 --n-test 10 --sequences {n_sequences} --keep {folder / 'keep'}"
    words = f"{words} --json {folder / 'l.json'}"
    return CliRunner().invoke(bench, words.split(), catch_exceptions=False)


def test_clones_made_apart_stand_beside_one_made_at_once_and_nothing_is_made_twice(folder, monkeypatch):
    assert run(folder).exit_code == 0
    facts = json.loads((folder / "l.json").read_text())
    rows = {row["clones"]: row for row in facts["rows"]}
    assert list(rows) == ["one", "two", "four"]
    for row in rows.values():
        assert row["raw"]["conditional_kl"] == row["calibrated"]["conditional_kl"] == 0
        assert row["off"] < 1e-3, "what is measured is what the composite gives"
        assert row["loss_after"] <= row["loss_before"]
    assert list(rows["four"]["scalars"]) == ["5", "6+7", "8", "9"]
    assert facts["lives"]["n_problems"] == 0 and facts["lives"]["n_sequences"] == 3
    assert sum(facts["lives"]["steps"].values()) > 3
    claims = {claim["claim"]: claim for claim in facts["claims"]}
    ahead = rows["four"]["calibrated"]["average_accuracy"] - rows["one"]["raw"]["average_accuracy"]
    (four,) = (claim for words, claim in claims.items() if words.startswith("four"))
    assert four["value"] == pytest.approx(ahead) and four["holds"] == (ahead >= -0.02)
    assert not claims["random sequences of attach, detach, disable, only, save, calibrate"]["holds"], "3 are not 1,000"
    text = (folder / "l.md").read_text()
    assert "- two: 5, 6, 7 from source 1; 8, 9 from source 2" in text and "Broken promises: 0." in text
    assert len(list((folder / "keep").iterdir())) == 7
    before = facts["rows"]
    monkeypatch.setattr(lifecycle, "clone", None)
    monkeypatch.setattr(random_lives, "make_stage", None)
    assert run(folder).exit_code == 0
    assert json.loads((folder / "l.json").read_text())["rows"] == before
    (folder / "l.jsonl").unlink()
    assert run(folder, n_sequences=0).exit_code == 0, "kept clones are read"
    again = json.loads((folder / "l.json").read_text())["rows"]
    assert [row["calibrated"] for row in again] == [row["calibrated"] for row in before]


def test_names_of_kept_clones_say_what_these_depend_on(folder):
    s, r, t = (load_model(str(folder / f"{name}.safetensors")) for name in "srt")
    images, labels = torch.zeros(2, 1, 2, 2), torch.tensor([0, 1])
    data, support = ImageSet(images, labels, ("a", "b")), Support(images, labels, ("a", "b"))
    maker, part = CloneMaker(Setting(s, t, data, data, "digits", 1, 1, False), r, folder), (0, ("5",))

    def with_setting(**changes):
        return dataclasses.replace(maker, setting=dataclasses.replace(maker.setting, **changes))

    names = {
        one.file_name(*given)
        for one, *given in (
            (maker, support, part, 0),
            (maker, support, part, 1),
            (maker, support, (1, ("5",)), 0),
            (maker, support, (0, ("5", "6")), 0),
            (with_setting(flip=True), support, part, 0),
            (with_setting(target=s), support, part, 0),
            (with_setting(source=r), support, part, 0),
            (maker, Support(images + 1, labels, ("a", "b")), part, 0),
            (maker, Support(images, labels, ("a", "c")), part, 0),
        )
    }
    assert len(names) == 9
    again = dataclasses.replace(maker, folder=None, second=s)
    assert again.file_name(support, part, 0) in names, "the other source does not matter"


def test_sources_must_know_the_same_classes(folder):
    with pytest.raises(InputError, match="both must know the same classes"):
        run(folder, second="x")
    with pytest.raises(InputError, match="at least four new classes; got 3"):
        shares(("a", "b", "c"), "four")
    assert shares("abcd", "four") == [(0, ("a",)), (0, ("b",)), (1, ("c",)), (1, ("d",))]


def test_broken_promises_are_counted(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(random_lives, "make_stage", lambda: stage)
    monkeypatch.setattr(random_lives.Life, "_expect", lambda life, what, found, expected: life.problems.append(what))
    rows = random_lives.measure(2)(Cells(tmp_path / "c", {}, ["seed", "clones"]), None)
    facts = random_lives.summary(rows, 2)
    assert facts["n_problems"] > 2 and facts["problems"][0] == "sequence 0, after the first clone: base"
