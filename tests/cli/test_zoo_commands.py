"""`pnc zoo`: entries come and go, and a ranking on the command line is the library's."""

import json
import re
from pathlib import Path

import pytest
from test_commands import Command, command, files  # noqa: F401 # fixtures

import pnc
from digits import BASE, network, support

CLASSES = ("5", "6", "7")


@pytest.fixture
def zoo(command: Command, tmp_path: Path) -> Path:  # noqa: F811
    """A zoo of the source, and of a network with random weights."""
    folder = tmp_path / "zoo"
    assert command("zoo add digits --zoo {z} --model {s} --licence mit", z=folder).out == f"digits: added to {folder}\n"
    made = pnc.load_model("zoo:cnn?width=0.25", classes=("a", "b", "c"), input_shape=(3, 16, 16))
    pnc.Zoo(folder).add("untrained", made, preprocessing=pnc.Normalization(0.5, 0.25))
    return folder


def test_entries_are_listed_shown_checked_and_removed(command: Command, zoo: Path, tmp_path: Path) -> None:  # noqa: F811
    shown = command("zoo list --zoo {z}", z=zoo).out
    assert re.search(r"digits +zoo:cnn +1x8x8 +5 +5, 6, 7, \.\.\. \(5 in all\) +102,\d+ +mit", shown)
    facts = command.facts("zoo show untrained --zoo {z}", tmp_path / "facts.json", z=zoo)
    assert facts["preprocessing"] == {"mean": 0.5, "std": 0.25} and facts["classes"] == ["a", "b", "c"]
    assert "mean 0.5, std 0.25" in command("zoo show untrained --zoo {z}", z=zoo).out
    assert command("zoo check --zoo {z}", z=zoo).out == "digits: good\nuntrained: good\n"
    (zoo / "digits.json").write_text("{}")
    listed = command("zoo list --zoo {z}", z=zoo)
    assert "untrained" in listed.out and "digits.json is no entry of a zoo" in listed.err
    (zoo / "stray.safetensors").write_bytes(b"")
    found = command("zoo check --zoo {z}", z=zoo)
    assert found.code == 1 and "untrained: good" in found.out and "digits: zoo: " in found.out
    assert "stray.safetensors: weights without an entry" in found.out
    assert command("zoo remove untrained --zoo {z}", z=zoo).out == f"untrained: removed from {zoo}\n"
    assert not (zoo / "untrained.safetensors").exists()
    assert command("zoo remove digits --zoo {z}", z=zoo).code == 0
    assert "is empty" in command("zoo list --zoo {z}", z=zoo).out


def test_rank_gives_the_ranking_of_the_library(command: Command, zoo: Path, tmp_path: Path) -> None:  # noqa: F811
    words = "zoo rank --zoo {z} --target {t} --data digits --classes 5-7 --workers 1"
    facts = command.facts(words, tmp_path / "rank.json", z=zoo)
    own = pnc.rank(
        pnc.Zoo(zoo), network(BASE).module, support(classes=CLASSES), classes=CLASSES, base_classes=BASE, workers=1
    )
    assert {**facts, "seconds": 0} == {**json.loads(json.dumps(own.facts())), "seconds": 0}
    found = command(f"{words} --resume {{d}}/looks.jsonl", z=zoo, d=tmp_path)
    lines = found.out.splitlines()
    assert re.match(r"\* +digits +[01]\.\d{3} +0\.\d{3} +all ", lines[2]) and "untrained" in lines[3]
    assert lines[-1] == f"clone from it: --source {zoo / 'digits.safetensors'} --source-classes 5,6,7,8,9"
    made = command(
        "clone --source {z}/digits.safetensors --source-classes 5,6,7,8,9 --target {t} --data digits --classes 5-7 "
        "--effort seconds --out {d}/c",
        z=zoo,
        d=tmp_path,
    )
    assert made.code == 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("add a/b --zoo {z} --model {s}", "name: expected letters, digits"),
        ("add digits --zoo {z} --model {s}", "already has an entry 'digits'; remove it first"),
        ("add new --zoo {z} --model zoo:cnn --classes a,b", "--model: zoo:cnn has random weights; give --weights, or"),
        ("add new --zoo {z} --model {s} --mean x", "--mean: expected numbers separated by commas"),
        ("add new --zoo {z} --model {s} --mean .5,.5 --std 1", "one for each of 1 channels"),
        ("show digit --zoo {z}", "there is no entry 'digit' (did you mean 'digits'?)"),
        ("list --zoo {z}/none", "there is no folder"),
        (
            "rank --zoo {z} --target {t} --data digits --classes 4",
            "--classes: the target knows 4 already; leave it out",
        ),
        ("rank --zoo {z} --target {t} --data digits --classes 5,x", "there is no class 'x'"),
        ("rank --zoo {z} --target {t} --data digits --classes 5 --names 5", "--names: expected CLASS=NAME pairs"),
        ("rank --zoo {z} --target {t} --data digits --classes 5 --names 6=six", "--names: 6 not among the requested"),
        (
            "rank --zoo {z} --target zoo:cnn --data digits --classes 5",
            "--target: zoo:cnn has random weights; give --target-weights",
        ),
    ],
)
def test_wrong_input_is_one_line(command: Command, zoo: Path, words: str, complaint: str) -> None:  # noqa: F811
    assert complaint in command(f"zoo {words}", z=zoo).complaint
