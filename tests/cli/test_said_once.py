"""What commands read from `pnc.toml` and the environment; how much they say; the examples in their help."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from test_commands import NETWORKS, Command, command, files  # noqa: F401 # fixtures

from pnc.cli.app import app
from pnc.cli.examples import EXAMPLES
from pnc.cli.said_once import COMMANDS, read_defaults

EVAL = "eval {f}/five.safetensors"


def write(folder: Path, **values: Any) -> None:
    lines = [f"{key} = {value!r}".replace("'", '"') for key, value in values.items()]
    (folder / "pnc.toml").write_text("\n".join(lines) + "\n")


def test_the_file_and_the_environment_stand_for_options(
    command: Command,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = command.facts(f"{EVAL} {NETWORKS} --data digits", tmp_path / "a.json")
    monkeypatch.chdir(tmp_path)
    source, target = (str(command.folder / f"{name}.safetensors") for name in "st")
    write(tmp_path, source=source, target=target, data="digits", threads=1)
    assert command.facts(EVAL, tmp_path / "b.json") == given
    assert command("verify {f}/five.safetensors").code == 0
    monkeypatch.setenv("PNC_TARGET", "nowhere.safetensors")  # before the file
    assert "nowhere.safetensors" in command(EVAL).complaint
    assert command.facts(f"{EVAL} --target {target}", tmp_path / "c.json") == given  # before the environment
    (tmp_path / "pnc.toml").unlink()
    for name, value in (("TARGET", target), ("SOURCE", source), ("DATA", "digits")):
        monkeypatch.setenv(f"PNC_{name}", value)
    assert command.facts(EVAL, tmp_path / "d.json") == given


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("target = ", "pnc.toml: cannot be read: .*; mend or remove it"),
        ('targets = "a"', "pnc.toml: 'targets' is none of target, source, data"),
        ("target = 3", "pnc.toml: target: expected a text, got 3"),
        ('threads = "2"', "pnc.toml: threads: expected a whole number, got '2'"),
        ("threads = true", "pnc.toml: threads: expected a whole number, got True"),
    ],
)
def test_a_wrong_file_is_one_line(
    command: Command,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pnc.toml").write_text(text)
    assert re.search(words, command(EVAL).complaint)
    assert command("inspect {f}/five.safetensors").code == 0, "a command that reads nothing of it does not read it"


def test_names_of_classes_may_be_a_list(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    write(tmp_path, target_classes=["ant", "bee"])
    assert read_defaults(typer.main.get_command(app).commands)["serve"] == {"target_classes": "ant,bee"}  # type: ignore[attr-defined]
    write(tmp_path, target_classes=["ant", "bee, or wasp"])
    assert "target_classes: expected a text, or a list of names without commas" in command(EVAL).complaint


def test_quiet_leaves_errors_and_json(command: Command, tmp_path: Path) -> None:  # noqa: F811
    two = f"{EVAL} {{f}}/two.safetensors {NETWORKS} --data digits"
    quiet = command(f"--quiet {two} --json {tmp_path / 'a.json'}")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "") and (tmp_path / "a.json").is_file()
    assert command(f"-q {two} --json -").out.startswith("{")
    assert "no file" in command(f"--quiet eval nowhere.safetensors {NETWORKS} --data digits").complaint
    loud = command("predict {f}/images --clone {f}/five.safetensors --clone {f}/two.safetensors " + NETWORKS)
    assert "Not calibrated" in loud.err and loud.out, "the next call is not quiet"


def test_verbose_says_what_is_done(command: Command, tmp_path: Path) -> None:  # noqa: F811
    words = f"-v clone {NETWORKS} --data digits --effort seconds --out {tmp_path / 'c.safetensors'}"
    found = command(words)
    lines = found.err.splitlines()
    assert found.code == 0 and all(line[2] == ":" for line in lines)
    for expected in (
        "recording both networks",
        "scanning positions",
        "making a clone from",
        "held-out score",
        "written",
    ):
        assert any(expected in line for line in lines), expected
    assert command(f"{EVAL} {NETWORKS} --data digits").err == "", "the next call is silent"


def parsed(words: list[str]) -> None:
    """Parse a command line as `pnc` does, without running it."""
    group: Any = typer.main.get_command(app)
    whole = group.make_context("pnc", list(words))
    name, one, rest = group.resolve_command(whole, [*whole._protected_args, *whole.args])
    one.make_context(name, rest, parent=whole)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_help_of_every_command_has_examples_that_can_be_parsed(command: Command, name: str) -> None:  # noqa: F811
    shown = " ".join(command(f"{name} --help").out.split())
    assert "Example" in shown
    for example in EXAMPLES[name]:
        first, *words = shlex.split(example)
        assert first == "pnc" and words[0] == name
        parsed(words)


def test_all_commands_have_examples_and_panels(command: Command) -> None:  # noqa: F811
    group: Any = typer.main.get_command(app)
    assert set(group.commands) - {"bench", "zoo"} == set(EXAMPLES)
    assert set(COMMANDS) <= set(group.commands)
    shown = command("clone --help").out
    assert all(f" {panel} " in shown for panel in ("Networks", "Images", "Part", "Bounds", "Output", "Machine"))
    assert "--install-completion" in command("--help").out
