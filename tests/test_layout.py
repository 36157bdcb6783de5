"""The layout of the package: a file imports only from files above it, and the public names are the documented ones."""

import ast
import re
from pathlib import Path

import pnc

SOURCE = Path(pnc.__file__).parent
CONTRIBUTING = SOURCE.parents[1] / "CONTRIBUTING.md"


def documented_order() -> list[str]:
    block = re.search(r"```text\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL).group(1)
    return [line.split()[0].removesuffix(".py").rstrip("/") for line in block.splitlines() if line.strip()]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pnc":
            parts = node.module.split(".")[1:2]
            names |= set(parts) if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pnc.")}
    return names


def test_files_import_only_what_stands_above_them():
    order = documented_order()
    files = {path.stem: path for path in SOURCE.glob("*.py")} | {
        f"{path.parent.name}/{path.stem}": path for path in SOURCE.glob("*/*.py")
    }
    tops = {name.split("/")[0] for name in files} - {"__init__", "__main__"}
    assert tops == set(order), "CONTRIBUTING.md and the package list different files"
    wrong = [
        f"{name} imports {used}"
        for name, path in files.items()
        if (top := name.split("/")[0]) in order
        for used in imported(path)
        if order.index(used) > order.index(top)
    ]
    assert not wrong


def test_public_names_exist_and_importing_loads_no_optional_package():
    assert all(hasattr(pnc, name) for name in pnc.__all__)
    assert list(pnc.__all__) == sorted(pnc.__all__)
    optional = {"torchvision", "timm", "transformers", "datasets", "sklearn", "PIL", "matplotlib"}
    top_level = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                top_level |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                top_level.add(node.module.split(".")[0])
    assert not top_level & optional
