"""`pnc calibrate`, and the warnings of `eval` and `predict` about clones that are not calibrated."""

import json
import re
from pathlib import Path

import pytest
from test_commands import NETWORKS, Command, command, files  # noqa: F401 # fixtures

import pnc
from digits import BASE, NEW, pair, support

TWO = "{f}/five.safetensors {f}/two.safetensors"


def calibrated(folder: Path, n_base: int = 5) -> pnc.Composite:
    """Both clones as calibrated by the library."""
    nets = pair()
    made = [pnc.load(folder / f"{name}.safetensors", source=nets.source.module) for name in ("five", "two")]
    net = pnc.attach(nets.target.module, *made)
    drawn = support(20, n_base, NEW[:3])
    pnc.calibrate(net, drawn)
    return net


def test_it_writes_the_files_that_the_library_would_write(command: Command, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "calibrated"
    facts = command.facts(f"calibrate {TWO} {NETWORKS} --data digits --out {{out}}", tmp_path / "c.json", out=out)
    net = calibrated(command.folder)
    for name in ("five", "two"):
        pnc.save(net.clone(name), tmp_path / name)
        assert (out / f"{name}.safetensors").read_bytes() == (tmp_path / name).read_bytes()
    assert facts["out"] == [str(out / "five.safetensors"), str(out / "two.safetensors")]
    assert facts["loss_after"] < facts["loss_before"]
    assert set(facts["scales"]) == {"five", "two"} and facts["has_base"] is True
    again = command(f"calibrate {{f}}/two.safetensors {NETWORKS} --data digits --out {{out}}", out=out)
    assert again.code == 0 and f"{out / 'two.safetensors'}: written" in again.out.replace("\n", "")


def test_a_file_for_each_and_a_support_without_base_images(command: Command, tmp_path: Path) -> None:  # noqa: F811
    words = f"calibrate {TWO} {NETWORKS} --data digits --support 20/0 --out {{d}}/a --out {{d}}/b"
    found = command(words, d=tmp_path)
    assert found.code == 0 and "as there was no base image" in found.out
    net = calibrated(command.folder, n_base=0)
    pnc.save(net.clone("two"), tmp_path / "expected")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "expected").read_bytes()


def test_eval_and_predict_say_that_clones_are_not_calibrated(command: Command, tmp_path: Path) -> None:  # noqa: F811
    words = f"eval {TWO} {NETWORKS} --data digits"
    assert command.facts(words, tmp_path / "e.json")["uncalibrated"] == ["five", "two"]
    assert "Not calibrated: five, two." in command(words).out
    image = "predict {f}/images/test/6/0.png"
    both = "--clone {f}/five.safetensors --clone {f}/two.safetensors"
    found = command(f"{image} {both} {NETWORKS}")
    assert found.err.startswith("pnc: Not calibrated: five, two.") and found.err.count("\n") == 1
    assert found.out.count("\n") == 1
    assert not command(f"{image} --clone {{f}}/two.safetensors {NETWORKS}").err
    assert command(f"calibrate {TWO} {NETWORKS} --data digits --out {{d}}/new", d=tmp_path).code == 0
    words = f"eval {{d}}/new/five.safetensors {{d}}/new/two.safetensors {NETWORKS} --data digits --json {{d}}/n.json"
    found = command(words, d=tmp_path)
    assert "Not calibrated" not in found.out
    assert json.loads((tmp_path / "n.json").read_text())["uncalibrated"] == []


def test_predict_takes_folders_and_says_who_answered(command: Command, tmp_path: Path) -> None:  # noqa: F811
    words = f"predict {{f}}/images/test/1 {{f}}/images/test/7/2.png --clone {{f}}/all.safetensors {NETWORKS}"
    found = command.facts(words, tmp_path / "p.json")["predictions"]
    names = [Path(one["image"]).relative_to(command.folder / "images/test") for one in found]
    assert [str(name) for name in names] == ["1/0.png", "1/1.png", "1/2.png", "7/2.png"]
    for one in found:
        assert one["clone"] == (None if one["classes"][0]["class"] in BASE else "all")
    assert found[-1]["clone"] == "all"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (f"calibrate {TWO} {NETWORKS} --data digits", "Missing option.*--out"),
        (f"calibrate {TWO} {NETWORKS} --data digits --out {{d}}/no/c", "out: cannot write"),
        (f"calibrate {TWO} {NETWORKS} --data digits --out {{f}}", "is given for something else"),
        (
            f"calibrate {TWO} {NETWORKS} --data digits --out {{d}}/a --out {{d}}/b --out {{d}}/c",
            "2 files, one for each",
        ),
        (f"calibrate {TWO} {NETWORKS} --data digits --out {{f}}/images/test/0/0.png", "out: .* is a file"),
        (
            "calibrate {f}/two.safetensors {f}/two.safetensors " + f"{NETWORKS} --data digits --out {{d}}",
            "are called two",
        ),
        (f"calibrate {TWO} {NETWORKS} --data digits --out {{d}}/c --support 9", "support: expected NEW/BASE"),
        (f"calibrate {{t}} {NETWORKS} --data digits --out {{d}}/c", "not a clone file"),
    ],
)
def test_what_cannot_be_calibrated_is_one_line_and_leaves_nothing(
    command: Command,  # noqa: F811
    tmp_path: Path,
    words: str,
    complaint: str,
) -> None:
    found = command(words, d=tmp_path).complaint
    assert re.search(complaint, found), found
    assert list(tmp_path.iterdir()) == []


def test_its_screen_is_no_wider_than_eighty_columns(command: Command) -> None:  # noqa: F811
    for words in ("calibrate --help", f"eval {TWO} {NETWORKS} --data digits"):
        found = command(words)
        assert found.code == 0 and max(map(len, found.out.splitlines())) <= 80
