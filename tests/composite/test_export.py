"""Exports: onnxruntime and torch compute the composite's logits from them; a failed export writes nothing."""

import copy
import json
import subprocess
import sys
import zipfile
from functools import cache

import numpy as np
import pytest
import torch

import hazards
import pnc
from handmade import Network, make_clone
from pnc.clones.branch import Scalars
from pnc.composite import export as export_file
from pnc.composite import program_files
from pnc.foundation.errors import InputError
from pnc.foundation.tensor_bits import same_bits
from pnc.models.model_specs import build_model

NAMES = tuple("abcde")
TOLERANCE = 1e-5
"""Tolerance of logits, relative to the largest one: kernels differ in the order of sums."""


def close(found, expected) -> bool:
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    scale = float(expected.abs().max().clamp_min(1))
    return found.shape == expected.shape and float((found - expected).abs().max()) <= TOLERANCE * scale


@cache
def network(spec, shape=(3, 16, 16)) -> Network:
    return Network(build_model(spec, NAMES, shape, seed=1).module, shape)


@pytest.fixture(scope="session")
def net(stage):
    """Two clones, one calibrated with a rival that is far more likely for every image; no test may change it."""
    made = pnc.attach(stage.target, *stage.clones[:2])
    width = stage.clones[0].branch.rivals.shape[1]
    rivals = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    rivals[0, -1] = 200
    made.rescale({stage.clones[0].name: Scalars(1.5, (0.25,), tuple(map(tuple, rivals.tolist())))})
    made.base_priority = 0.5
    return made


@pytest.fixture(scope="session")
def logits(stage, net):
    with torch.no_grad():
        found = net(stage.images)
    assert found[:, len(net.base_classes)].min() < -150, "the sigmoid of that is 0"
    return found


@pytest.fixture(scope="session")
def written(tmp_path_factory, net):
    """The results of the three kinds of export; no test may change them."""
    folder = tmp_path_factory.mktemp("exports")
    return {
        "onnx": pnc.export(net, folder / "net.onnx"),
        "pt2": pnc.export(net, folder / "net.pt2"),
        "split": pnc.export_split(net, folder / "parts"),
    }


def session_of(path):
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


# ------------------------------------------------------------------------------------------------------------- whole


def test_an_onnx_file_gives_the_logits_for_any_number_of_images(written, net, stage, logits):
    (path,) = written["onnx"].files
    session = session_of(path)
    assert [(one.name, one.shape) for one in session.get_inputs()] == [("images", ["batch", 1, 8, 8])]
    assert [(one.name, one.shape) for one in session.get_outputs()] == [("logits", ["batch", len(net.classes)])]
    for size in (1, 3, 5):
        (found,) = session.run(None, {"images": stage.images[:size].numpy()})
        assert close(found, logits[:size])
    assert 0 <= written["onnx"].difference <= program_files.TOLERANCE
    assert written["onnx"].n_bytes == path.stat().st_size


def test_a_pt2_file_gives_the_logits_and_is_a_network_again(written, stage, logits):
    (path,) = written["pt2"].files
    program = torch.export.load(path)
    assert all(close(program.module()(stage.images[:size]).detach(), logits[:size]) for size in (1, 3, 5))
    assert close(pnc.from_exported(program)(stage.images).detach(), logits)


def test_a_pt2_file_has_the_targets_weights_once_and_an_example_of_noise(written, stage):
    (path,) = written["pt2"].files
    program = torch.export.load(path)
    values = [tensor for tensor in program.state_dict.values() if tensor.dim() == 4]
    for weight in (one for one in stage.target.parameters() if one.dim() == 4):
        assert sum(torch.equal(weight, value) for value in values) == 1
    ((example,), _) = program.example_inputs
    assert torch.equal(example, torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)))


def test_files_say_what_they_hold(written, net, stage):
    (onnx,), (pt2,) = written["onnx"].files, written["pt2"].files
    facts = json.loads(session_of(onnx).get_modelmeta().custom_metadata_map["pnc"])
    assert facts["classes"] == list(net.classes) and facts["base_classes"] == list(net.base_classes)
    assert [(one["name"], one["classes"]) for one in facts["clones"]] == [
        (clone.name, list(clone.classes)) for clone in stage.clones[:2]
    ]
    first = stage.clones[0]
    assert facts["target"] == {"structure": first.target.structure, "weights": first.target.weights}
    assert facts["clones"][0]["source"]["weights"] == first.source.weights
    extra = {"pnc.json": ""}
    torch.export.load(pt2, extra_files=extra)
    assert json.loads(extra["pnc.json"]) == facts


def test_files_hold_no_paths(written):
    for path in [path for one in written.values() for path in one.files]:
        data = path.read_bytes()
        if path.suffix == ".pt2":
            with zipfile.ZipFile(path) as archive:
                data = b"".join(map(archive.read, archive.namelist()))
        assert b".py" not in data and b"site-packages" not in data


def test_the_composite_stays_as_it_was(stage, tmp_path):
    net = pnc.attach(stage.target, stage.clones[2])
    before, state = pnc.snapshot(stage.target, stage.images), torch.get_rng_state()
    tensors = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    expected, status = net(stage.images), net.status()
    pnc.export(net, tmp_path / "net.pt2")
    assert pnc.verify(stage.target, before).ok and torch.equal(state, torch.get_rng_state())
    assert all(same_bits(tensor, tensors[name]) for name, tensor in net.state_dict().items())
    assert same_bits(net(stage.images), expected) and net.status() == status


def test_what_is_enabled_is_exported(net, stage, tmp_path):
    with net.only(stage.clones[1].name):
        pnc.export(net, tmp_path / "one.pt2")
        expected = net(stage.images).detach()
    found = torch.export.load(tmp_path / "one.pt2").module()(stage.images).detach()
    assert close(found, expected)


# ------------------------------------------------------------------------------------------------------------- split


def test_parts_are_attached_and_detached(written, net, stage, logits):
    trunk, *clones = written["split"].files
    assert [path.name for path in written["split"].files][0] == "trunk.onnx"
    together = pnc.OnnxComposite(trunk, *clones)
    names = tuple(clone.name for clone in stage.clones[:2])
    assert (together.classes, together.clones, together.input_shape) == (net.classes, names, (1, 8, 8))
    images = stage.images.numpy()
    whole = together(images)
    assert whole.dtype == np.float32 and close(whole, logits)
    assert all(close(together(images[:size]), logits[:size]) for size in (1, 2))
    assert together.base_priority == net.base_priority == 0.5
    together.detach(names[0])
    assert together.clones == names[1:] and together.classes == (*net.base_classes, *stage.clones[1].classes)
    n_base, n_first = len(net.base_classes), len(stage.clones[0].classes)
    rest = together(images)
    assert np.array_equal(rest, np.delete(whole, range(n_base, n_base + n_first), 1))
    assert together.attach(clones[0].read_bytes()) == names[0]
    assert together.clones == names[::-1] and close(together(images)[:, -n_first:], whole[:, n_base:][:, :n_first])
    together.base_priority = 2.5
    assert close(together(images)[:, n_base:] + 2, rest_and_first(whole, n_base, n_first))


def rest_and_first(whole, n_base, n_first):
    """The new logits, the first clone's last."""
    return np.roll(whole[:, n_base:], -n_first, 1)


def test_a_later_clone_needs_a_trunk_that_gives_what_it_reads(written, net, stage, tmp_path):
    later = stage.clones[1].renamed("later", {"elk": "moose", "fox": "wolf"})
    _, path, deep = pnc.export_split(pnc.attach(stage.target, later, stage.clones[2]), tmp_path / "later").files
    trunk, *clones = written["split"].files
    together = pnc.OnnxComposite(trunk, *clones, path)
    assert together.classes == (*net.classes, "moose", "wolf")
    with pytest.raises(pnc.MismatchError, match=r"clone 'gnu' reads 'tap\..*', which this trunk does not output"):
        together.attach(deep)
    assert together.clones == (*net.clones, "later")


def with_facts(path, other, text):
    """A copy of an ONNX file with other metadata."""
    import onnx

    model = onnx.load(path)
    del model.metadata_props[:]
    if text is not None:
        model.metadata_props.add(key="pnc", value=text)
    onnx.save(model, other)
    return other


def test_parts_that_do_not_fit_are_refused(written, stage, tmp_path):
    trunk, first, _ = written["split"].files
    together = pnc.OnnxComposite(trunk, first)
    with pytest.raises(pnc.InputError, match="is attached already; detach it first"):
        together.attach(first)
    with pytest.raises(pnc.InputError, match=r"there is no clone 'zebra'; attached: "):
        together.detach("zebra")
    with pytest.raises(pnc.FileFormatError, match=r"clone: expected a clone of pnc.export_split; .* is a trunk"):
        together.attach(trunk)
    with pytest.raises(pnc.FileFormatError, match="trunk: expected a trunk of .* is a whole"):
        pnc.OnnxComposite(written["onnx"].files[0])
    with pytest.raises(pnc.FileFormatError, match="clone: there is no file .*nowhere.onnx"):
        together.attach(tmp_path / "nowhere.onnx")
    with pytest.raises(pnc.FileFormatError, match=r"other.onnx was not written by pnc.export_split"):
        together.attach(with_facts(first, tmp_path / "other.onnx", None))
    with pytest.raises(pnc.FileFormatError, match=r"other.onnx: its metadata is damaged"):
        together.attach(with_facts(first, tmp_path / "other.onnx", '{"version": 1'))
    with pytest.raises(pnc.FileFormatError, match=r"other.onnx has version 99 of its format; this pnc reads up to 1"):
        together.attach(with_facts(first, tmp_path / "other.onnx", '{"version": 99}'))
    with pytest.raises(pnc.MismatchError, match=r"clone 'x' was exported for another target"):
        facts = {"version": 1, "kind": "clone", "name": "x", "classes": ["y"], "base_classes": [], "target": {}}
        together.attach(with_facts(first, tmp_path / "other.onnx", json.dumps(facts)))
    with pytest.raises(pnc.FileFormatError, match=r"onnxruntime cannot read the given 5 bytes: "):
        together.attach(b"bytes")
    assert together.clones == (stage.clones[0].name,)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 1, 8, 8)),
        np.zeros((1, 8, 8), np.float32),
        np.zeros((2, 3, 8, 8), np.float32),
        torch.zeros(2, 1, 8, 8),
    ],
    ids=["float64", "one image", "colours", "tensor"],
)
def test_other_images_are_refused_by_the_loader(written, images):
    together = pnc.OnnxComposite(written["split"].files[0])
    with pytest.raises(pnc.InputError, match=r"images: expected float32, \(B, 1, 8, 8\); got "):
        together(images)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import numpy as np
import pnc
net = pnc.OnnxComposite(*sys.argv[1:])
images = np.random.default_rng(0).random((2, *net.input_shape), dtype=np.float32)
print(len(net.classes), net(images).shape)
"""


def test_the_loader_needs_no_torch(written, net):
    paths = [str(path) for path in written["split"].files]
    run = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *paths], check=True, capture_output=True, text=True)
    assert run.stdout == f"{len(net.classes)} (2, {len(net.classes)})\n"


def test_every_clone_has_a_file_of_its_own(tmp_path):
    taken = {"trunk.onnx": b""}
    for name in ("dog, frog", "dog frog", "trunk", "DOG_FROG", "../..", "nul", "\u732b" * 120):
        taken[export_file._file_name(name, taken, tmp_path / "new")] = b""
    found = list(taken)[1:]
    assert found[:5] == ["dog_frog.onnx", "dog_frog_2.onnx", "trunk_2.onnx", "DOG_FROG_3.onnx", "clone.onnx"]
    assert found[5] == "nul_.onnx" and len(found[6].encode()) < 120


def test_a_split_export_keeps_files_of_other_clones(stage, tmp_path):
    for name in ("pets, dogs", "pets_dogs", "pets, dogs"):
        made = pnc.export_split(pnc.attach(stage.target, stage.clones[0].renamed(name)), tmp_path)
    assert [path.name for path in made.files] == ["trunk.onnx", "pets_dogs.onnx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pets_dogs.onnx", "pets_dogs_2.onnx", "trunk.onnx"]
    assert pnc.OnnxComposite(tmp_path / "trunk.onnx", tmp_path / "pets_dogs_2.onnx").clones == ("pets_dogs",)


def test_arguments_of_the_composite_in_onnxruntime_are_checked(written):
    trunk, *clones = written["split"].files
    for wrong in ("CPUExecutionProvider", ["Foo"]):
        with pytest.raises(InputError, match="providers: expected a list of some of .*CPUExecutionProvider"):
            pnc.OnnxComposite(trunk, providers=wrong)
    with pytest.raises(InputError, match="options: expected an onnxruntime.SessionOptions; got int"):
        pnc.OnnxComposite(trunk, options=3)
    found = pnc.OnnxComposite(trunk, *clones)
    for nats in (float("nan"), float("inf"), "1", True, 1e300):
        with pytest.raises(InputError, match="base_priority: expected a finite number"):
            found.base_priority = nats
    assert found.base_priority == 0.5


@pytest.mark.parametrize("path", [None, "a\0b.onnx"])
def test_what_is_no_path_is_one_line(net, path):
    with pytest.raises(InputError, match="path: "):
        pnc.export(net, path)
    with pytest.raises(InputError, match="folder: "):
        pnc.export_split(net, path)


def test_a_folder_in_the_place_of_a_file_is_seen_before_any_file_is_written(stage, tmp_path):
    (tmp_path / "trunk.onnx").mkdir()
    with pytest.raises(InputError, match="folder: .*trunk.onnx, which is a folder"):
        pnc.export_split(pnc.attach(stage.target, stage.clones[0]), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["trunk.onnx"]


# ------------------------------------------------------------------------------------------------------ other networks


def with_two_clones(target, source, places):
    target, source = network(target), network(source)
    clones = [
        make_clone(target, source, "one", places=places),
        make_clone(target, source, "two", places=(0, 0), seed=1),
    ]
    net, images = pnc.attach(target.module, *clones), torch.rand(4, *target.shape)
    with torch.no_grad():
        return net, images.numpy(), net(images)


def test_clones_in_a_vision_transformer(tmp_path):
    net, images, expected = with_two_clones("zoo:vit_tiny?depth=2", "zoo:cnn?width=0.25", (3, 1))
    (path,) = pnc.export(net, tmp_path / "net.onnx").files
    (found,) = session_of(path).run(None, {"images": images})
    assert close(found, expected)


def test_clones_of_a_vision_transformer(tmp_path):
    net, images, expected = with_two_clones("zoo:cnn?width=0.25", "zoo:vit_tiny?depth=2", (2, 3))
    parts = pnc.OnnxComposite(*pnc.export_split(net, tmp_path / "parts").files)
    assert close(parts(images), expected)


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("name", ["net.pt", "net.pth", "net.ts", "net.torchscript"])
def test_torchscript_is_refused(net, tmp_path, name):
    with pytest.raises(
        pnc.InputError, match=r"path: .* asks for TorchScript, which torch has deprecated; use .pt2 or .onnx"
    ):
        pnc.export(net, tmp_path / name)


def test_wrong_paths_are_refused(net, tmp_path):
    with pytest.raises(pnc.InputError, match=r"path: expected a file that ends in .onnx or .pt2, got .*net.bin"):
        pnc.export(net, tmp_path / "net.bin")
    with pytest.raises(pnc.InputError, match=r"path: .* is not in an existing folder"):
        pnc.export(net, tmp_path / "no" / "net.pt2")
    (tmp_path / "net.pt2").mkdir()
    with pytest.raises(pnc.InputError, match=r"path: .*net.pt2 is a folder"):
        pnc.export(net, tmp_path / "net.pt2")
    (tmp_path / "file").write_text("")
    with pytest.raises(pnc.InputError, match=r"folder: .*file is a file; a split export writes several"):
        pnc.export_split(net, tmp_path / "file")
    with pytest.raises(pnc.InputError, match=r"folder: .*net.onnx looks like a file"):
        pnc.export_split(net, tmp_path / "net.onnx")
    with pytest.raises(pnc.InputError, match=r"folder: .*no does not exist; create it first"):
        pnc.export_split(net, tmp_path / "no" / "parts")


def test_other_networks_than_composites_are_refused(net, stage, tmp_path):
    for wrong in (stage.target, net.fused()):
        with pytest.raises(pnc.InputError, match="net: expected a composite, as returned by pnc.attach; got "):
            pnc.export(wrong, tmp_path / "net.pt2")
    with pytest.raises(pnc.InputError, match=r"in float32 on the CPU, got float64 on cpu; export copy.deepcopy"):
        pnc.export(copy.deepcopy(net).double(), tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_line(net, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(pnc.InputError, match=rf'{package} is needed for ONNX files; pip install "pnc\[export\]"$'):
        pnc.export(net, tmp_path / "net.onnx")


# --------------------------------------------------------------------------------------------------------------- failed


def failing(net, tmp_path, name="net.pt2") -> str:
    """The message of a failing export; checks that the existing file is kept and no other is written."""
    path = tmp_path / name
    path.write_text("before")
    with pytest.raises(pnc.ExportError, match="^net cannot be exported: .*nothing was written") as caught:
        pnc.export(net, path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_logits_are_refused(net, tmp_path, monkeypatch):
    monkeypatch.setattr(program_files, "TOLERANCE", -1.0)
    monkeypatch.setattr(program_files, "OWN_ERRORS", -1.0)
    assert "on a batch of 1 its logits differ by" in failing(net, tmp_path)


def test_differences_as_large_as_the_composites_own_rounding_are_accepted(net, tmp_path, monkeypatch):
    monkeypatch.setattr(program_files, "TOLERANCE", 0.0)
    monkeypatch.setattr(program_files, "OWN_ERRORS", 100.0)
    with net.only(net.clones[1]):
        made = pnc.export(net, tmp_path / "net.onnx")
    assert 0 < made.difference < TOLERANCE
    wrong = lambda images: torch.ones(len(images), 2)  # noqa: E731
    with pytest.raises(pnc.ExportError, match="more than 0, and those in PyTorch by 0 from exact ones"):
        program_files.largest_difference(wrong, lambda _: torch.zeros(1, 2), lambda _: torch.zeros(1, 2), torch.ones(5))


def test_a_split_export_that_is_refused_leaves_nothing(net, tmp_path, monkeypatch):
    monkeypatch.setattr(export_file, "onnx_bytes", lambda *_: b"")
    monkeypatch.setattr(export_file, "OnnxComposite", lambda *_: lambda images: np.zeros((len(images), 6), np.float32))
    with pytest.raises(pnc.ExportError, match="on a batch of 1 its logits differ by .*; nothing was written"):
        pnc.export_split(net, tmp_path / "parts")
    assert not list(tmp_path.iterdir())


def test_a_fixed_number_of_images_is_refused(net, tmp_path, monkeypatch):
    monkeypatch.setattr(
        export_file, "as_program", lambda module, example: torch.export.export(module, example, strict=False)
    )
    assert "the export cannot be run on a batch of 1" in failing(net, tmp_path)


def test_logits_that_are_no_numbers_are_refused(stage, tmp_path):
    target = copy.deepcopy(stage.target)
    with torch.no_grad():
        next(iter(target.parameters())).fill_(torch.inf)
    net = pnc.attach(target, stage.clones[0], allow_mismatch=True)
    with pytest.raises(pnc.PNCError):
        pnc.export(net, tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def test_what_torch_cannot_export_has_its_reason(net, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such operation\nmore") from ValueError("the cause\nmore")

    monkeypatch.setattr(torch.onnx, "export", broken)
    assert "it cannot be written as ONNX: ValueError: the cause; nothing" in failing(net, tmp_path, "net.onnx")


def test_a_folder_that_cannot_be_written_to_stays_as_it_was(net, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "trunk.onnx").write_text("before")
    monkeypatch.setattr(export_file, "write_file", full)
    monkeypatch.setattr(export_file, "onnx_bytes", lambda *_: b"")
    monkeypatch.setattr(export_file, "OnnxComposite", lambda *_: None)
    monkeypatch.setattr(export_file, "largest_difference", lambda *_: 0.0)
    with pytest.raises(pnc.InputError, match="cannot write .*parts: No space left on device"):
        pnc.export_split(net, tmp_path / "parts")
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]
    assert (tmp_path / "parts" / "trunk.onnx").read_text() == "before"


@pytest.mark.parametrize(
    "name", ["Hooked", "Parametrized", "WeightNormalized", "OverwrittenInput", "DynamicWeights", "Windows"]
)
def test_targets_with_hazards_are_exported(name, tmp_path):
    target = Network(hazards.build(hazards.REPRODUCED[name]))
    net = pnc.attach(target.module, make_clone(target, target, "one"))
    pnc.export(net, tmp_path / "net.pt2")
    images = hazards.images(3)
    with torch.no_grad():
        assert close(torch.export.load(tmp_path / "net.pt2").module()(images), net(images))
