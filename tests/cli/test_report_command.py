"""`pnc report`, and the report of `pnc demo`."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_commands import NETWORKS, Command, command, files  # noqa: F401 # fixtures

import pnc
from digits import held_out_images, pair
from pnc.bench import demo, main_job
from pnc.bench.rivals.rival import Budget
from pnc.cli import app


def test_it_writes_the_page_that_the_library_writes(command: Command, tmp_path: Path) -> None:  # noqa: F811
    words = f"report {{f}}/all.safetensors {NETWORKS} --data digits -o {{d}}/r.html --png {{d}}/png --json {{d}}/r.json"
    found = command(words, d=tmp_path)
    assert found.code == 0 and f"r.html: written, {(tmp_path / 'r.html').stat().st_size:,} bytes" in found.out
    nets, file = pair(), command.folder / "all.safetensors"
    net = pnc.attach(nets.target.module, pnc.load(file, source=nets.source.module))
    test = held_out_images()
    pnc.write_report(net, replace(pnc.load_data("digits", "test"), classes=test.classes), tmp_path / "o", files=[file])
    assert (tmp_path / "o").read_bytes() == (tmp_path / "r.html").read_bytes()
    facts = json.loads((tmp_path / "r.json").read_text())
    assert facts["average_accuracy"] == pnc.evaluate(net, test).average_accuracy
    assert sorted(path.name for path in (tmp_path / "png").iterdir()) == [
        "calibration.png",
        "leak.png",
        "networks_1.png",
    ]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--out {d}/no/r.html", "out: cannot write"),
        ("--out {d}/r.pdf", "--out: a report is a page of HTML, and r.pdf looks like another format; write .*r.html"),
        ("--out {f}/all.safetensors", "--out: a report is a page of HTML"),
        ("--out {d}/r.html --json {d}/r.html", "is given for"),
        ("--out {d}/r.html --png {t}", "png: .* is a file; give a folder"),
        ("--out {d}/r.html --png {d}/no/png", "png: cannot write"),
        ("--out {d}/r.html --device gpu", "device"),
    ],
)
def test_bad_input_is_one_line(command: Command, tmp_path: Path, words: str, complaint: str) -> None:  # noqa: F811
    found = command(f"report {{f}}/all.safetensors {NETWORKS} --data digits {words}", d=tmp_path).complaint
    assert re.search(complaint, found), found
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_said_before_any_work(
    command: Command,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    found = command(f"report {{d}}/no {NETWORKS} --data no -o {{d}}/r.html", d=tmp_path).complaint
    assert 'report: jinja2 is needed for this; pip install "pnc[report]"' in found


def test_the_help_fits(command: Command) -> None:  # noqa: F811
    assert max(map(len, command("report --help").out.splitlines())) <= 80


def test_the_demo_writes_a_report_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main_job, "BUDGET", Budget(1, 1, 2, 1))
    run: Any = demo.run_demo
    short = replace(demo.RECIPE, epochs=4)
    monkeypatch.setattr(demo, "run_demo", lambda seed, **given: run(seed, short, **given))
    monkeypatch.setattr(sys, "argv", ["pnc", "demo", "--report", str(tmp_path / "demo.html")])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert not stopped.value.code
    shown = capsys.readouterr().out
    assert f"A report on the clone, for your browser: {tmp_path / 'demo.html'}" in shown
    page = (tmp_path / "demo.html").read_text()
    clone = next(line for line in shown.splitlines() if line.startswith("clone "))
    base, new = (100 * float(number) for number in clone.split()[1:3])
    assert all(any(f"{value + off:.1f}%" in page for off in (-0.05, 0, 0.05)) for value in (base, new))
