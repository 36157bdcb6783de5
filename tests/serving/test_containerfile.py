"""The Containerfile agrees with pyproject.toml, the constraints and `pnc serve`; nothing is built here."""

import importlib
import json
import re
import tomllib
from pathlib import Path

import typer.main

from pnc.cli.app import app

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "Containerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def value(word: str) -> str:
    (found,) = re.findall(rf"^{word} (.*)$", LINES, re.MULTILINE)
    return str(found)


def test_what_is_copied_is_there_and_enough_to_build_the_package():
    copied = [path for words in re.findall(r"^COPY (.*) \S+$", LINES, re.MULTILINE) for path in words.split()]
    assert all((ROOT / path).exists() for path in copied)
    assert {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "src", "constraints.txt"} == set(copied)
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_the_extra_and_the_python_are_those_of_the_package():
    assert re.findall(r'"\.\[(\w+)\]"', LINES) == ["serve"] and "serve" in PROJECT["optional-dependencies"]
    python = re.match(r"python:3\.(\d+)-slim", value("FROM"))
    assert python is not None and int(python[1]) >= int(PROJECT["requires-python"].removeprefix(">=3."))


def test_the_entrypoint_is_a_command_whose_options_parse():
    program, name, *words = json.loads(value("ENTRYPOINT"))
    module, function = PROJECT["scripts"][program].split(":")
    assert callable(getattr(importlib.import_module(module), function))
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined] # it is a group
    asked = [*words, "--target", "/networks/target.safetensors"]
    given = command.make_context(name, asked).params
    assert (given["host"], given["state"]) == ("0.0.0.0", Path("/clones"))
    assert str(given["port"]) == value("EXPOSE") and f"127.0.0.1:{given['port']}/ready" in value("HEALTHCHECK CMD")
    assert value("VOLUME") == str(given["state"])


def test_the_user_owns_the_state_before_it_is_a_volume():
    made = re.search(r"useradd --create-home (\w+) && mkdir (\S+) && chown (\w+) (\S+)", LINES)
    assert made is not None and made.groups() == (value("USER"), value("VOLUME"), value("USER"), value("VOLUME"))
    assert LINES.index(made[0]) < LINES.index("\nUSER ") < LINES.index("\nVOLUME ") < LINES.index("\nENTRYPOINT ")
    assert f"WORKDIR /home/{value('USER')}" in LINES
