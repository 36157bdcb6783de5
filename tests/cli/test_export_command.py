"""`pnc export` as a user sees it: files, lines, exit codes."""

import json
import sys

import pytest
import torch

import pnc
from digits import NEW, held_out_images, pair, support
from pnc.cli import app
from pnc.composite import program_files
from pnc.models.model_specs import save_model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A target, a source and two clones."""
    folder, nets = tmp_path_factory.mktemp("files"), pair()
    save_model(nets.target, folder / "t.safetensors", {})
    save_model(nets.source, folder / "s.safetensors", {})
    for name, classes in (("five", NEW[:1]), ("two", NEW[1:3])):
        made = pnc.clone(
            nets.source.module,
            nets.target.module,
            support(classes=classes),
            classes=classes,
            name=name,
            effort="seconds",
            **nets.names(),
        )
        pnc.save(made, folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def run(files, monkeypatch, capsys):
    """Run `pnc export FIVE TWO ...` with these words; returns the exit code and both streams."""

    def command(*words):
        clones = [str(files / f"{name}.safetensors") for name in ("five", "two")]
        networks = ["--source", str(files / "s.safetensors"), "--target", str(files / "t.safetensors")]
        monkeypatch.setattr(sys, "argv", ["pnc", "export", *clones, *networks, *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            app.main()
        return stopped.value.code or 0, *capsys.readouterr()

    return command


@pytest.fixture
def complaint(run):
    """Run a command that is to be refused; returns its one line on standard error."""

    def command(*words):
        code, out, err = run(*words)
        assert (code, out) == (2, "") and err.count("\n") == 1
        return err

    return command


def test_a_composite_is_written_and_the_lines_say_so(files, run, tmp_path):
    path, facts_path = tmp_path / "net.pt2", tmp_path / "facts.json"
    code, out, err = run("--out", path, "--json", facts_path)
    assert (code, err) == (0, "")
    facts = json.loads(facts_path.read_text())
    assert facts["classes"] == list("0123456" + "7") and facts["clones"] == ["five", "two"]
    assert facts["files"] == {str(path): path.stat().st_size} and facts["batch_sizes"] == [1, 2, 5]
    assert f"{path}: {path.stat().st_size:,} bytes" in out and "run on batches of 1, 2, 5: logits differ" in out
    nets, images = pair(), held_out_images().images[:9]
    clones = [pnc.load(files / f"{name}.safetensors", source=nets.source.module) for name in ("five", "two")]
    found = torch.export.load(path).module()(images).detach()
    expected = pnc.attach(nets.target.module, *clones)(images).detach()
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_parts_are_written_into_a_folder(run, tmp_path):
    code, out, _ = run("--out", tmp_path / "parts", "--split")
    assert code == 0 and f"{tmp_path / 'parts' / 'two.onnx'}: " in out
    names = {"trunk.onnx", "five.onnx", "two.onnx"}
    assert {path.name for path in (tmp_path / "parts").iterdir()} == names
    net = pnc.OnnxComposite(*(tmp_path / "parts" / name for name in ("trunk.onnx", "two.onnx")))
    assert net.classes == (*"01234", "6", "7")


def test_wrong_input_is_one_line_before_any_work(complaint, tmp_path, monkeypatch):
    assert f"--out: {tmp_path / 'net.pt'} asks for TorchScript, which torch has deprecated" in complaint(
        "--out", tmp_path / "net.pt"
    )
    assert "--out: expected a file that ends in .onnx or .pt2" in complaint("--out", tmp_path / "net")
    assert "looks like a file; a split export writes several" in complaint("--out", tmp_path / "net.onnx", "--split")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert 'pip install "pnc[export]"' in complaint("--out", tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_refused_export_is_one_line_and_no_file(complaint, tmp_path, monkeypatch):
    monkeypatch.setattr(program_files, "TOLERANCE", -1.0)
    monkeypatch.setattr(program_files, "OWN_ERRORS", -1.0)
    assert "net cannot be exported: on a batch of 1 its logits differ" in complaint("--out", tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())
