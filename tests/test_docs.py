"""The documentation: the site builds without a warning, its code runs, its commands exist, and its pages look right."""

import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn

import pnc
from browser import CHROMIUM, browser
from digits import write_images
from pnc.cli.app import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)? *```(\w+)\n(.*?)```", re.DOTALL)
Names = dict[str, Any]


def blocks(page: str, language: str) -> Iterator[tuple[str, bool]]:
    """The blocks of a page in a language, each with whether it says why it is not run."""
    for reason, found, code in BLOCK.findall((DOCS / page).read_text()):
        if found == language:
            yield textwrap.dedent(code), bool(reason)


# ------------------------------------------------------------------------------------------------------------- the site
@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built from nothing."""
    folder = tmp_path_factory.mktemp("site")
    words = ["-q", "-n", "-W", "--keep-going", "-c", "docs", "-d", str(folder / "doctrees"), ".", str(folder / "html")]
    made = subprocess.run([sys.executable, "-m", "sphinx", *words], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    return folder / "html"


def test_the_site_builds_without_a_warning(site: Path) -> None:
    for page in PAGES:
        text = (site / "docs" / page).with_suffix(".html").read_text()
        for picture in re.findall(r'<img [^>]*src="([^":]+)"', text):
            assert ((site / "docs" / page).parent / picture).is_file(), (page, picture)
    assert (site / "index.html").is_file()


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    text = (site / "docs" / "reference.html").read_text()
    assert [name for name in pnc.__all__ if f'id="pnc.{name}"' not in text] == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_every_page_looks_right_on_wide_and_narrow_screens_light_and_dark(site: Path) -> None:
    wrong = []
    with browser() as opened:
        for page in sorted(site.rglob("*.html")):
            if page.relative_to(site).parts[0] not in ("docs", "results"):
                continue
            for width in (1280, 390):
                for dark in (False, True):
                    found = [one for one in opened.look(page, width, dark) if '"type": "log"' not in one]
                    wrong += [(page.name, width, dark, one) for one in found]
    assert wrong == []


# ------------------------------------------------------------------------------------------------------------- the code
@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Names]:
    """A folder where the code of the first page has run, and the names that it leaves."""
    folder, names = tmp_path_factory.mktemp("docs"), {"__name__": "docs"}
    (folder / "results").symlink_to(ROOT / "results")
    (code,) = [code for code, _ in blocks("index.md", "python")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(code, "index.md", "exec"), names)
    return folder, names


def clones_of(names: Names) -> Names:
    """Clones named pets, birds and boats of the digits' networks."""
    networks, chosen = (names["source"].module, names["target"].module), {}
    kinds = {"pets": {"5": "cat", "6": "dog"}, "birds": {"7": "hawk"}, "boats": {"8": "ship", "9": "ferry"}}
    for name, renames in kinds.items():
        drawn = pnc.draw_support(names["train"], list(renames), names["target"].classes, 20, 5)
        made = pnc.clone(*networks, drawn, classes=list(renames), **names["settings"])
        chosen[name] = made.renamed(name, renames)
    return chosen


def photos(classes: Mapping[str, str]) -> None:
    """Write some digits as the folder photos, under other class names."""
    write_images(Path("digits"), "test", list(classes), 3)
    Path("photos").mkdir()
    (Path("digits") / "test").rename(Path("photos") / "test")
    for old, new in classes.items():
        (Path("photos") / "test" / old).rename(Path("photos") / "test" / new)


OLD = {name: name for name in "01234"}


def for_composites(names: Names) -> Names:
    photos({**OLD, "5": "cat", "6": "dog", "8": "ship (2)", "9": "ferry"})
    Path("inbox").mkdir()
    first = next((Path("photos") / "test" / "cat").iterdir())
    for path in ("a.jpg", "inbox/b.png"):
        Path(path).write_bytes(first.read_bytes())
    array = torch.zeros(8, 8, 1, dtype=torch.uint8).numpy()
    return {**clones_of(names), "array": array, "images": names["test"].images[:4]}


def for_exports(names: Names) -> Names:
    made = clones_of(names)
    net = pnc.attach(names["target"], made["pets"], made["birds"])
    for path in ("net.onnx", "net.pt2"):
        pnc.export(net, path)
    pnc.export_split(net, "deploy")
    return {"images": names["test"].images[:3].numpy()}


def for_reports(names: Names) -> Names:
    photos({name: name for name in "0123456789"})
    pnc.save(names["clone"], "new.safetensors")
    net = pnc.attach(names["target"], names["clone"])
    return {"net": net, "source": names["source"].module}


class Two(nn.Module):
    """A network that returns features and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.relu(self.first(images)).mean((2, 3))
        return features, self.last(features)


def for_networks(names: Names) -> Names:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    ).eval()
    batch = {0: torch.export.Dim("batch")}
    torch.export.save(torch.export.export(network, (torch.rand(2, 3, 8, 8),), dynamic_shapes=(batch,)), "net.pt2")
    statistics = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "target_mean": (0.4,), "target_std": (0.3,)}
    target, support = names["target"].module, names["support"]
    return {**statistics, "network": network, "target": target, "loader": support, "torch": torch}


GIVEN: Mapping[str, Callable[[Names], Names]] = {
    "composite.md": for_composites,
    "export.md": for_exports,
    "report.md": for_reports,
    "networks.md": for_networks,
}
"""What a page takes for granted besides the names of the first page, and the files that it reads."""

NEEDS_TIMM = ("howto/timm.md", "howto/transformers.md")
SLOW = ("export.md",)


def _parameter(page: str) -> Any:
    return pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [])


@pytest.mark.filterwarnings("ignore::pnc.PNCWarning")
@pytest.mark.parametrize(
    "page", [_parameter(page) for page in PAGES if page != "index.md" and any(blocks(page, "python"))]
)
def test_the_code_of_a_page_runs(
    page: str,
    start: tuple[Path, Names],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if page in NEEDS_TIMM:
        request.getfixturevalue("torchvision")
    monkeypatch.chdir(tmp_path)
    names = dict(start[1])
    names |= GIVEN.get(page, lambda _: {})(names)
    for code, is_skipped in blocks(page, "python"):
        if is_skipped:
            compile(code, page, "exec")
        else:
            exec(compile(code, page, "exec"), names)


def commands(page: str) -> Iterator[list[str]]:
    """The words of each `pnc` command in a page's shell blocks."""
    for language in ("sh", "bash"):
        for code, _ in blocks(page, language):
            for line in code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                words = words[words.index("-m") + 1 :] if words[:1] in (["accelerate"], ["torchrun"]) else words
                if words[:1] == ["pnc"]:
                    yield words[1:]


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))])
def test_the_commands_of_a_page_exist_with_their_options(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TARGET", "SOURCE", "DATA"):
        monkeypatch.setenv(f"PNC_{name}", "given")
    for words in commands(page):
        command: Any = typer.main.get_command(app)
        context = command.make_context("pnc", list(words))
        while hasattr(command, "resolve_command"):
            left = [*context._protected_args, *context.args] if context._protected_args else list(context.args)
            name, command, left = command.resolve_command(context, left)
            assert command is not None, words
            context = command.make_context(name, left, parent=context)
