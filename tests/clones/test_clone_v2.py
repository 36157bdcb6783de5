"""Files of the second format version, which every later version must read."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import validate

import pnc
from pnc.foundation.errors import FileFormatError, MismatchError
from pnc.foundation.tensor_files import read_tensors, write_tensors

FOLDER = Path(__file__).parents[1] / "golden"
SCHEMA = Path(__file__).parents[2] / "docs" / "clone-file.schema.json"
LOGITS: dict[str, Any] = json.loads((FOLDER / "clone_v2.json").read_text())
KINDS = {name: "full" if name.endswith("full") else "thin" for name in LOGITS}
V1 = runpy.run_path(str(FOLDER / "make_clone_v1.py"))


@pytest.mark.parametrize("name", LOGITS)
def test_it_is_read_and_gives_the_same_logits_as_before(name: str) -> None:
    net = pnc.attach(V1["target"](), pnc.load(FOLDER / f"{name}.safetensors", source=V1["source"]()))
    with torch.no_grad():
        found = net(V1["images"](3))
    # Other processors add in another order; the clone's features are small differences of larger numbers.
    torch.testing.assert_close(found, torch.tensor(LOGITS[name]), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in LOGITS if KINDS[name] == "thin"])
def test_it_is_written_again_byte_for_byte(name: str, tmp_path: Path) -> None:
    clone = pnc.load(FOLDER / f"{name}.safetensors", source=V1["source"]())
    pnc.save(clone, tmp_path / "f", KINDS[name])
    assert (tmp_path / "f").read_bytes() == (FOLDER / f"{name}.safetensors").read_bytes()


def test_a_full_file_is_written_again_with_the_structure_of_its_part(tmp_path: Path) -> None:
    clone = pnc.load(FOLDER / "clone_v2_weights_full.safetensors", source=V1["source"]())
    pnc.save(clone, tmp_path / "f", "full")
    before, after = (read_tensors(path) for path in (FOLDER / "clone_v2_weights_full.safetensors", tmp_path / "f"))
    assert after[0].keys() >= before[0].keys() and all(torch.equal(after[0][name], t) for name, t in before[0].items())
    assert (before[1]["version"], after[1]["version"]) == (2, 3)


def test_a_full_file_can_be_made_thin_again(tmp_path: Path) -> None:
    clone = pnc.load(FOLDER / "clone_v2_weights_full.safetensors", source=V1["source"]())
    pnc.save(clone, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == (FOLDER / "clone_v2_weights.safetensors").read_bytes()


@pytest.mark.parametrize("name", LOGITS)
def test_its_metadata_is_as_the_schema_says(name: str) -> None:
    _, facts = read_tensors(FOLDER / f"{name}.safetensors")
    data = (FOLDER / f"{name}.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    validate(json.loads(header["__metadata__"]["pnc"]), json.loads(SCHEMA.read_text()))
    assert facts["version"] == 2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t, f: t.pop("deltas.scales"), MismatchError, "its deltas are of two kinds, or incomplete"),
        (lambda t, f: t.update({"deltas.codes": t["deltas.codes"][:-3]}), MismatchError, "282 codes, .* needs 285"),
        (lambda t, f: t.update({"deltas.codes": t["deltas.codes"].char()}), FileFormatError, "asks for .* uint8"),
        (lambda t, f: t.update({"deltas.more": torch.ones(1)}), FileFormatError, "a clone has no tensor"),
        (lambda t, f: f.update(version=1), FileFormatError, "a clone has no tensor 'deltas"),
        (lambda t, f: f.update(version=4), FileFormatError, "format version 4; this pnc reads up to 3"),
    ],
)
def test_invalid_deltas_are_refused(change: Any, error: Any, words: str, tmp_path: Path) -> None:
    tensors, facts = read_tensors(FOLDER / "clone_v2_weights.safetensors")
    tensors, facts = dict(tensors), dict(facts)
    change(tensors, facts)
    write_tensors(tmp_path / "f", tensors, facts)
    with pytest.raises(error, match=words):
        pnc.load(tmp_path / "f", source=V1["source"]())
