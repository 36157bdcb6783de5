"""The layout of the package: rooms and the files in them stand in the order of docs/code-map.md; imports go up only."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pnc

SOURCE = Path(pnc.__file__).parent
TESTS = Path(__file__).parent
MAP = SOURCE.parents[1] / "docs" / "code-map.md"
MAX_FLOORS, MAX_LINES = 8, 400


def mapped() -> dict[str, list[str]]:
    """Rooms in order, each with its files in order, as the map lists them."""
    rooms: dict[str, list[str]] = {}
    for room, block in re.findall(r"^### (\w+)/.*?```text\n(.*?)```", MAP.read_text(), re.DOTALL | re.MULTILINE):
        rooms[room] = [line.split()[0].removesuffix(".py") for line in block.splitlines() if line.strip()]
    return rooms


ROOMS = mapped()


def files(room: str) -> dict[str, Path]:
    """The files of a room by name, `localization/gates` for one in a folder; without those that make packages."""
    paths = (path for path in (SOURCE / room).rglob("*.py") if path.stem != "__init__")
    return {str(path.relative_to(SOURCE / room).with_suffix("")): path for path in paths}


def imported(path: Path) -> set[tuple[str, str]]:
    """Room and file of every import of the package's own, also of those inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pnc":
            assert node.module != "pnc", f"{path} imports from pnc itself; name the file"
            for alias in node.names:
                inside = Path(*node.module.split(".")[1:], alias.name)
                place = inside if (SOURCE / inside).with_suffix(".py").exists() else inside.parent
                found.add((place.parts[0], "/".join(place.parts[1:])))
        elif isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "pnc" for alias in node.names), f"{path}: use from ... import"
    return found


def test_the_map_lists_every_room_and_every_file():
    assert {path.parent.name for path in SOURCE.glob("*/__init__.py")} == set(ROOMS)
    assert {room: sorted(files(room)) for room in ROOMS} == {room: sorted(names) for room, names in ROOMS.items()}
    assert {path.stem for path in SOURCE.glob("*.py")} == {"__init__", "__main__"}


def test_rooms_import_only_rooms_above_them():
    order = list(ROOMS)
    wrong = [
        f"{room}/{name} imports {used}/{file}"
        for room in ROOMS
        for name, path in files(room).items()
        for used, file in imported(path)
        if order.index(used) > order.index(room)
    ]
    assert not wrong


@pytest.mark.parametrize("room", ROOMS)
def test_files_import_only_files_above_them_in_few_floors(room):
    floors: dict[str, int] = {}
    for name in ROOMS[room]:
        inside = {file for used, file in imported(files(room)[name]) if used == room and file in ROOMS[room]}
        assert inside <= floors.keys(), f"{room}/{name} imports {sorted(inside - floors.keys())}, which stand below it"
        floors[name] = 1 + max((floors[file] for file in inside), default=0)
    assert max(floors.values()) <= MAX_FLOORS


def test_no_file_is_long():
    assert not [str(path) for path in SOURCE.rglob("*.py") if len(path.read_text().splitlines()) > MAX_LINES]


def test_folders_of_tests_are_rooms_and_names_of_tests_differ():
    folders = {path.relative_to(TESTS).parts[0] for path in TESTS.glob("*/**/test_*.py")}
    assert folders <= set(ROOMS)
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_public_names_exist_and_nothing_else_is_listed():
    assert all(hasattr(pnc, name) for name in pnc.__all__)
    assert list(pnc.__all__) == sorted(pnc.__all__)
    assert [name for name in dir(pnc) if not name.startswith("__")] == pnc.__all__
    with pytest.raises(AttributeError, match="module 'pnc' has no attribute 'klone'"):
        _ = pnc.klone


def test_importing_loads_no_optional_package():
    optional = {
        "torchvision",
        "timm",
        "transformers",
        "datasets",
        "sklearn",
        "PIL",
        "matplotlib",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "ray",
        "httpx",
        "prometheus_client",
        "python_multipart",
    }
    top_level = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                top_level |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                top_level.add(node.module.split(".")[0])
    assert not top_level & optional
    served = {"fastapi", "h11", "pydantic", "starlette", "uvicorn"}  # imported by the files that define the server only
    loads = {
        path.stem
        for path in SOURCE.rglob("*.py")
        if served & set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
    }
    assert loads == {"answers", "patient_protocol", "running", "web_app"}


PRODUCTION = """
import sys
import pnc
pnc.load, pnc.attach, pnc.save, pnc.inspect, pnc.verify, pnc.snapshot, pnc.Clone, pnc.Composite, pnc.PNCError
assert not [name for name in sys.modules if name.startswith(("pnc.method", "pnc.bench", "pnc.cli", "pnc.models"))]
assert "typer" not in sys.modules and "rich" not in sys.modules
"""


def test_production_loads_no_code_that_makes_clones_measures_or_parses_commands():
    subprocess.run([sys.executable, "-c", PRODUCTION], check=True)
