"""The chart of the README is what its command makes of the committed results."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from pnc.bench.accuracy_chart import chart, read_bars
from pnc.cli.bench_commands import bench
from pnc.foundation.errors import FileFormatError

ROOT = Path(__file__).parents[2]
COMPARE, PART = ROOT / "results" / "compare.json", ROOT / "results" / "part.json"


def test_the_committed_chart_is_that_of_the_committed_results(tmp_path: Path) -> None:
    words = f"chart --compare {COMPARE} --part {PART} --out {tmp_path / 'a.svg'}"
    assert CliRunner().invoke(bench, words.split(), catch_exceptions=False).exit_code == 0
    assert (tmp_path / "a.svg").read_text() == (ROOT / "docs" / "accuracy.svg").read_text()


def test_its_numbers_are_those_of_the_readme_and_it_is_a_picture() -> None:
    bars = read_bars(COMPARE, PART)
    root = ElementTree.fromstring(chart(bars))
    texts = [one.text for one in root.iter("{http://www.w3.org/2000/svg}text")]
    readme = (ROOT / "README.md").read_text()
    for bar in bars[:5]:
        shown = f"{bar.accuracy:.3f}".removeprefix("0")
        assert shown in texts and shown in readme
    assert [bar.is_clone for bar in bars].count(True) == 3


def test_files_without_its_rows_are_one_error(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="nothing.json is not a result file"):
        read_bars(tmp_path / "nothing.json", PART)
    (tmp_path / "empty.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(FileFormatError, match="empty.json has no row for 'whole' on CIFAR-10"):
        read_bars(COMPARE, tmp_path / "empty.json")
