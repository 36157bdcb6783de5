"""A zoo on disk: what goes in comes out, what is damaged is named, and no code runs unasked."""

import json
from pathlib import Path

import pytest
import torch

import pnc
from pnc.foundation.fingerprints import fingerprint
from pnc.models.model_specs import build_model
from pnc.models.preprocessing import Preprocessed
from pnc.zoo.model_zoo import left_over

CLASSES = ("cat", "dog", "cow")
CODE = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
"""


def network(seed: int = 0, spec: str = "zoo:cnn?width=0.25", shape: tuple[int, int, int] = (1, 8, 8)):
    return build_model(spec, CLASSES, shape, seed)


@pytest.fixture
def zoo(tmp_path: Path) -> pnc.Zoo:
    made = pnc.Zoo(tmp_path / "deep" / "zoo", create=True)
    for seed, name in enumerate(("first", "second")):
        made.add(name, network(seed), licence="mit")
    return made


def test_a_network_comes_back_with_its_weights_names_and_preprocessing(zoo: pnc.Zoo) -> None:
    assert zoo.names == ("first", "second") and len(zoo) == 2
    model, loaded = network(1), zoo.load("second")
    assert fingerprint(loaded.module) == fingerprint(model.module)
    assert (loaded.classes, loaded.input_shape, loaded.spec) == (CLASSES, (1, 8, 8), "zoo:cnn?width=0.25")
    entry = pnc.Zoo(zoo.folder).entry("second")
    assert entry == zoo.entries()[1] and entry.licence == "mit" and entry.preprocessing is None
    assert entry.n_params == sum(p.numel() for p in model.module.parameters())
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded.module(images), model.module.eval()(images))


def test_normalization_is_part_of_an_entry(zoo: pnc.Zoo) -> None:
    zoo.add("normalized", network(), preprocessing=pnc.Normalization(0.5, 0.25))
    images = torch.rand(2, 1, 8, 8)
    loaded = pnc.Zoo(zoo.folder).load("normalized").module
    assert isinstance(loaded, Preprocessed)
    assert torch.equal(loaded(images), network().module.eval()((images - 0.5) / 0.25))
    with pytest.raises(pnc.InputError, match="one for each of 1 channels"):
        zoo.add("wrong", network(), preprocessing=pnc.Normalization((0.5, 0.5, 0.5), 1.0))
    assert "wrong" not in zoo.names and left_over(zoo) == ()


def test_a_network_for_other_images_is_wrapped(zoo: pnc.Zoo) -> None:
    made = zoo.load("first", input_shape=(3, 32, 32))
    assert isinstance(made.module, Preprocessed) and made.input_shape == (3, 32, 32)
    assert made.module(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    assert not isinstance(zoo.load("first", input_shape=(1, 8, 8)).module, Preprocessed)


def test_an_entry_is_there_as_soon_as_its_json_is(zoo: pnc.Zoo) -> None:
    zoo.weights("killed").write_bytes(zoo.weights("first").read_bytes())
    assert zoo.names == ("first", "second") and left_over(zoo) == ("killed.safetensors",)
    zoo.add("killed", network(2))
    assert left_over(zoo) == () and zoo.check("killed") is None
    zoo.remove("killed")
    assert zoo.names == ("first", "second") and not zoo.weights("killed").exists()


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".hidden", "a b", "a" * 101, None])
def test_names_are_file_names(zoo: pnc.Zoo, name: str) -> None:
    with pytest.raises(pnc.InputError, match="name: expected letters, digits"):
        zoo.add(name, network())
    with pytest.raises(pnc.InputError, match="name: expected letters, digits"):
        zoo.entry(name)


def test_a_taken_or_unknown_name_is_refused(zoo: pnc.Zoo, tmp_path: Path) -> None:
    with pytest.raises(pnc.InputError, match="already has an entry 'first'; remove it first"):
        zoo.add("first", network())
    for call in (zoo.entry, zoo.load, zoo.remove):
        with pytest.raises(
            pnc.InputError, match=r"no entry 'frst' \(did you mean 'first'\?\); there are first, second"
        ):
            call("frst")
    with pytest.raises(pnc.InputError, match="zoo: there is no folder .*none; `pnc zoo add` makes one"):
        pnc.Zoo(tmp_path / "none")
    with pytest.raises(pnc.InputError, match="model: expected what pnc.load_model returns, got Sequential"):
        zoo.add("third", network().module)


def changed(zoo: pnc.Zoo, **facts: object) -> None:
    path = zoo.folder / "first.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ({"format": "other"}, "is no entry of a zoo"),
        ({"version": 2}, "has format version 2, this pnc reads 1"),
        ({"name": "second"}, "it calls itself 'second'"),
        ({"classes": ["cat", "cat"]}, "is damaged .*given twice"),
        ({"classes": 3}, "is damaged"),
        ({"input_shape": [1, 8]}, "is damaged .*three positive whole numbers"),
        ({"spec": None}, "is damaged"),
        ({"licence": "a\nb"}, "is damaged"),
        ({"n_params": 1.5}, "is damaged"),
        ({"test_accuracy": 7.0}, "is damaged"),
        ({"preprocessing": {"mean": 0}}, "is damaged"),
        ({"fingerprint": "0" * 32}, "the weights of first have fingerprint .*, the entry says 00000"),
        ({"spec": "zoo:cnn"}, "do not fit the network"),
        ({"spec": "zoo:none"}, "there is no reference network 'none'"),
    ],
)
def test_a_damaged_entry_is_one_line(zoo: pnc.Zoo, facts: dict[str, object], problem: str) -> None:
    changed(zoo, **facts)
    with pytest.raises(pnc.PNCError, match=problem):
        zoo.load("first")
    found = zoo.check("first")
    assert found is not None and "\n" not in found and zoo.check("second") is None


def test_bytes_that_are_no_json_or_no_weights_are_one_line(zoo: pnc.Zoo) -> None:
    (zoo.folder / "first.json").write_bytes(b"\xff{")
    zoo.weights("second").write_bytes(zoo.weights("second").read_bytes()[:-1])
    for name, problem in (("first", "cannot be read as JSON"), ("second", "is not a complete safetensors file")):
        with pytest.raises(pnc.FileFormatError, match=problem):
            zoo.load(name)
    zoo.weights("second").unlink()
    assert "there is no file" in str(zoo.check("second"))


def test_code_that_an_entry_names_runs_only_if_allowed(zoo: pnc.Zoo, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(CODE)
    zoo.add("mine", pnc.load_model(f"py:{file}:net", classes=CLASSES, input_shape=(1, 8, 8)))
    file.write_text("raise SystemExit('code ran')")
    with pytest.raises(pnc.InputError, match="loading it runs that code; open the zoo with allow_code=True"):
        zoo.load("mine")
    assert "runs code" in str(zoo.check("mine"))
    file.write_text(CODE)
    trusting = pnc.Zoo(zoo.folder, allow_code=True)
    assert trusting.check("mine") is None and trusting.load("mine").classes == CLASSES
