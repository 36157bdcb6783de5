"""Numbers out of range, odd environments and broken streams: one line and exit code 2, or 130 for Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pnc
from digits import NEW, pair, support, write_images
from pnc.models.model_specs import save_model

HUGE = "9" * 5000


def environment(**changes):
    return {**os.environ, "OMP_NUM_THREADS": "1", **changes}


def pnc_command(*words, **settings):
    """Run `pnc` in a process of its own."""
    settings = {"capture_output": True, "timeout": 120, "env": environment(), **settings}
    return subprocess.run([sys.executable, "-m", "pnc", *map(str, words)], check=False, **settings)


def complaint(run):
    text = run.stderr.decode()
    assert run.returncode == 2, text
    assert text.count("\n") == 1 and text.startswith("pnc: ") and len(text) < 2500, text
    return text


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, nets = tmp_path_factory.mktemp("files"), pair()
    save_model(nets.target, folder / "t.safetensors", {})
    save_model(nets.source, folder / "s.safetensors", {})
    made = pnc.clone(nets.source.module, nets.target.module, support(), **nets.names(), name="all")
    pnc.save(made, folder / "all.safetensors")
    write_images(folder / "images", "test", ("0", "7"), 2)
    return folder


@pytest.fixture
def in_process(monkeypatch, capsys):
    from pnc.cli import app

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["pnc", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            app.main()
        return stopped.value.code, *capsys.readouterr()

    return run


def refused(found):
    code, _, err = found
    assert code == 2 and err.count("\n") == 1 and err.startswith("pnc: ") and len(err) < 2500, (code, err)
    return err


NUMBERS = [
    (["--max-macs", "inf"], "--max-macs: expected a share"),
    (["--max-macs", "50"], "percent? write 0.5"),
    (["--max-macs", "nan"], "--max-macs: expected a share"),
    (["--max-macs", HUGE], "--max-macs: expected a share"),
    (["--max-bytes", HUGE], "max-bytes"),
    (["--max-bytes", "-5"], "--max-bytes: expected a whole number"),
    (["--max-base-drop", "2"], "--max-base-drop: expected a share"),
    (["--density", "50"], "--density: expected a share"),
    (["--density", HUGE], "--density: expected a share"),
    (["--density", "nan"], "--density: expected a share"),
    (["--round-to", HUGE], "round-to"),
    (["--threads", "2147483648"], "threads"),
    (["--seed", "9223372036854775808"], "seed"),
    (["--seed", HUGE], "seed"),
    (["--memory", "inf"], "memory"),
    (["--device", "gpu"], "--device: 'gpu' cannot be used here (torch calls it cuda)"),
    (["--device", "cuda:99"], "--device: 'cuda:99' cannot be used here"),
    (["--name", "a\nb"], "name: expected printable text"),
    (["--strategy", "sequential", "--refine"], "--strategy: 'sequential' does not support"),
]


@pytest.mark.parametrize(("words", "text"), NUMBERS)
def test_numbers_of_clone_are_refused_before_any_image_is_read(files, tmp_path, in_process, monkeypatch, words, text):
    from pnc.cli import making_commands

    def read(*_):
        raise AssertionError("images were read")

    monkeypatch.setattr(making_commands, "load_data", read)
    networks = ["--source", files / "s.safetensors", "--target", files / "t.safetensors"]
    found = refused(in_process("clone", *networks, "--data", "digits", "--out", tmp_path / "c.safetensors", *words))
    assert text in found, found
    assert list(tmp_path.iterdir()) == []


CLONE = "clone --data digits --out {d}/c"
NO_FILE = [
    ("cuts {d}/no.safetensors", "model"),
    ("cuts zoo:cnn --weights {d}/no.pt", "--weights"),
    ("zoo add n --zoo {d}/zoo --model {d}/no.safetensors", "--model"),
    ("zoo add n --zoo {d}/zoo --model zoo:cnn --weights {d}/no.pt", "--weights"),
    (CLONE + " --source {d}/no.safetensors --target {t}", "--source"),
    (CLONE + " --source {s} --target {d}/no.safetensors", "--target"),
    (CLONE + " --source zoo:cnn --source-weights {d}/no.pt --target {t}", "--source-weights"),
    (CLONE + " --source zoo:cnn --source-weights={d}/no.pt --target {t}", "--source-weights"),
    ("serve --target {d}/no.safetensors", "--target"),
    ("serve --target {t} --source {d}/no.safetensors", "--source"),
]


@pytest.mark.parametrize(("words", "option"), NO_FILE)
def test_the_option_of_a_missing_file_is_named_once(files, tmp_path, in_process, words, option):
    paths = {"d": tmp_path, "s": files / "s.safetensors", "t": files / "t.safetensors"}
    found = refused(in_process(*words.format(**paths).split()))
    assert re.match(rf"pnc: {option}: there is no file \S+/no\.(safetensors|pt)\n", found), found


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.bin", "x.onnx", "x.ckpt"])
def test_a_clone_is_not_written_under_another_formats_suffix(files, tmp_path, in_process, name):
    networks = ["--source", files / "s.safetensors", "--target", files / "t.safetensors"]
    found = refused(in_process("clone", *networks, "--data", "digits", "--out", tmp_path / name))
    assert "--out: clone files are safetensors" in found and "write x.safetensors" in found
    made = pnc.load(files / "all.safetensors", source=pair().source.module)
    with pytest.raises(pnc.InputError, match="write x.safetensors"):
        pnc.save(made, tmp_path / name)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--lr", "inf"], "--lr: expected a number from 1e-09 to 1000; got inf"),
        (["--lr", "nan"], "--lr: expected a number"),
        (["--lr", HUGE], "--lr: expected a number"),
        (["--weight-decay", "inf"], "--weight-decay: expected a number"),
        (["--epochs", HUGE], "epochs"),
        (["--epochs", "99999999999"], "--epochs: expected a number"),
        (["--batch-size", "1"], "--batch-size: expected a number"),
        (["--threads", "2147483648"], "threads"),
    ],
)
def test_numbers_of_pretrain_are_refused(tmp_path, in_process, words, text):
    found = refused(in_process("pretrain", "zoo:cnn", "--data", "digits", "--out", tmp_path / "n.safetensors", *words))
    assert text in found, found


def test_the_largest_seed_is_written_too(tmp_path):
    nets = pair()
    made = pnc.clone(nets.source.module, nets.target.module, support(5, 2), seed=2**63 - 1, **nets.names())
    pnc.save(made, tmp_path / "c")
    assert pnc.inspect(tmp_path / "c")["recipe"]["seed"] == 2**63 - 1


@pytest.mark.parametrize("value", ["abc", "", "-1", "2.5", "9" * 30])
def test_a_launch_with_a_strange_number_of_processes_is_refused(files, in_process, monkeypatch, tmp_path, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    networks = ["--source", files / "s.safetensors", "--target", files / "t.safetensors"]
    found = refused(in_process("clone", *networks, "--data", "digits", "--out", tmp_path / "c"))
    assert f"the environment variable WORLD_SIZE is {value!r}, expected a whole number" in found


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("def make():\n    raise KeyError('weights')\n", "raised KeyError: 'weights'"),
        ("def make():\n    return 1 / 0\n", "raised ZeroDivisionError: division by zero"),
        ("raise ValueError('two\\nlines')\n", "it raised ValueError: two lines"),
        ("import torch\nmake = torch.nn.Linear\nundefined\n", "it raised NameError"),
    ],
)
def test_user_code_that_raises_is_one_line(tmp_path, in_process, code, text):
    (tmp_path / "mine.py").write_text(code)
    assert text in refused(in_process("cuts", f"py:{tmp_path / 'mine.py'}:make", "--input-shape", "1,8,8"))


def test_names_that_a_terminal_cannot_show_are_still_written(files, tmp_path):
    nets = pair()
    names = ["🐈", "犬", "ñ", *NEW[3:]]
    given = support()
    known = dict(zip(NEW, names, strict=True))
    data = (given.images, [known.get(given.names[i], given.names[i]) for i in given.labels])
    made = pnc.clone(
        nets.source.module, nets.target.module, data, source_classes=names, base_classes=nets.target.classes
    )
    pnc.save(made, tmp_path / "c")
    for encoding in ("latin-1", "ascii", "cp1252"):
        run = pnc_command("inspect", tmp_path / "c", env=environment(PYTHONIOENCODING=encoding))
        assert run.returncode == 0, run.stderr
        assert encoding == "ascii" or b"\\U0001f408, \\u72ac" in run.stdout  # ASCII output is written as UTF-8
        run = pnc_command("inspect", tmp_path / "犬", env=environment(PYTHONIOENCODING=encoding))
        assert "there is no file" in complaint(run)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has such a device")
def test_a_full_device_is_one_line(files):
    for words in (["--version"], ["inspect", files / "all.safetensors"], ["cuts", files / "t.safetensors"]):
        with Path("/dev/full").open("w") as full:
            run = pnc_command(*words, capture_output=False, stdout=full, stderr=subprocess.PIPE)
        assert "No space left on device" in complaint(run)


WAITS = """
import os, sys, time

def wait(event, arguments):
    if event == "import" and arguments[0] == os.environ["WAIT_AT"]:
        os.write(int(os.environ["TELL"]), b"!")
        time.sleep(600)

sys.addaudithook(wait)
"""


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is not a signal that can be sent to one process")
@pytest.mark.parametrize("module", ["pnc.cli.app", "typer", "torch", "torch.fx", "pnc.cli.network_commands"])
def test_ctrl_c_while_the_command_loads_is_one_line(files, tmp_path, module):
    (tmp_path / "sitecustomize.py").write_text(WAITS)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    here, there = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "pnc", "cuts", files / "t.safetensors", "--json", "-"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(PYTHONPATH=path, WAIT_AT=module, TELL=str(there)),
        pass_fds=[there],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # background jobs ignore it
    )
    os.close(there)
    with os.fdopen(here, "rb", buffering=0) as told:
        assert told.read(1) == b"!", "it never imported the module"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"pnc: stopped\n")


# --------------------------------------------------------------------------------------------------- what is offered
def test_json_goes_to_standard_output_alone(files, in_process):
    code, out, err = in_process("inspect", files / "all.safetensors", "--json", "-")
    assert (code or 0, err) == (0, "") and json.loads(out)["name"] == "all"
    code, out, err = in_process("cuts", files / "t.safetensors", "--json", "-")
    assert json.loads(out)["cuts"]
    code, out, err = in_process("inspect", files / "all.safetensors")
    assert out.startswith("name"), "the next command shows lines again"


def predicted(found):
    code, out, err = found
    assert not code, err
    return [Path(one["image"]).name for one in json.loads(out)["predictions"]]


def test_predict_takes_folders_patterns_and_standard_input(files, in_process, monkeypatch):
    import io

    images = files / "images" / "test"
    rest = ["--clone", files / "all.safetensors", "--source", files / "s.safetensors", "--json", "-"]
    rest += ["--target", files / "t.safetensors"]
    assert predicted(in_process("predict", images, *rest)) == ["0.png", "1.png"] * 2
    assert predicted(in_process("predict", images / "7", images / "7" / "0.png", *rest)) == ["0.png", "1.png"]
    assert predicted(in_process("predict", f"{images}/*/1.png", *rest)) == ["1.png", "1.png"]
    (image,) = images.glob("7/0.png")

    def given(content):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return in_process("predict", "-", *rest)

    assert predicted(given(image.read_bytes())) == ["-"]
    assert predicted(given(f"{image}\n{images / '0'}\n".encode())) == ["0.png", "0.png", "1.png"]
    assert "standard input is empty" in refused(given(b""))
    assert "there is no file nowhere.png" in refused(given(b"nowhere.png\n"))
    assert "no file matches" in refused(in_process("predict", f"{images}/*.tiff", *rest))
    (files / "empty").mkdir(exist_ok=True)
    assert "there is no image in" in refused(in_process("predict", files / "empty", *rest))


def test_cuts_need_no_names(tmp_path, in_process):
    code = "from pnc.models.reference_networks import cnn\n\n\ndef make():\n    return cnn((1, 8, 8), 7)\n"
    (tmp_path / "mine.py").write_text(code)
    for words in (["zoo:resnet20"], [f"py:{tmp_path / 'mine.py'}:make"], ["zoo:cnn", "--classes", "a,b"]):
        code, out, err = in_process("cuts", *words, "--input-shape", "1,8,8", "--json", "-")
        assert not code, err
        assert json.loads(out)["cuts"]


def test_the_command_without_words_is_an_error_with_help(in_process):
    for words in ([], ["bench"]):
        code, out, err = in_process(*words)
        assert code == 2 and "Usage:" in out + err


def test_messages_name_options(files, tmp_path, in_process):
    networks = ["--source", files / "s.safetensors", "--target", files / "t.safetensors"]
    out = ["--out", tmp_path / "c"]
    for words, text in (
        (["--data", "numbers"], "pnc: --data: 'numbers' is of an unknown kind"),
        (["--data", "folder:nowhere"], "pnc: --data: "),
        (["--data", "digits", "--background", "folder:nowhere"], "pnc: --background: "),
        (["--data", "digits", "--support", "20"], "pnc: --support: expected NEW/BASE"),
        (["--data", "digits", "--classes", "x"], "pnc: --classes: there is no class 'x'"),
        (["--data", "digits", "--source-classes", "a,b"], "pnc: --source-classes: 2 names given"),
        (["--data", "digits", "--target-classes", "a,a,b,c,d"], "pnc: --target-classes: a given twice"),
        (["--data", "digits", "--json", tmp_path], "pnc: --json: "),
    ):
        assert text in refused(in_process("clone", *networks, *out, *words)), words


@pytest.mark.skipif(os.name != "posix", reason="a shell closes standard output")
def test_a_closed_standard_output_is_no_error():
    command = f"{sys.executable} -m pnc --version >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)  # noqa: S603, S607
    assert (done.returncode, done.stderr) == (0, "")
