"""The examples that read as tutorials run as they are written, and show what they promise."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def shown(example: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What an example prints, run in a folder of its own."""
    monkeypatch.chdir(folder)
    capsys.readouterr()
    runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
    return capsys.readouterr().out


def figure(text: str, name: str) -> float:
    found = re.search(rf"^{name} +([\d.]+)$", text, re.MULTILINE)
    assert found is not None, text
    return float(found[1])


def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown("quickstart", tmp_path, monkeypatch, capsys)
    assert figure(text, "average accuracy") > 0.9 and "base logits equal       yes" in text
    assert "all equal, bit for bit" in text
    assert (tmp_path / "digits.safetensors").stat().st_size < 100_000
    lines = (EXAMPLES / "quickstart.py").read_text().splitlines()
    assert len([line for line in lines if line and not line.strip().startswith(('"""', "import", "from"))]) <= 24


def test_my_timm_model(
    torchvision: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown("my_timm_model", tmp_path, monkeypatch, capsys)
    assert figure(text, "average accuracy") > 0.85 and figure(text, "base drop") < 0.1
    assert re.search(r"^\d \(0\.\d\d\), \d \(", text, re.MULTILINE)
    assert (tmp_path / "my_clone.safetensors").is_file()


def test_spectrograms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown("spectrograms", tmp_path, monkeypatch, capsys)
    assert figure(text, "average accuracy") > 0.85  # training differs between processors
    assert re.search(r"^trill \(0\.\d\d\), .* - from more sounds$", text, re.MULTILINE)
    assert not list(tmp_path.iterdir())


def test_the_start_of_the_readme_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = EXAMPLES.parent
    code = re.search(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    assert code is not None
    (tmp_path / "results").symlink_to(root / "results")
    monkeypatch.chdir(tmp_path)
    exec(compile(code[1], "README.md", "exec"), {"__name__": "__main__"})
    text = capsys.readouterr().out
    assert figure(text, "average accuracy") > 0.9 and "all equal, bit for bit" in text
