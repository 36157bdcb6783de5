"""Files of the first format version, which every later version must read."""

import json
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import validate
from safetensors.torch import load_file

import pnc
from pnc.foundation.errors import MismatchError

pytestmark = pytest.mark.filterwarnings("ignore:.*was written by an earlier version of pnc:UserWarning")
FOLDER = Path(__file__).parents[1] / "golden"
SCHEMA = Path(__file__).parents[2] / "docs" / "clone-file.schema.json"
LOGITS: dict[str, Any] = json.loads((FOLDER / "clone_v1.json").read_text())
KINDS = {name: "full" if name.endswith("full") else "thin" for name in LOGITS}


@cache
def script() -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / "make_clone_v1.py"))


@pytest.mark.parametrize("name", LOGITS)
def test_it_is_read_and_gives_the_same_logits_as_before(name: str) -> None:
    clone = pnc.load(FOLDER / f"{name}.safetensors", source=script()["source"]())
    net = pnc.attach(script()["target"](), clone)
    assert net.classes == ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
    with torch.no_grad():
        found = net(script()["images"](3))
    # Other processors add in another order; the clone's features are small differences of larger numbers.
    torch.testing.assert_close(found, torch.tensor(LOGITS[name]), atol=1e-3, rtol=1e-3)
    assert net.verify().ok


@pytest.mark.parametrize("name", LOGITS)
def test_a_warning_says_that_only_weights_were_compared(name: str) -> None:
    with pytest.warns(UserWarning, match="without forward prints: only the weights were compared"):
        clone = pnc.load(FOLDER / f"{name}.safetensors", source=script()["source"]())
    notes = pnc.attach(script()["target"](), clone).verify().notes
    assert len(notes) == 1 and "is unknown: its file is from an earlier version" in notes[0]


@pytest.mark.parametrize("name", LOGITS)
def test_it_is_written_again_with_the_same_tensors(name: str, tmp_path: Path) -> None:
    clone = pnc.load(FOLDER / f"{name}.safetensors", source=script()["source"]())
    pnc.save(clone, tmp_path / "f", KINDS[name])
    before, after = load_file(FOLDER / f"{name}.safetensors"), load_file(tmp_path / "f")
    assert before.keys() == {key for key in after if not key.startswith("hidden.")}
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    versions = tuple(pnc.inspect(path)["version"] for path in (FOLDER / f"{name}.safetensors", tmp_path / "f"))
    assert versions == (1, 3 if KINDS[name] == "full" else 2)


@pytest.mark.parametrize("name", LOGITS)
def test_its_metadata_is_as_the_schema_says(name: str) -> None:
    data = (FOLDER / f"{name}.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    facts = json.loads(header["__metadata__"]["pnc"])
    validate(facts, json.loads(SCHEMA.read_text()))
    assert (facts["version"], facts["kind"]) == (1, KINDS[name])
    assert header["__metadata__"].keys() == {"pnc"}


def test_the_golden_files_cover_the_format() -> None:
    tensors = {name: set(load_file(FOLDER / f"{name}.safetensors")) for name in LOGITS}
    assert {"masks", "adapter.weight", "head.own.weight", "body.4.running_var"} <= tensors["clone_v1_thin"]
    assert not any(name.endswith("weight") and name.startswith("body") for name in tensors["clone_v1_thin"])
    assert {"body.3.weight", "body.7.weight"} & tensors["clone_v1_full"]
    heads = {name: pnc.inspect(FOLDER / f"{name}.safetensors")["head"] for name in LOGITS}
    assert heads["clone_v1_source_head"] == "source" and heads["clone_v1_thin"] == "stacked"
    assert heads["clone_v1_discriminant"] == "discriminant"
    assert "calibration.rivals" in tensors["clone_v1_rivals"]


def test_the_names_of_the_networks_weights_have_not_changed() -> None:
    for name in LOGITS:
        with pytest.raises(MismatchError, match="another source"):
            pnc.load(FOLDER / f"{name}.safetensors", source=script()["target"]())
