"""Files of the third format version, which hold the structure of the source's part and load without the source."""

import copy
import json
import pickle
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from torch import Tensor, nn

import pnc
from pnc.bench.file_attacks import material
from pnc.bench.library_classifiers import build
from pnc.channels.channel_masks import channel_masks
from pnc.channels.channel_spaces import channel_spaces
from pnc.channels.compaction import compact, own_copy
from pnc.clones.part_description import describe_part
from pnc.foundation.errors import FileFormatError, InputError, MismatchError, PNCWarning
from pnc.foundation.tensor_files import read_tensors, write_tensors
from pnc.graph.classifier import find_head
from pnc.graph.cut_points import cut_points, extract
from pnc.graph.recording import record
from pnc.method.task import prepare_task

FOLDER = Path(__file__).parents[1] / "golden"
SCHEMA = Path(__file__).parents[2] / "docs" / "clone-file.schema.json"
LOGITS: dict[str, Any] = json.loads((FOLDER / "clone_v3.json").read_text())
V1 = runpy.run_path(str(FOLDER / "make_clone_v1.py"))
V3 = runpy.run_path(str(FOLDER / "make_clone_v3.py"))


def source_of(name: str) -> nn.Module:
    source: nn.Module = V1["source"]()
    made: nn.Module = V3["with_own_layer"](source) if "own" in name else source
    return made


def logits(clone: pnc.Clone) -> Tensor:
    with torch.no_grad():
        return pnc.attach(V1["target"](), clone)(V1["images"](3))


@pytest.mark.parametrize("name", LOGITS)
def test_it_is_read_without_the_source_and_gives_the_same_logits_as_before(name: str) -> None:
    found = logits(pnc.load(FOLDER / f"{name}.safetensors"))
    # Other processors add in another order; the clone's features are small differences of larger numbers.
    torch.testing.assert_close(found, torch.tensor(LOGITS[name]), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", LOGITS)
def test_with_and_without_the_source_it_has_the_same_bits_and_is_written_byte_for_byte(
    name: str, tmp_path: Path
) -> None:
    path = FOLDER / f"{name}.safetensors"
    alone, with_source = pnc.load(path), pnc.load(path, source=source_of(name))
    assert torch.equal(logits(alone), logits(with_source))
    for clone in (alone, with_source, copy.deepcopy(alone), pickle.loads(pickle.dumps(alone))):  # noqa: S301 - our own
        pnc.save(clone, tmp_path / "f", "full")
        assert (tmp_path / "f").read_bytes() == path.read_bytes()
    pnc.save(alone, tmp_path / "a", "thin")
    pnc.save(with_source, tmp_path / "b", "thin")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert torch.equal(logits(pnc.load(tmp_path / "a", source=source_of(name))), logits(alone))


def metadata(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    found: dict[str, Any] = json.loads(header["__metadata__"]["pnc"])
    return found


@pytest.mark.parametrize("name", LOGITS)
def test_its_metadata_is_as_the_schema_says(name: str) -> None:
    facts = metadata(FOLDER / f"{name}.safetensors")
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(facts)
    assert facts["version"] == 3
    shown = pnc.inspect(FOLDER / f"{name}.safetensors")
    assert "part" not in shown and shown["needs_source"] is False


def test_the_golden_files_cover_the_format() -> None:
    parts = [metadata(FOLDER / f"{name}.safetensors")["part"] for name in LOGITS]
    assert {node[0] for part in parts for node in part["nodes"]} >= {"get_attr", "call_module", "call_method"}
    assert {kind for part in parts for _, kind in part["tensors"]} >= {"parameter", "hidden"}
    assert any(part["spaces"] for part in parts)


def test_a_thin_file_without_its_source_is_one_error(tmp_path: Path) -> None:
    pnc.save(pnc.load(FOLDER / "clone_v3_half.safetensors"), tmp_path / "f")
    assert pnc.inspect(tmp_path / "f")["needs_source"] is True
    with pytest.raises(InputError, match="source: .* is a thin file, .*; give the network that it was made from"):
        pnc.load(tmp_path / "f")
    with pytest.raises(InputError, match="source: .* without the structure .*; give a network of the source's arch"):
        pnc.load(FOLDER / "clone_v2_weights_full.safetensors")


class Sorted(nn.Module):
    """A layer whose operation no file may name."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * torch.sort(x, dim=1).values


def test_a_source_that_data_cannot_describe_is_named_when_saving(tmp_path: Path) -> None:
    source = V1["source"]()
    source = nn.Sequential(*source[:6], Sorted(), *source[6:]).eval()
    labels = [[*V1["BASE"], *V1["NEW"]][index % 7] for index in range(28)]
    names = {"classes": V1["NEW"], "source_classes": V1["NEW"], "base_classes": V1["BASE"]}
    task = prepare_task(source, V1["target"](), (V1["images"](28), labels), **names)
    found = pnc.scan(task, exhaustive=True)
    place = found.adapter(max(found.positions, key=lambda position: position.n_params))
    clone = pnc.fit(task, place, density=1.0, tune="none")
    with pytest.warns(
        PNCWarning, match=r"clone: its part calls sort .*: the file holds all weights, but loading it nee"
    ):
        pnc.save(clone, tmp_path / "f", "full")
    assert pnc.inspect(tmp_path / "f")["needs_source"] is True
    assert torch.equal(logits(pnc.load(tmp_path / "f", source=source)), logits(clone))


# ------------------------------------------------------------------------------------------------------ forged files
def edited(path: Path, name: str, change: Any) -> None:
    tensors, facts = read_tensors(FOLDER / f"{name}.safetensors")
    tensors, facts = dict(tensors), json.loads(json.dumps(facts))
    change(tensors, facts)
    write_tensors(path, tensors, facts)


def node(facts: dict[str, Any], name: str) -> list[Any]:
    found: list[Any] = next(one for one in facts["part"]["nodes"] if one[1].endswith(name))
    return found


def call(facts: dict[str, Any], operation: str, target: str) -> None:
    node(facts, "mul")[:3:2] = operation, target


def rename_node(facts: dict[str, Any], new: str) -> None:
    facts["part"]["nodes"][1][1] = new


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, f: call(f, "call_function", "torch.load"), "'call_function' of 'torch.load', which no file may"),
        (lambda t, f: call(f, "call_function", "os.system"), "'call_function' of 'os.system', which no file may"),
        (lambda t, f: call(f, "call_method", "__reduce__"), "'call_method' of '__reduce__', which no file may name"),
        (lambda t, f: rename_node(f, "x; import os"), "'x; import os' is no name of an operation"),
        (lambda t, f: rename_node(f, "import"), "'import' is no name of an operation"),
        (lambda t, f: rename_node(f, "print"), "twice, or is a name of Python"),
        (lambda t, f: rename_node(f, "x"), "'x' occurs twice"),
        (lambda t, f: node(f, "mul")[3].__setitem__(0, {"node": 99}), "refers to operation 99, which is not before it"),
        (lambda t, f: node(f, "mul")[3].__setitem__(0, {"code": "1"}), "is no argument of an operation"),
        (lambda t, f: node(f, "mul")[3].__setitem__(0, "text"), "its operation .* cannot run"),
        (lambda t, f: node(f, "mul")[4].update({"a b": 1}), "are not a list and an object"),
        (lambda t, f: node(f, "mul")[5].update(shape=[2, 6, 8, 9]), "has another shape than the recorded"),
        (lambda t, f: node(f, "mul")[5].update(more=1), "'more' is unknown"),
        (lambda t, f: node(f, "mul")[5].update(after=["nobody"]), "names of earlier operations"),
        (lambda t, f: f["part"]["nodes"].pop(), "which no file may name there"),
        (lambda t, f: f["part"]["layers"][0].__setitem__(1, "Sequential"), "a layer of torch.nn"),
        (lambda t, f: f["part"]["layers"][0].__setitem__(0, "a.b c"), "a layer of torch.nn"),
        (lambda t, f: f["part"]["layers"][0][2].update(out_channels=1 << 40), "cannot be built|needs"),
        (lambda t, f: f["part"]["layers"][0][2].update(nothing=1), "its part cannot be built: .*nothing"),
        (lambda t, f: f["part"]["tensors"].append(["more", "buffer"]), "its part has a tensor 'more'"),
        (lambda t, f: f["part"]["features"].update(shape=[9]), "does not give features of shape"),
        (lambda t, f: t.pop("hidden.6.shift"), "its part has a tensor '6.shift'"),
        (lambda t, f: t.update({"hidden.more": torch.ones(1)}), "its part has no tensor 'more'"),
        (lambda t, f: t.update({"body.6.scale": torch.ones(5)}), "cannot run|another shape"),
        (lambda t, f: f.update(version=2), "part is unknown in version 2"),
        (lambda t, f: f.update(kind="thin"), "kind: expected full, as in all files of version 3, got thin"),
        (lambda t, f: f.update(version=4), "format version 4; this pnc reads up to 3"),
    ],
)
def test_forged_structures_are_refused(change: Any, words: str, tmp_path: Path) -> None:
    edited(tmp_path / "f", "clone_v3_own_layer", change)
    for read in (pnc.inspect, pnc.load):
        with pytest.raises(FileFormatError, match=words):
            read(tmp_path / "f")


def grow(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Insert an operation that makes a huge tensor, with the facts to match."""
    nodes, first = facts["part"]["nodes"], len(facts["part"]["nodes"]) - 2
    rows = [["call_method", f"r_{n}", "repeat", [{"node": first + n}, 1, 1 << 9], {}, {}] for n in range(5)]
    facts["part"]["nodes"] = [*nodes[:-1], *rows, nodes[-1]]


def test_a_part_that_would_take_much_memory_is_refused_before_it_does(tmp_path: Path) -> None:
    edited(tmp_path / "f", "clone_v3_own_layer", grow)
    with pytest.raises(FileFormatError, match="its result has .* values, more than"):
        pnc.load(tmp_path / "f")


def test_masks_of_other_spaces_are_refused(tmp_path: Path) -> None:
    edited(tmp_path / "f", "clone_v3_half", lambda t, f: f["part"]["spaces"][0].__setitem__(1, 99))
    with pytest.raises(MismatchError, match="other channel spaces"):
        pnc.load(tmp_path / "f")


def test_a_clone_loaded_without_its_source_can_be_used_like_any_other(tmp_path: Path) -> None:
    there = material()
    pnc.save(there.clone, tmp_path / "f", "full")
    alone, usual = pnc.load(tmp_path / "f"), pnc.load(tmp_path / "f", source=there.source)
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    ours, theirs = (pnc.attach(there.target, clone) for clone in (alone, usual))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
        assert torch.equal(ours.fused()(images), theirs.fused()(images))
    assert (alone.branch.n_macs, alone.n_params) == (usual.branch.n_macs, usual.n_params)
    assert str(alone) == str(usual)
    assert ours.verify().ok


# ------------------------------------------------------------------------------------------------ networks of libraries
LIBRARY = ("timm:test_efficientnet", "timm:test_convnext", "transformers:Swin")


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("model", LIBRARY)
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_parts_of_library_networks_are_described_and_rebuilt_with_the_same_bits(model: str, density: float) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, images = build(model)
    recording = record(network, images)
    cuts, features = cut_points(recording), find_head(recording).features
    start = cuts[len(cuts) // 3]
    part = extract(recording, start, [features])
    if density == 1.0:
        body, sizes = own_copy(part), {}
    else:
        spaces = channel_spaces(part)
        kept = {space.name: torch.arange(space.size) < max(1, space.size // 2) for space in spaces.spaces}
        body, sizes = compact(part, spaces, channel_masks(spaces, kept)), spaces.sizes
    structure, _ = describe_part(body, start, features, sizes)  # it compares the bits itself
    assert structure.facts()["nodes"]
