import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from pnc.foundation.errors import ClassNameError, FileFormatError, InputError, MismatchError
from pnc.foundation.network_state import differences, take_snapshot
from pnc.foundation.tensor_files import read_tensors, write_tensors
from pnc.models import model_specs
from pnc.models.model_specs import LoadedModel, build_model, load_model, save_model
from pnc.models.weight_files import load_tensors

CLASSES = ("ant", "bee", "cat")
SHAPE = (1, 8, 8)
SPEC = "zoo:cnn?width=0.125"


@pytest.fixture
def network() -> LoadedModel:
    return build_model(SPEC, CLASSES, SHAPE, seed=3)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return not differences(other, take_snapshot(one))


# ------------------------------------------------------------------------------------------------ specs
@pytest.mark.parametrize(
    "spec",
    ["zoo:cnn", "zoo:resnet20", "zoo:resnet32?width=0.5", "zoo:resnet56?width=0.25", "zoo:mobilenetv2?width=0.5"],
)
def test_reference_networks(spec: str) -> None:
    model = load_model(spec, classes=list(CLASSES), input_shape=[3, 8, 8])
    assert (model.spec, model.classes, model.input_shape, model.facts) == (spec, CLASSES, (3, 8, 8), {})
    assert not any(module.training for module in model.module.modules())
    assert model.module(torch.rand(2, 3, 8, 8)).shape == (2, 3)


def test_transformer_options() -> None:
    module = load_model("zoo:vit_tiny?patch=4&dim=16&depth=3&n_heads=2", None, CLASSES, SHAPE).module
    assert len(module.get_submodule("blocks")) == 3  # type: ignore[arg-type]
    assert module.get_parameter("positions").shape == (1, 5, 16)


def test_the_seed_alone_decides_the_weights_and_the_global_state_stays(network: LoadedModel) -> None:
    before = torch.get_rng_state()
    torch.rand(1)
    after = torch.get_rng_state()
    assert same_weights(build_model(SPEC, CLASSES, SHAPE, seed=3).module, network.module)
    assert not same_weights(build_model(SPEC, CLASSES, SHAPE, seed=4).module, network.module)
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet20", "'resnet20' is of no known kind; expected zoo:..., timm:..., torchvision:..., hf:..., py:..."),
        ("keras:x", "'keras:x' is of no known kind"),
        ("zoo:renset20", "no reference network 'renset20' (did you mean 'resnet20'?); there are cnn, resnet20"),
        ("zoo:cnn?patch=3", "zoo:cnn: there is no option 'patch'; there are width"),
        ("zoo:cnn?width=wide", "width=wide: expected a number above 0, 16 at most"),
        ("zoo:cnn?width=0", "width=0: expected a number above 0"),
        ("zoo:cnn?width=nan", "width=nan: expected a number above 0"),
        ("zoo:cnn?width=1e9", "width=1e9: expected a number above 0, 16 at most"),
        ("zoo:vit_tiny?dim=1.5", "dim=1.5: expected a whole number above 0, 2048 at most"),
        ("zoo:vit_tiny?dim=9", "4 heads do not divide a token of 9"),
        ("py:os", "expected py:MODULE:FUNCTION or py:FILE.py:FUNCTION, got 'py:os'"),
        ("py::f", "expected py:MODULE:FUNCTION"),
        ("py:.os:f", "expected py:MODULE:FUNCTION"),
        ("py:os:getcwd?x=1", "expected py:MODULE:FUNCTION"),
        ("py:no_such_module:f", "cannot import no_such_module: No module named 'no_such_module'"),
        ("py:missing.py:f", "cannot import missing.py: "),
        ("py:os:no_such_function", "there is no function 'no_such_function' in os"),
        ("py:os:getcwd", "py:os:getcwd returned str; expected a torch.nn.Module"),
        ("missing.safetensors", "there is no file missing.safetensors"),
    ],
)
def test_bad_specs_are_refused(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_model(spec, classes=CLASSES, input_shape=SHAPE)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"classes": None}, InputError, "classes: zoo:cnn?width=0.125 does not name its outputs"),
        ({"input_shape": None}, InputError, "input_shape: zoo:cnn?width=0.125 does not say which images it takes"),
        ({"input_shape": (8, 8)}, InputError, "expected three positive whole numbers (C, H, W), got (8, 8)"),
        ({"input_shape": (1, 0, 8)}, InputError, "got (1, 0, 8)"),
        ({"classes": ["ant", "ant"]}, ClassNameError, "classes: ant given twice"),
        ({"weights": "missing.pt"}, InputError, "weights: there is no file missing.pt"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        load_model(SPEC, **{"classes": CLASSES, "input_shape": SHAPE, **changes})


SOURCE = """
import torch
from torch import nn

def three(): return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 3))
def tokens(): return nn.Conv2d(1, 3, 3)
class Wrapped(nn.Sequential):
    def forward(self, x): return {"logits": super().forward(x)}
def wrapped(): return Wrapped(*three())
def words(): return type("Words", (nn.Module,), {"forward": lambda self, x: "cat"})()
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "my_networks.py"
    path.write_text(SOURCE)
    return path


def test_networks_from_python_code(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_file = load_model(f"py:{code}:three", None, CLASSES, SHAPE)
    monkeypatch.syspath_prepend(str(code.parent))
    from_module = load_model("py:my_networks:three", None, CLASSES, SHAPE)
    del sys.modules["my_networks"]
    assert same_weights(from_file.module, from_module.module)
    assert not from_file.module.training
    assert load_model(f"py:{code}:wrapped", None, CLASSES, SHAPE).classes == CLASSES


@pytest.mark.parametrize(
    ("name", "shape", "error", "message"),
    [
        ("three", (1, 9, 9), InputError, r"three does not take images of 1x9x9: mat1 and mat2 shapes"),
        ("tokens", SHAPE, InputError, r"the network must return logits \(B, K\), but returns a tensor \(2, 3, 6, 6\)"),
        ("words", SHAPE, InputError, "the network must return logits .* but returns str"),
        ("three", (4, 4, 4), None, ""),
    ],
)
def test_outputs_are_checked(
    code: Path, name: str, shape: tuple[int, int, int], error: type[Exception] | None, message: str
) -> None:
    if error is None:
        assert load_model(f"py:{code}:{name}", None, CLASSES, shape).input_shape == shape
        return
    with pytest.raises(error, match=message):
        load_model(f"py:{code}:{name}", None, CLASSES, shape)


def test_a_preprocessed_network_says_which_images_it_takes(tmp_path: Path) -> None:
    code = (
        "import pnc\nfrom pnc.models.reference_networks import cnn\n\n"
        "def own(): return pnc.Preprocessed(cnn((3, 8, 8), 3), (3, 8, 8))\n"
    )
    (tmp_path / "own.py").write_text(code)
    assert load_model(f"py:{tmp_path / 'own.py'}:own", classes=CLASSES).input_shape == (3, 8, 8)
    assert load_model(f"py:{tmp_path / 'own.py'}:own", None, CLASSES, (1, 5, 5)).input_shape == (1, 5, 5)


def test_names_must_fit_the_outputs(code: Path) -> None:
    with pytest.raises(MismatchError, match="three has 3 outputs, but 2 names were given; give one per output"):
        load_model(f"py:{code}:three", None, ["ant", "bee"], SHAPE)


def test_code_that_does_not_parse_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def f(: pass")
    with pytest.raises(InputError, match=r"cannot import .*broken\.py: invalid syntax"):
        load_model(f"py:{tmp_path / 'broken.py'}:f", None, CLASSES, SHAPE)


# ------------------------------------------------------------------------------------------------ own files
def test_a_saved_network_needs_nothing_else(network: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_model(network, path, {"test_accuracy": 0.5})
    loaded = load_model(str(path))
    assert (loaded.spec, loaded.classes, loaded.input_shape) == (SPEC, CLASSES, SHAPE)
    assert loaded.facts["test_accuracy"] == 0.5
    assert same_weights(loaded.module, network.module)
    images = torch.rand(4, *SHAPE)
    assert torch.equal(loaded.module(images), network.module(images))
    as_weights = load_model(SPEC, weights=path)
    assert same_weights(as_weights.module, network.module)
    assert as_weights.classes == CLASSES


def test_equal_networks_give_equal_bytes(network: LoadedModel, tmp_path: Path) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_model(network, paths[0], {"a": 1, "b": 2})
    network.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    save_model(load_model(str(paths[0])), paths[1], {"b": 2, "a": 1})
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_classes_and_shape_that_are_given_win(network: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_model(network, path, {})
    loaded = load_model(str(path), classes=["x", "y", "z"], input_shape=(1, 16, 16))
    assert (loaded.classes, loaded.input_shape) == (("x", "y", "z"), (1, 16, 16))
    with pytest.raises(MismatchError, match="2 names given for the 3 outputs of .*: ant, bee, cat"):
        load_model(str(path), classes=["x", "y"])
    with pytest.raises(InputError, match="is already a file of weights; give weights= only with another spec"):
        load_model(str(path), weights=path)


def test_a_file_does_not_run_the_code_that_it_names(code: Path, tmp_path: Path) -> None:
    path, spec = tmp_path / "a.safetensors", f"py:{code}:three"
    original = load_model(spec, None, CLASSES, SHAPE)
    save_model(original, path, {})
    with pytest.raises(InputError, match="give this spec yourself, and the file as weights="):
        load_model(str(path))
    assert same_weights(load_model(spec, weights=path).module, original.module)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"format": "pnc-clone"}, "holds 'pnc-clone', not a network"),
        ({"version": 2}, "has format version 2, this pnc reads 1"),
        ({"model": 3}, "the metadata of .* is damaged"),
        ({"classes": "abc"}, "is damaged"),
        ({"classes": [1, 2, 3]}, "is damaged"),
        ({"input_shape": None}, "is damaged"),
    ],
)
def test_strange_files_are_refused(network: LoadedModel, tmp_path: Path, facts: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.safetensors"
    save_model(network, path, {})
    tensors, good = read_tensors(path)
    write_tensors(path, tensors, {**good, **facts})
    with pytest.raises(FileFormatError, match=message):
        load_model(str(path))


def test_damaged_files_are_refused(network: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_model(network, path, {})
    whole = path.read_bytes()
    header = json.dumps({"__metadata__": {"pnc": "{"}}).encode()
    for broken in (whole[:-8], whole[:20], b"", b"not safetensors", struct.pack("<Q", len(header)) + header):
        path.write_bytes(broken)
        with pytest.raises(FileFormatError, match=re.escape(str(path))):
            load_model(str(path))


def test_an_unwritable_path_leaves_nothing(network: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write .*; choose a folder that exists"):
        save_model(network, tmp_path / "missing" / "a.safetensors", {})
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        save_model(network, tmp_path / "folder.safetensors", {})
    assert [path.name for path in tmp_path.iterdir()] == ["folder.safetensors"]


# ------------------------------------------------------------------------------------------------ others' files
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_plain_weights(network: LoadedModel, tmp_path: Path, suffix: str, prefix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    state = {prefix + name: tensor for name, tensor in network.module.state_dict().items()}
    if suffix == "pt":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    assert same_weights(load_model(SPEC, path, CLASSES, SHAPE).module, network.module)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_checkpoints_with_more_than_weights(network: LoadedModel, tmp_path: Path, key: str) -> None:
    torch.save({key: network.module.state_dict(), "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "a.pth")
    assert same_weights(load_model(SPEC, tmp_path / "a.pth", CLASSES, SHAPE).module, network.module)


class Payload:
    """A pickle that runs code."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("[][1]",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Payload(), "is not a checkpoint of only tensors"),
        ([1, 2], "has no state dict; save model.state_dict"),
        ({}, "has no state dict"),
        ({"epoch": 3}, "has no state dict"),
    ],
)
def test_checkpoints_without_weights_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(FileFormatError, match=message):
        load_model(SPEC, tmp_path / "a.pt", CLASSES, SHAPE)


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"PK\x03\x04broken"])
def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(FileFormatError, match="is not a checkpoint of only tensors"):
        load_model(SPEC, tmp_path / "a.pt", CLASSES, SHAPE)


def test_a_file_of_plain_weights_is_no_spec(network: LoadedModel, tmp_path: Path) -> None:
    safetensors.torch.save_file(network.module.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="does not name its network; give the spec, and this file as weights="):
        load_model(str(tmp_path / "a.safetensors"))


def test_weights_that_do_not_fit_are_named_and_nothing_is_changed(network: LoadedModel) -> None:
    before = take_snapshot(network.module)
    tensors = dict(network.module.state_dict())
    tensors["classifier.weight"] = torch.zeros(5, 16)
    del tensors["block1.0.weight"]
    tensors["head.bias"] = torch.zeros(5)
    with pytest.raises(MismatchError) as caught:
        load_tensors(network.module, tensors)
    assert str(caught.value) == (
        "weights: they do not fit the network; 1 missing: block1.0.weight; 1 unexpected: head.bias; "
        "1 of another shape: classifier.weight (5x16, the network's is 3x16); check the spec and the file"
    )
    assert not differences(network.module, before)


def test_long_lists_of_tensors_are_cut(network: LoadedModel) -> None:
    with pytest.raises(MismatchError, match=r"24 missing: normalize\.mean, normalize\.std, .*, \.\.\. \(24 in all\)"):
        load_tensors(network.module, {})


def test_counts_of_batches_may_be_missing(network: LoadedModel) -> None:
    state = {n: t for n, t in network.module.state_dict().items() if not n.endswith("num_batches_tracked")}
    other = build_model(SPEC, CLASSES, SHAPE, seed=9).module
    load_tensors(other, state)
    assert same_weights(network.module, other)


def test_every_scheme_builds_through_one_table() -> None:
    assert list(model_specs._SCHEMES) == ["zoo", "timm", "torchvision", "hf", "py", "pt2"]
