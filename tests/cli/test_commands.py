"""The command line as a user sees it: exit codes, standard output, standard error, files."""

import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pnc
from digits import BASE, NEW, held_out_images, network, pair, support, write_images
from pnc.cli import app, arguments, clone_commands, making_commands, output
from pnc.composite.metrics import measure_logits
from pnc.foundation.tensor_files import read_tensors, write_tensors
from pnc.models import pretraining
from pnc.models.model_specs import save_model


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line on standard error of a refused command."""
        assert self.code == 2, f"exit code {self.code}\n{self.out}\n{self.err}"
        assert self.err.count("\n") == 1 and self.err.startswith("pnc: "), f"not one line: {self.err!r}"
        return self.err


@dataclass(frozen=True)
class Command:
    """Runs `pnc WORDS` in this process; `{t}`, `{s}` and `{f}` stand for target, source and the folder of the files."""

    folder: Path
    run: Callable[[list[str]], Outcome]

    def __call__(self, words: str, **places: Any) -> Outcome:
        known = {"t": self.folder / "t.safetensors", "s": self.folder / "s.safetensors", "f": self.folder, **places}
        return self.run([word.format(**known) for word in words.split()])

    def facts(self, words: str, path: Path, **places: Any) -> Any:
        """The facts that the command writes with --json."""
        found = self(f"{words} --json {path}", **places)
        assert found.code == 0, found.err
        return json.loads(path.read_text())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a target t and a source s; clones of all classes, of 5 and of 6, 7; some digits as image files."""
    folder = tmp_path_factory.mktemp("files")
    nets = pair()
    save_model(nets.target, folder / "t.safetensors", {})
    save_model(nets.source, folder / "s.safetensors", {})
    for name, classes in (("all", NEW), ("five", NEW[:1]), ("two", NEW[1:3])):
        data = support(classes=classes)
        made = pnc.clone(
            nets.source.module, nets.target.module, data, classes=classes, name=name, effort="seconds", **nets.names()
        )
        pnc.save(made, folder / f"{name}.safetensors")
    write_images(folder / "images", "test", (*BASE, *NEW), 3)
    return folder


@pytest.fixture
def command(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    def run(words: list[str]) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["pnc", *words])
        monkeypatch.setenv("COLUMNS", "80")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            app.main()
        code = stopped.value.code
        return Outcome(code if isinstance(code, int) else 0, *capsys.readouterr())

    before = sorted(files.rglob("*"))
    yield Command(files, run)
    assert sorted(files.rglob("*")) == before, "a command left something beside the files it was given"


NETWORKS = "--source {s} --target {t}"


# --------------------------------------------------------------------------------------------------- good input
def test_clone_writes_the_file_that_the_library_would_write(command: Command, files: Path, tmp_path: Path) -> None:
    words = f"clone {NETWORKS} --data digits --out {{out}} --name all --effort seconds --threads 1"
    facts = command.facts(words, tmp_path / "facts.json", out=tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == (files / "all.safetensors").read_bytes()
    assert facts["classes"] == list(NEW)
    assert facts["n_bytes"] == (tmp_path / "c").stat().st_size
    assert facts["seconds"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "facts.json"]


def test_clone_takes_classes_density_kind_and_support_without_base_samples(command: Command, tmp_path: Path) -> None:
    words = f"clone {NETWORKS} --data digits --out {{out}} --classes 7,5 --support 10/0 --density 0.5 --kind full"
    found = command(words, out=tmp_path / "c")
    assert found.code == 0
    known = pnc.inspect(tmp_path / "c")
    assert (known["classes"], known["kind"], known["name"]) == (["7", "5"], "full", "7+5")
    assert (known["recipe"]["n_new_samples"], known["recipe"]["n_base_samples"]) == (20, 0)
    nets, data = pair(), support(10, 0, ("7", "5"))
    made = pnc.clone(nets.source.module, nets.target.module, data, classes=["7", "5"], density=0.5, **nets.names())
    assert known["recipe"] == made.recipe
    assert "20 new, 0 base images" in found.out
    assert "among the new classes only, without base images" in " ".join(found.out.split())


def test_the_default_clone_says_what_it_was_chosen_from(command: Command, tmp_path: Path) -> None:
    found = command(f"clone {NETWORKS} --data digits --out {{out}} --prefer small", out=tmp_path / "c")
    recipe = pnc.inspect(tmp_path / "c")["recipe"]
    assert recipe["prefer"] == "small"
    assert "The front that the clone was chosen from (small)" in found.out
    last = [line.split()[-1] for line in found.out.splitlines() if line.strip()]
    assert last.count("measured") == sum(made for *_, made in recipe["front"])
    assert last.count("expected") == sum(not made for *_, made in recipe["front"])
    again = command("inspect {c}", c=tmp_path / "c").out
    assert "The front that the clone was chosen from (small)" in again


def test_what_base_images_may_lose_is_bounded_or_refused(command: Command, tmp_path: Path) -> None:
    words = f"clone {NETWORKS} --data digits --out {{out}} --effort seconds --max-base-drop 0.02 --support"
    assert "base images may lose" in command(f"{words} 10/10", out=tmp_path / "c").out
    assert pnc.inspect(tmp_path / "c")["recipe"]["max_base_drop"] == 0.02
    assert (
        "0 base images are too few to verify that; give at least 49"
        in command(f"{words} 10/0", out=tmp_path / "d").complaint
    )
    assert not (tmp_path / "d").exists()


def test_background_images_stand_for_base_samples(command: Command, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", "train", BASE, 12)
    words = (
        f"clone {NETWORKS} --data digits --out {{out}} --effort seconds --support 10/0 --background folder:{{photos}}"
    )
    assert command(words, out=tmp_path / "c", photos=tmp_path / "photos").code == 0
    recipe = pnc.inspect(tmp_path / "c")["recipe"]
    assert (recipe["n_background_samples"], recipe["n_base_samples"], recipe["n_new_samples"]) == (60, 0, 50)


def test_a_network_may_come_from_a_python_file_and_a_checkpoint(command: Command, tmp_path: Path) -> None:
    source = pair().source
    torch.save({"state_dict": source.module.state_dict()}, tmp_path / "s.pt")
    code = "from pnc.models.reference_networks import cnn\n\n\ndef make():\n    return cnn((1, 8, 8), 5)\n"
    (tmp_path / "mine.py").write_text(code)
    own = "--source py:{own}:make --source-weights {weights} --target {t} --data digits"
    places = {"own": tmp_path / "mine.py", "weights": tmp_path / "s.pt", "out": tmp_path / "c"}
    assert (
        command(f"clone {own} --source-classes 5,6,7,8,9 --out {{out}} --name all --effort seconds", **places).code == 0
    )
    assert (tmp_path / "c").read_bytes() == (command.folder / "all.safetensors").read_bytes()
    assert command(f"eval {{out}} {own} --source-classes a,b,c,d,e", **places).code == 0, "only their number counts"


def test_eval_measures_what_the_library_measures(command: Command, files: Path, tmp_path: Path) -> None:
    facts = command.facts(f"eval {{f}}/all.safetensors {NETWORKS} --data digits", tmp_path / "e.json")
    nets, test = pair(), held_out_images()
    net = pnc.attach(nets.target.module, pnc.load(files / "all.safetensors", source=nets.source.module))
    with torch.no_grad():
        measured = measure_logits(net(test.images), test.labels, nets.target.module(test.images))
    assert {key: facts[key] for key in vars(measured)} == pytest.approx(vars(measured), abs=1e-6)  # batch sizes differ
    assert facts["average_accuracy"] > 0.9
    assert facts["base_logits_equal"] is True
    assert facts["classes"] == [*BASE, *NEW]
    assert facts["classes_without_images"] == []
    assert facts["n_images"] == len(test)


def test_eval_and_predict_attach_several_clones_each_by_its_name(command: Command, tmp_path: Path) -> None:
    two = "{f}/two.safetensors"
    words = f"eval {{f}}/five.safetensors {two} {NETWORKS} --data digits"
    facts = command.facts(words, tmp_path / "e.json")
    assert facts["clones"] == ["five", "two"]
    assert facts["classes"] == [*BASE, "5", "6", "7"]
    assert facts["average_accuracy"] > 0.85
    again = command.facts(f"{words} --source {{s}}", tmp_path / "again.json")
    assert again == facts, "one source for all and the same one for each are the same"
    words = f"predict {{f}}/images/test/6/0.png --clone {two} --clone {{f}}/five.safetensors {NETWORKS} --top 8"
    (found,) = command.facts(words, tmp_path / "p.json")["predictions"]
    assert {answer["class"] for answer in found["classes"]} == {*BASE, "5", "6", "7"}


def test_eval_says_which_classes_have_no_images(command: Command, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "some", "test", ("1", "3", "8"), 4)
    words = f"eval {{f}}/all.safetensors {NETWORKS} --data folder:{folder}"
    facts = command.facts(words, tmp_path / "e.json")
    assert facts["classes_without_images"] == ["0", "2", "4", "5", "6", "7", "9"]
    assert facts["n_images"] == 12


def test_predict_classifies_image_files(command: Command, files: Path, tmp_path: Path) -> None:
    digits = "{f}/images/test/0/1.png {f}/images/test/7/2.png"
    words = f"predict {digits} --clone {{f}}/all.safetensors {NETWORKS} --top 2"
    facts = command.facts(words, tmp_path / "p.json")
    assert [Path(found["image"]).parent.name for found in facts["predictions"]] == ["0", "7"]
    assert [found["classes"][0]["class"] for found in facts["predictions"]] == ["0", "7"]
    nets = pair()
    net = pnc.attach(nets.target.module, pnc.load(files / "all.safetensors", source=nets.source.module))
    data = pnc.load_data(f"folder:{files / 'images'}", "test")
    with torch.no_grad():
        expected = net(data.images[[1]].float() / 255).softmax(1).max().item()
    # the command and the library use different batch sizes
    assert facts["predictions"][0]["classes"][0]["probability"] == pytest.approx(expected, abs=1e-6)
    assert all(len(found["classes"]) == 2 for found in facts["predictions"])
    shown = command(words).out.splitlines()
    assert len(shown) == 2 and shown[1].startswith(f"{files / 'images/test/7/2.png'}: 7 (")


def test_inspect_and_cuts_show_what_they_write(command: Command, tmp_path: Path) -> None:
    facts = command.facts("inspect {f}/two.safetensors", tmp_path / "i.json")
    assert facts == json.loads(json.dumps(pnc.inspect(command.folder / "two.safetensors")))
    assert "6, 7" in command("inspect {f}/two.safetensors").out
    facts = command.facts("cuts {t}", tmp_path / "c.json")
    names = [row["name"] for row in facts["cuts"]]
    assert names[0] == "input" and facts["features"] in names
    depths = [row["macs_share"] for row in facts["cuts"]]
    assert depths == sorted(depths) and depths[0] == 0
    gap = facts["largest_gap"]
    assert gap["share"] == max(b - a for a, b in zip(depths, [*depths[1:], 1], strict=True))
    assert depths[names.index(gap["after"])] + gap["share"] == pytest.approx(depths[names.index(gap["before"])])
    shown = command("cuts {t}").out
    assert all(name in shown for name in names)
    assert facts["large_gaps"][0] == gap
    assert shown.count(" gap: ") == len(facts["large_gaps"])
    assert f"largest gap: {gap['share']:.1%} of MACs" in shown and f"between {gap['after']} and" in shown
    assert command("cuts zoo:resnet20 --input-shape 3x32x32 --classes a,b").code == 0


def test_scan_shows_what_the_library_finds_and_draws_it(command: Command, files: Path, tmp_path: Path) -> None:
    words = f"scan {NETWORKS} --data digits --support 20/5 --max-macs 0.5"
    facts = command.facts(f"{words} --plot {tmp_path / 'scan.png'}", tmp_path / "scan.json")
    nets = pair()
    task = pnc.prepare_task(nets.source.module, nets.target.module, support(), classes=NEW, **nets.names())
    found = pnc.scan(task)
    assert facts["positions"] == json.loads(json.dumps(found.facts(found.choose(0.5))))
    (chosen,) = [row for row in facts["positions"] if row["chosen"]]
    assert chosen["macs_share"] <= 0.5
    assert facts["shared"] == 0
    assert {row["target_cut"] for row in facts["positions"] if row["on_front"]} == {
        position.target_cut.name for position in found.front()
    }
    assert (tmp_path / "scan.png").read_bytes().startswith(b"\x89PNG")
    (line,) = [line for line in command(words).out.splitlines() if line.startswith("> ")]
    assert line.split()[1:4] == [chosen["target_cut"], chosen["source_cut"], f"{chosen['log_loss']:.3f}"]


def test_scan_says_what_two_networks_of_one_backbone_share(capsys: pytest.CaptureFixture[str]) -> None:
    position = {
        **{"chosen": True, "on_front": True, "target_cut": "a", "source_cut": "b", "log_loss": 0.5, "score": 0.9},
        **{"macs_share": 0.2, "n_params": 3, "n_bytes": 4, "n_macs": 5},
    }
    words = "Shared by both networks, and not added: 63.1% of the source's MACs"
    for shared in (0.631, 0.0):
        output.show_scan({"positions": [position], "shared": shared})
        assert (words in capsys.readouterr().out) == (shared > 0)


def test_pretrain_trains_once_and_says_so(command: Command, tmp_path: Path) -> None:
    words = (
        "pretrain zoo:cnn?width=0.25 --data digits --no-flip --classes 3,0-1 --epochs 2 --crop-padding 1 --out {out}"
    )
    out = tmp_path / "n.safetensors"
    facts = command.facts(words, tmp_path / "n.json", out=out)
    assert facts["classes"] == ["3", "0", "1"]
    assert len(facts["seconds_per_epoch"]) == 2
    made = pnc.load_model(str(out))
    assert made.facts["test_accuracy"] == facts["test_accuracy"]
    assert (made.facts["recipe"]["crop_padding"], made.facts["recipe"]["flip"]) == (1, False)
    content = out.read_bytes()
    again = command(words, out=out)
    assert "made before" in again.out and "epoch" not in again.out
    assert "made with another" in command(f"{words} --seed 1", out=out).complaint
    assert out.read_bytes() == content
    assert command(f"{words} --seed 1 --overwrite", out=out).code == 0
    assert out.read_bytes() != content


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "inspect {f}/all.safetensors",
        f"eval {{f}}/all.safetensors {NETWORKS} --data digits",
        "cuts {t}",
        f"scan {NETWORKS} --data digits",
        *(f"{name} --help" for name in ("demo", "pretrain", "clone", "scan", "eval", "predict", "inspect", "cuts")),
    ],
)
def test_nothing_on_the_screen_is_wider_than_eighty_columns(command: Command, words: str) -> None:
    found = command(words)
    assert found.code == 0
    assert found.out and not found.err
    assert max(map(len, found.out.splitlines())) <= 80


def test_every_command_takes_json(command: Command) -> None:
    for name in ("demo", "pretrain", "clone", "scan", "eval", "predict", "inspect", "verify", "cuts"):
        assert "--json" in command(f"{name} --help").out


def test_the_command_alone_shows_help_and_the_version(command: Command) -> None:
    alone = command("")
    assert (alone.code, alone.out, alone.err) == (2, "", command("--help").out)
    assert command("--version").out == f"pnc {importlib.metadata.version('pnc')}\n"


def test_class_names_are_shown_as_they_are(command: Command, tmp_path: Path) -> None:
    nets = pair()
    names = ["[red]5[/red]", "6\\", ":cat:", "犬", "9"]
    given = support()
    data = (
        given.images,
        [dict(zip(NEW, names, strict=True)).get(given.names[i], given.names[i]) for i in given.labels],
    )
    named = {"source_classes": names, "base_classes": BASE}
    made = pnc.clone(nets.source.module, nets.target.module, data, effort="seconds", **named)
    pnc.save(made, tmp_path / "c")
    assert "[red]5[/red], 6\\, :cat:, 犬, 9" in command("inspect {c}", c=tmp_path / "c").out


def test_the_number_of_threads_comes_back(command: Command, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    words = f"eval {{f}}/all.safetensors {NETWORKS} --data digits --threads {before + 1}"
    assert command(words).code == 0
    assert torch.get_num_threads() == before


def test_a_stopped_command_says_so(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining, "pretrain", stop)
    found = command("pretrain zoo:cnn --data digits --out {out}", out=tmp_path / "n.safetensors")
    assert found.code == 130
    assert found.err == "pnc: stopped\n"


# --------------------------------------------------------------------------------------------------- bad input
CLONE = f"clone {NETWORKS} --data digits --out {{d}}/c "
EVAL = f"eval {{f}}/all.safetensors {NETWORKS} --data digits "


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (CLONE + "--classes 5,x", "there is no class 'x'; there are 5, 6, 7, 8, 9"),
        (CLONE + "--classes 5,4", "there is no class '4'; there are 5, 6, 7, 8, 9"),
        (CLONE + "--source-classes 4,6,7,8,9 --classes 4,6", "target knows 4 already"),
        (CLONE + "--source-classes 0,1,2,3,4", "target knows every class"),
        (CLONE + "--source-classes a,b,c,d,e", "asks for 20 images of class 'a', but the data has 0"),
        (CLONE + "--source-classes 5,6", "--source-classes: 2 names given for the 5 outputs"),
        (CLONE + "--target-classes 0,1,2,3,3", "--target-classes: 3 given twice"),
        (CLONE + "--support 20", "support: expected NEW/BASE"),
        (CLONE + "--support 0/5", "support: expected NEW/BASE"),
        (CLONE + "--support 500/5", "support: 500/5 asks for 500 images of class '5', but the data has 13"),
        (CLONE + "--support 20/500", "asks for 500 images of class '0'"),
        (CLONE + "--density 0", "--density: expected a share"),
        (CLONE + "--density 1.5", "density"),
        (CLONE + "--density much", "density"),
        (CLONE + "--method best", "method"),
        (CLONE + "--max-macs 0.0001", "--max-macs 0.0001: the cheapest clone, at density [0-9.]+, adds"),
        (CLONE + "--max-macs 0.0001 --density 0.5", "--max-macs 0.0001: at density 0.5 the cheapest position adds"),
        (CLONE + "--max-bytes 13000 --density 0.5 --tune none", "--max-bytes 13000: the file of a part of density"),
        (CLONE + "--round-to 1024 --density 0.5", "--round-to 1024: at density 0.5 not even so few channels"),
        (CLONE + "--prefer small --density 0.5", "--prefer: 'small' chooses the density, which --density 0.5 fixes"),
        (CLONE + "--seed -1", "seed"),
        (CLONE + "--tune all", "tune"),
        (CLONE + "--prefer big", "prefer"),
        (CLONE + "--effort seconds --tune weights", "closed form only, but --tune 'weights' trains by gradient"),
        (CLONE + "--threads 0", "threads"),
        (CLONE + "--device gpu", "device: 'gpu' cannot be used here.*try cpu"),
        (CLONE + "--device meta", "device: 'meta' cannot be used here"),
        (CLONE + "--devise cpu", "devise"),
        (CLONE + "--json {d}/no/facts.json", "json: cannot write .*no/facts.json: .*; choose a folder that exists"),
        (CLONE + "--json {d}", "json: .* is a folder"),
        (CLONE + "--json {d}/c", "json: .* given for something else"),
        (f"clone {NETWORKS} --data digits --out {{d}}/no/c", "out: cannot write .*no/c"),
        (f"clone {NETWORKS} --data digits --out {{t}}", "out: .*t.safetensors is given for something else"),
        (f"clone {NETWORKS} --data numbers --out {{d}}/c", "'numbers' is of an unknown kind; expected one of digits"),
        (f"clone {NETWORKS} --data folder:{{d}}/no --out {{d}}/c", "there is no folder"),
        (f"clone {NETWORKS} --data parquet:{{d}}/no --out {{d}}/c", "there is no file or folder"),
        (
            f"clone {NETWORKS} --data digits --out {{d}}/c --strategy sequential --refine",
            "'sequential' does not support",
        ),
        ("scan --source {t} --target {t} --data digits", "same network"),
        (
            f"scan {NETWORKS} --data digits --plot {{d}}/a.jpg",
            "plot: expected a PNG file, with a name that ends in .png",
        ),
        (
            f"scan {NETWORKS} --data digits --max-bytes 100",
            "--max-bytes 100: the smallest file is estimated at up to [0-9]+ bytes; allow",
        ),
        ("clone --source {t} --target {t} --data digits --out {d}/c", "same network"),
        ("clone --source zoo:cnn --source-weights {t} --target {t} --data digits --out {d}/c", "same network"),
        ("clone --source {f}/../{f.name}/t.safetensors --target {t} --data digits --out {d}/c", "same network"),
        ("clone --source py:a:b --target py:a:b --data digits --out {d}/c", "same network, py:a:b"),
        ("clone --source zoo:cnn --target {t} --data digits --out {d}/c", "zoo:cnn has random weights"),
        ("clone --source {d}/no.safetensors --target {t} --data digits --out {d}/c", "--source: .*no file"),
        ("clone --source {f}/all.safetensors --target {t} --data digits --out {d}/c", "--source: .*not a network"),
        (
            "clone --source {s} --target zoo:cnn --target-weights {d}/no.pt --data digits --out {d}/c",
            "--target(-weights)?: .*no file",
        ),
        (
            "clone --source zoo:cnn?width=0.5 --source-weights {s} --target {t} --data digits --out {d}/c",
            "--source-weights: they do not fit the network",
        ),
        ("clone --target {t} --data digits --out {d}/c", "source"),
        (f"eval {{f}}/five.safetensors {{f}}/all.safetensors {NETWORKS} --data digits", "class '5' already"),
        (f"eval {{f}}/five.safetensors {{f}}/five.safetensors {NETWORKS} --data digits", "named 'five' is attached"),
        (EVAL + "--source {s} --source {s}", "one for all 1 clones or one for each; got 3"),
        (EVAL + "--target-classes a,b,c,d,e", "target-classes: .* calls the target's outputs 0, 1, 2, 3, 4"),
        ("eval {f}/all.safetensors --source {t} --target {t} --data digits", "made from another source"),
        ("eval {f}/all.safetensors --source {s} --target {s} --data digits", "made for another target"),
        ("eval {t} --source {s} --target {t} --data digits", "not a clone file"),
        ("eval {d}/no --source {s} --target {t} --data digits", "there is no file"),
        (EVAL + "--json {d}/no/e.json", "cannot write"),
        (EVAL + "--json {f}/all.safetensors", "given for something else"),
        (
            f"eval {{f}}/all.safetensors {NETWORKS} --data folder:{{f}}/images?size=16",
            "images are 1x16x16.*takes 1x8x8",
        ),
        (f"eval {{f}}/all.safetensors {NETWORKS} --data folder:{{f}}/images?channels=3", "images are 3x8x8"),
        (f"predict {{d}}/no.png --clone {{f}}/all.safetensors {NETWORKS}", "there is no file .*no.png"),
        (f"predict {{t}} --clone {{f}}/all.safetensors {NETWORKS}", "pnc: images: "),
        (f"predict {{f}}/images/test/0/0.png {NETWORKS}", "clone"),
        ("inspect {d}/no", "there is no file"),
        ("verify {d}/no --target {t}", "file: there is no file"),
        ("verify {f}/all.safetensors --target zoo:cnn", "zoo:cnn has random weights"),
        ("verify {f}/all.safetensors --target {d}/no.safetensors", "--target(-weights)?: .*no file"),
        ("verify {f}/all.safetensors --target {t} --json {t}", "given for something else"),
        ("verify {f}/all.safetensors", "target"),
        ("inspect {f}", "not a complete safetensors file"),
        ("cuts zoo:cnn", "--input-shape: "),
        ("cuts zoo:cnn --classes a,b", "--input-shape: "),
        ("cuts zoo:cnn --classes a,b --input-shape 8", "input-shape: expected channels,height,width"),
        ("cuts zoo:nothing --classes a,b --input-shape 1,8,8", "no reference network 'nothing'"),
        ("cuts py:nothing:here --classes a,b --input-shape 1,8,8", "^pnc: model: cannot import nothing"),
        ("cuts py:math:sqrt --classes a,b --input-shape 1,8,8", "sqrt in math: missing.*takes no arguments"),
        ("cuts zoo:vit_tiny?patch=5 --classes a,b --input-shape 1,8,8", "model: "),
        ("pretrain zoo:nothing --data digits --out {d}/n.safetensors", "no reference network 'nothing'"),
        ("pretrain zoo:cnn --data digits --out {d}/n.bin", "ends in .safetensors"),
        ("pretrain zoo:cnn --data digits --out {d}/no/n.safetensors", "out: cannot write"),
        ("pretrain zoo:cnn --data digits --out {d}/n.safetensors --epochs 0", "epochs"),
        ("pretrain zoo:cnn --data digits --out {d}/n.safetensors --classes 3-12", "there is no class '10'"),
        ("demo --json {d}/no/demo.json", "json: cannot write"),
        ("demo --threads 0", "threads"),
        ("dance", "dance"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(command: Command, tmp_path: Path, words: str, complaint: str) -> None:
    found = command(words, d=tmp_path).complaint
    assert re.search(complaint, found), found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        "clone --source {s} --target {t} --data digits --out {d}/no/c",
        "clone --source {s} --target {t} --data digits --out {d}/c --json {d}/no/c.json",
        "clone --source {s} --target {t} --data digits --out {d}/c --device gpu",
        "clone --source {s} --target {t} --data digits --out {d}/c --support some",
        "clone --source {t} --target {t} --data digits --out {d}/c",
        "pretrain zoo:cnn --data digits --out {d}/no/n.safetensors",
        "pretrain zoo:cnn --data digits --out {d}/n.safetensors --json {d}/no/n.json",
        "eval {f}/all.safetensors --source {s} --target {t} --data digits --json {d}/no/n.json",
        "eval {t} --source {s} --target {t} --data digits",
        "demo --json {d}/no/n.json",
    ],
)
def test_what_can_be_known_at_once_is_refused_before_any_work(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    def work(*arguments: Any, **settings: Any) -> None:
        pytest.fail("work was done first")

    for module, name in (
        (making_commands, "load_data"),
        (clone_commands, "load_data"),
        (arguments, "load_model"),
        (app.demonstration, "run_demo"),
    ):
        monkeypatch.setattr(module, name, work)
    assert command(words, d=tmp_path).complaint


def test_a_network_that_cannot_take_the_images_is_named(command: Command, files: Path, tmp_path: Path) -> None:
    words = f"clone {NETWORKS} --out {{d}}/c --effort seconds --data folder:{files / 'images'}?train=test&"
    assert "images are 1x16x16, but zoo:cnn takes 1x8x8" in command(words + "size=16", d=tmp_path).complaint
    assert "images are 3x8x8" in command(words + "channels=3", d=tmp_path).complaint
    assert list(tmp_path.iterdir()) == []


def test_a_support_with_a_class_missing_is_refused_unless_it_is_a_base_class_of_none(
    command: Command, tmp_path: Path
) -> None:
    new = write_images(tmp_path / "new", "train", NEW, 12)
    words = f"clone {NETWORKS} --data folder:{new} --out {tmp_path / 'c'} --effort seconds --support"
    assert "10/5 asks for 5 images of class '0', but the data has 0; it has images of 5, 6" in (
        command(f"{words} 10/5").complaint
    )
    assert command(f"{words} 10/0").code == 0, "images of the base classes are not needed"
    (tmp_path / "c").unlink()
    some = write_images(tmp_path / "some", "train", NEW[:-1], 12)
    words = f"clone {NETWORKS} --data folder:{some} --out {tmp_path / 'c'} --effort seconds --support 10/0"
    assert "of class '9', but the data has 0" in command(words).complaint
    assert not (tmp_path / "c").exists()


def damaged(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Callable[[Path, Path], None]:
    def write(original: Path, path: Path) -> None:
        tensors, facts = read_tensors(original)
        change(tensors, facts)
        write_tensors(path, tensors, facts)

    return write


@pytest.mark.parametrize(
    ("write", "complaint"),
    [
        (lambda original, path: path.write_bytes(original.read_bytes()[:-100]), "not a complete safetensors file"),
        (lambda original, path: path.write_bytes(original.read_bytes()[:4]), "not a complete safetensors file"),
        (lambda original, path: path.write_bytes(b""), "not a complete safetensors file"),
        (lambda original, path: path.write_text("PK not a clone"), "not a complete safetensors file"),
        (lambda original, path: save_file({"a": torch.zeros(2)}, path), "no metadata of pnc"),
        (damaged(lambda tensors, facts: facts.update(version=99)), "format version 99.*newer"),
        (damaged(lambda tensors, facts: facts.pop("base_classes")), "metadata of .* is damaged"),
        (damaged(lambda tensors, facts: facts.pop("target")), "metadata of .* is damaged"),
    ],
)
def test_damaged_foreign_and_newer_clone_files_are_refused_by_every_command(
    command: Command, files: Path, tmp_path: Path, write: Callable[[Path, Path], None], complaint: str
) -> None:
    write(files / "all.safetensors", tmp_path / "c")
    for words in (
        "inspect {c}",
        f"eval {{c}} {NETWORKS} --data digits",
        f"predict {{f}}/images/test/0/0.png --clone {{c}} {NETWORKS}",
    ):
        found = command(words, c=tmp_path / "c").complaint
        assert re.search(complaint, found), found


@pytest.mark.parametrize("part", ["recipe", "position", "classes", "name"])
def test_inspect_refuses_metadata_with_a_part_missing(command: Command, files: Path, tmp_path: Path, part: str) -> None:
    damaged(lambda tensors, facts: facts.pop(part))(files / "all.safetensors", tmp_path / "c")
    assert "metadata of" in command("inspect {c}", c=tmp_path / "c").complaint


def test_the_same_network_under_two_paths_is_recognized(command: Command, files: Path, tmp_path: Path) -> None:
    (tmp_path / "link.safetensors").symlink_to(files / "t.safetensors")
    os.link(files / "t.safetensors", tmp_path / "hard.safetensors")
    for other in ("link", "hard"):
        words = f"clone --source {{d}}/{other}.safetensors --target {{t}} --data digits --effort seconds --out {{d}}/c"
        assert "same network" in command(words, d=tmp_path).complaint


def test_a_clone_of_a_wider_source_is_refused_for_another_one(command: Command, tmp_path: Path) -> None:
    save_model(network(NEW, "zoo:cnn?width=0.5"), tmp_path / "narrow.safetensors", {})
    words = "eval {f}/all.safetensors --source {d}/narrow.safetensors --target {t} --data digits"
    assert "another architecture" in command(words, d=tmp_path).complaint


# --------------------------------------------------------------------------------------------------- proof
def test_verify_proves_a_clone_on_its_networks(command: Command, tmp_path: Path) -> None:
    facts = command.facts(f"verify {{f}}/all.safetensors {NETWORKS}", tmp_path / "v.json")
    assert facts["ok"] is True
    assert [check["what"] for check in facts["checks"]] == ["file", "names", "target", "source", "attached", "detached"]
    assert all(check["ok"] for check in facts["checks"])
    found = command(f"verify {{f}}/all.safetensors {NETWORKS}")
    assert (found.code, found.err) == (0, "")
    assert "all equal, bit for bit: 40 base logits, 1 fingerprint, " in " ".join(found.out.split())
    assert found.out.splitlines()[-1] == f"verified: {command.folder / 'all.safetensors'}"


def test_verify_without_source_checks_file_and_target(command: Command, tmp_path: Path) -> None:
    facts = command.facts("verify {f}/two.safetensors --target {t}", tmp_path / "v.json")
    assert [check["what"] for check in facts["checks"]] == ["file", "names", "target", "source"]
    assert facts["ok"] and "not given" in facts["checks"][-1]["found"]


def test_verify_says_in_one_line_what_is_wrong(command: Command, files: Path, tmp_path: Path) -> None:
    def failed(words: str, **places: Any) -> str:
        found = command(f"{words} --json {tmp_path / 'v.json'}", d=tmp_path, **places)
        assert (found.code, found.err) == (1, "")
        facts = json.loads((tmp_path / "v.json").read_text())
        assert facts["ok"] is False and [check["ok"] for check in facts["checks"]].count(False) == 1
        last = found.out.splitlines()[-1]
        assert last == f"FAILED: {facts['checks'][-1]['what']}: {facts['checks'][-1]['found']}"
        return last

    tensors, facts = read_tensors(files / "t.safetensors")
    tensors["classifier.bias"][0] += 1
    write_tensors(tmp_path / "t.safetensors", tensors, facts)
    all_of = "verify {f}/all.safetensors --source {s}"
    assert failed(f"{all_of} --target {{d}}/t.safetensors") == (
        "FAILED: target: another network: the values of 'classifier.bias' differ"
    )
    assert "FAILED: source: another network: " in failed("verify {f}/all.safetensors --target {t} --source {t}")
    save_model(network(BASE, "zoo:cnn?width=0.5"), tmp_path / "narrow.safetensors", {})
    assert "another architecture: '" in failed(f"{all_of} --target {{d}}/narrow.safetensors")
    whole = (files / "all.safetensors").read_bytes()
    (tmp_path / "c").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "FAILED: file: " in failed("verify {d}/c --target {t}")


def test_verify_finds_a_composite_that_changes_its_target(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    detach = pnc.Composite.detach

    def spoil(net: pnc.Composite, name: str) -> Any:
        net.target.get_parameter("classifier.bias").requires_grad_(False)
        return detach(net, name)

    monkeypatch.setattr(pnc.Composite, "detach", spoil)
    found = command(f"verify {{f}}/all.safetensors {NETWORKS}")
    assert found.code == 1
    assert found.out.splitlines()[-1] == "FAILED: detached: requires_grad of classifier.bias changed"


def test_weights_that_are_not_numbers_are_refused(command: Command, files: Path, tmp_path: Path) -> None:
    tensors, facts = read_tensors(files / "s.safetensors")
    name = next(name for name in tensors if name.endswith("weight"))
    tensors[name][0] = float("nan")
    write_tensors(tmp_path / "s.safetensors", tensors, facts)
    words = "clone --source {d}/s.safetensors --target {t} --data digits --out {d}/c"
    assert f"--source: {name} contain NaN" in command(words, d=tmp_path).complaint
    assert not (tmp_path / "c").exists()
