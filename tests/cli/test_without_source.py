"""Commands on full clone files, which load without the source."""

from pathlib import Path

import pytest
from test_commands import NETWORKS, Command, command, files  # noqa: F401 # fixtures

import pnc
from digits import pair


@pytest.fixture
def full(command: Command, tmp_path: Path) -> Path:  # noqa: F811
    """The full file of a clone."""
    clone = pnc.load(command.folder / "five.safetensors", source=pair().source.module)
    pnc.save(clone, tmp_path / "full.safetensors", "full")
    return tmp_path / "full.safetensors"


def test_they_give_the_same_results_as_with_the_source(command: Command, full: Path, tmp_path: Path) -> None:  # noqa: F811
    for words in ("eval {c} --data digits", "predict {f}/images --clone {c}"):
        alone = command.facts(f"{words} --target {{t}}", tmp_path / "a.json", c=full)
        usual = command.facts(f"{words} {NETWORKS}", tmp_path / "b.json", c=command.folder / "five.safetensors")
        assert alone == usual
    shown = command("inspect {c}", c=full)
    assert "full, loads without the source, format 3" in shown.out
    verified = command("verify {c} --target {t}", c=full)
    assert verified.code == 0 and "not needed: the file holds the structure" in verified.out
    assert "attached" in verified.out and "detached" in verified.out


def test_full_and_thin_files_go_together(command: Command, full: Path, tmp_path: Path) -> None:  # noqa: F811
    words = "eval {c} {f}/two.safetensors --source {s} --target {t} --data digits"
    assert command(words, c=full).code == 0
    asked = command("eval {c} {f}/two.safetensors --target {t} --data digits", c=full)
    assert "--source: " in asked.complaint and "two.safetensors is a thin file" in asked.complaint


def test_the_report_and_the_card_load_it_without_the_source(command: Command, full: Path, tmp_path: Path) -> None:  # noqa: F811
    found = command("report {c} --target {t} --data digits --out {o}", c=full, o=tmp_path / "r.html")
    assert found.code == 0
    page = (tmp_path / "r.html").read_text()
    assert 'pnc.load("full.safetensors"))' in page.replace("&#34;", '"') and "--source" not in page
    pnc.save_pretrained(pnc.load(full), tmp_path / "card", kind="full")
    assert 'pnc.from_pretrained("card")' in (tmp_path / "card" / "README.md").read_text()
    assert pnc.from_pretrained(tmp_path / "card").classes == ("5",)
