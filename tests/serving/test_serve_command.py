"""The command `pnc serve`: it starts, keeps what was attached, answers what is queued when it is stopped."""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time

import pytest

import pnc
import small_pair
from pnc.cli import app
from running_server import TOKEN, clone_file, image_bytes

IMAGES = image_bytes(4)
NET = """
import sys
sys.path.insert(0, {tests!r})
import small_pair


def target():
    return small_pair.target()


def source():
    return small_pair.source()
"""


@pytest.fixture
def folder(tmp_path):
    from pathlib import Path

    (tmp_path / "nets.py").write_text(NET.format(tests=str(Path(__file__).parents[1])))
    (tmp_path / "dog.safetensors").write_bytes(clone_file("dog"))
    return tmp_path


def words(folder, *more):
    spec = f"py:{folder / 'nets.py'}"
    names = ["--target-classes", ",".join(small_pair.BASE), "--source-classes", ",".join(small_pair.NEW)]
    given = ["--target", f"{spec}:target", "--source", f"{spec}:source", *names, "--input-shape", "1,8,8"]
    return [sys.executable, "-m", "pnc", "serve", *given, "--port", "0", "--threads", "1", *more]


@contextlib.contextmanager
def started(folder, *more):
    """A server in a process of its own, and its URL."""
    environment = {**os.environ, "PNC_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        words(folder, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
    )
    try:
        ready, _, _ = select.select([process.stdout], [], [], 60)
        line = process.stdout.readline() if ready else ""
        found = re.match(r"(http://127\.0\.0\.1:\d+): serving; clones: (.*)", line)
        if found is None:
            process.kill()
        assert found is not None, process.communicate()[1]
        yield process, found[1], found[2]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_it_serves_stops_gracefully_and_keeps_its_clones(folder):
    state = str(folder / "state")
    with started(folder, "--state", state, "--clone", "dog.safetensors", "--wait-ms", "300") as (process, url, clones):
        assert clones == "dog"
        (folder / "elk.safetensors").write_bytes(clone_file("elk"))
        with pnc.Client(url, TOKEN) as client:
            client.attach("second", folder / "elk.safetensors")
            assert client.predict(IMAGES[0])[0].probabilities.keys() == {*small_pair.BASE, "dog", "elk"}
            answers = []
            asking = threading.Thread(target=lambda: answers.append(client.predict(IMAGES[:2])))
            asking.start()
            time.sleep(0.15)  # it waits for others now
            process.send_signal(signal.SIGTERM)
            asking.join(10)
        assert [len(one) for one in answers] == [2], "what is queued is answered"
        assert process.wait(10) == -signal.SIGTERM
        assert process.stderr.read() == ""
    with started(folder, "--state", state) as (_, _, clones):
        assert clones == "second"


def run(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pnc", *arguments])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--batch", "0"], "--batch"),
        (["--mean", "x"], "--mean: expected numbers separated by commas"),
        (["--mean", ".5,.5"], "--mean: expected one number, or one for each of 1 channels"),
        (["--max-body", "inf"], "--max-body: expected a finite number"),
        (["--state", "short"], "--state: cannot use short: File exists; give another folder"),
        (["--watch", "nowhere"], "--watch: there is no folder nowhere"),
        (["--token-file", "short"], "--token-file: expected at least 8 printable ASCII characters"),
        (["--clone", "nets.py"], "nets.py"),
        (["--clone", "missing.safetensors"], "--clone: missing.safetensors cannot be read"),
    ],
)
def test_wrong_options_are_one_line(more, text, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "short").write_text("abc")
    code, error = run(words(folder, *more)[3:], monkeypatch, capsys)
    assert code == 2 and text in error and len(error.splitlines()) <= 2


def test_a_short_token_of_the_environment_is_named(folder, monkeypatch, capsys):
    monkeypatch.setenv("PNC_TOKEN", "abc")
    code, error = run(words(folder)[3:], monkeypatch, capsys)
    assert code == 2 and "PNC_TOKEN: expected at least 8" in error


def test_missing_packages_name_the_extra(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    code, error = run(words(folder)[3:], monkeypatch, capsys)
    assert code == 2 and 'pip install "pnc[serve]"' in error


def test_the_command_line_loads_no_server(tmp_path):
    script = (
        "import sys, pnc.cli.app, pnc; pnc.Client; "
        "assert not {'fastapi', 'uvicorn', 'httpx', 'prometheus_client'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
