import importlib
import json
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import pnc
from digits import BASE, NEW, pair
from pnc.cli import app
from pnc.foundation.errors import InputError, MismatchError
from pnc.foundation.network_state import differences, take_snapshot
from pnc.foundation.tensor_bits import same_bits
from pnc.graph.recording import record
from pnc.models import library_networks
from pnc.models.model_specs import LoadedModel, build_model, has_own_weights, load_model, save_model
from pnc.models.preprocessing import Preprocessed

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Libraries:
    torchvision: Any
    timm: Any
    transformers: Any


@pytest.fixture(scope="module")
def libs(torchvision: Any) -> Libraries:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, when they are imported
        modules = [importlib.import_module(name) for name in ("timm", "transformers", "transformers.models.auto")]
        for name in ("AutoModelForImageClassification", "AutoImageProcessor", "ResNetForImageClassification"):
            getattr(modules[1], name)
    return Libraries(torchvision, *modules[:2])


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def preprocessed(model: LoadedModel) -> Preprocessed:
    assert isinstance(model.module, Preprocessed)
    return model.module


def normalised(model: LoadedModel) -> tuple[tuple[float, ...], tuple[float, ...]]:
    wrapped = preprocessed(model)
    assert wrapped.mean is not None and wrapped.std is not None
    rounded = [tuple(round(value, 6) for value in part.flatten().tolist()) for part in (wrapped.mean, wrapped.std)]
    return rounded[0], rounded[1]


# ------------------------------------------------------------------------------------------------ timm
def test_a_network_of_timm_comes_with_what_its_config_says(libs: Libraries) -> None:
    model = load_model("timm:resnet10t?pretrained=false&size=64")
    assert (model.input_shape, len(model.classes)) == ((3, 64, 64), 1000)
    assert model.classes[:2] == ("tench", "goldfish")
    assert (model.classes[134], model.classes[517]) == ("crane (134)", "crane (517)")
    assert (normalised(model), preprocessed(model).interpolation) == (IMAGENET, "bicubic")
    assert not any(module.training for module in model.module.modules())
    x = images(2, 3, 64, 64)
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    with torch.no_grad():
        assert same_bits(model.module(x), preprocessed(model).network((x - mean) / std))
    assert load_model("timm:resnet10t?pretrained=false").input_shape == (3, 176, 176)


def test_the_shape_of_the_images_is_not_that_of_the_network(libs: Libraries) -> None:
    model = load_model("timm:resnet10t?pretrained=false&size=64", classes=["a", "b"], input_shape=(1, 8, 8))
    assert (model.input_shape, preprocessed(model).input_shape, model.classes) == ((1, 8, 8), (3, 64, 64), ("a", "b"))
    x = images(3, 1, 8, 8)
    recording = record(model.module, x)
    with torch.no_grad():
        logits = model.module(x)
        assert logits.shape == (3, 2)
        assert same_bits(recording.module(x.clone()), logits)


def test_networks_of_fixed_size_are_built_for_it(libs: Libraries) -> None:
    model = load_model("timm:deit_tiny_patch16_224?pretrained=false&size=32", classes=["a", "b"])
    assert model.input_shape == (3, 32, 32)
    assert preprocessed(model).network.get_parameter("pos_embed").shape[1] == 1 + 2 * 2


def test_the_seed_decides_random_weights_and_the_global_state_stays(libs: Libraries) -> None:
    spec = "timm:resnet10t?pretrained=false&size=32&in_chans=1"
    state = torch.get_rng_state()
    one, same, other = (build_model(spec, BASE, None, seed).module for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert not differences(one, take_snapshot(same))
    assert differences(one, take_snapshot(other))
    assert isinstance(one, Preprocessed) and one.input_shape == (1, 32, 32)


def test_weights_of_a_file_need_no_download(libs: Libraries, tmp_path: Path) -> None:
    spec = "timm:resnet10t?size=32"  # pretrained, did the file not stand in for it
    made = build_model(spec, ["a", "b"], (3, 16, 16), seed=3)
    torch.save(preprocessed(made).network.state_dict(), tmp_path / "a.pt")
    save_model(made, tmp_path / "a.safetensors", {})
    plain = load_model(spec, tmp_path / "a.pt", ["a", "b"], (3, 16, 16))
    own = load_model(spec, tmp_path / "a.safetensors")
    assert (own.classes, own.input_shape) == (("a", "b"), (3, 16, 16))
    for model in (plain, own):
        assert not differences(model.module, take_snapshot(made.module))
    with pytest.raises(InputError, match="give this spec yourself, and the file as weights="):
        load_model(str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"label_names": ["ant", "bee"]}, ("ant", "bee")),
        (
            {"label_names": ["n1", "n2"], "label_descriptions": {"n1": "ant, emmet", "n2": "ant"}},
            ("ant (0)", "ant (1)"),
        ),
    ],
)
def test_a_local_folder_of_timm(libs: Libraries, tmp_path: Path, labels: dict[str, Any], expected: Any) -> None:
    torch.manual_seed(0)
    network = libs.timm.create_model("resnet10t", num_classes=2)
    config = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 32, 32], "interpolation": "bilinear", **labels}
    libs.timm.models.save_for_hf(network, tmp_path, model_config={"pretrained_cfg": {**config, "num_classes": 2}})
    model = load_model(f"timm:local-dir:{tmp_path}")
    assert (model.classes, model.input_shape) == (expected, (3, 32, 32))
    assert (normalised(model), preprocessed(model).interpolation) == (((0.5,) * 3, (0.25,) * 3), "bilinear")
    assert not differences(preprocessed(model).network, take_snapshot(network.eval()))


def test_without_names_they_are_asked_for(libs: Libraries, tmp_path: Path) -> None:
    network = libs.timm.create_model("resnet10t", num_classes=2)
    libs.timm.models.save_for_hf(network, tmp_path, model_config={"pretrained_cfg": {"num_classes": 2}})
    spec = f"timm:local-dir:{tmp_path}"
    with pytest.raises(InputError, match="does not name its outputs; give their names in order as classes="):
        load_model(spec)
    assert load_model(spec, classes=["ant", "bee"], input_shape=(3, 32, 32)).classes == ("ant", "bee")
    with pytest.raises(MismatchError, match="has 2 outputs, but 3 names were given"):
        load_model(spec, classes=["ant", "bee", "cat"], input_shape=(3, 32, 32))


# ------------------------------------------------------------------------------------------------ torchvision
def test_a_network_of_torchvision_comes_with_what_its_weights_say(libs: Libraries) -> None:
    model = load_model("torchvision:shufflenet_v2_x0_5?pretrained=false&size=64")
    assert (model.input_shape, len(model.classes), model.classes[0]) == ((3, 64, 64), 1000, "tench")
    assert (normalised(model), preprocessed(model).interpolation) == (IMAGENET, "bilinear")
    assert load_model("torchvision:shufflenet_v2_x0_5?pretrained=false").input_shape == (3, 224, 224)
    other = load_model("torchvision:vit_b_16?pretrained=false&size=32&weights=IMAGENET1K_SWAG_E2E_V1", classes=BASE)
    assert (other.classes, preprocessed(other).interpolation) == (BASE, "bicubic")
    assert preprocessed(other).network.get_submodule("encoder").get_parameter("pos_embedding").shape[1] == 1 + 2 * 2


def test_its_weights_are_the_librarys(libs: Libraries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    made = preprocessed(build_model("torchvision:shufflenet_v2_x0_5?size=32", None, None, seed=5)).network
    url = libs.torchvision.models.get_model_weights("shufflenet_v2_x0_5").DEFAULT.url
    cached = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(made.state_dict(), cached)
    model = load_model("torchvision:shufflenet_v2_x0_5?size=32")
    assert not differences(preprocessed(model).network, take_snapshot(made))
    with pytest.raises(MismatchError, match="has 1000 outputs, but 2 names were given"):
        load_model("torchvision:shufflenet_v2_x0_5?size=32", classes=["a", "b"])


# ------------------------------------------------------------------------------------------------ transformers
def saved(libs: Libraries, folder: Path, names: tuple[str, ...] | None = NEW, **settings: Any) -> nn.Module:
    """A tiny classifier for images of 32x32 with its image processor, as `save_pretrained` writes them."""
    transformers = libs.transformers
    labels = {} if names is None else {"id2label": dict(enumerate(names))}
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    network = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, **labels)).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)  # no answer is like another
    network.save_pretrained(folder)
    kind = settings.pop("kind", "ViTImageProcessor")
    getattr(transformers, kind)(**{"size": {"height": 32, "width": 32}, **settings}).save_pretrained(folder)
    return network  # type: ignore[no-any-return]


def test_a_local_folder_of_transformers(libs: Libraries, tmp_path: Path) -> None:
    network = saved(libs, tmp_path)
    model = load_model(f"hf:{tmp_path}")
    assert (model.classes, model.input_shape) == (NEW, (3, 32, 32))
    assert (normalised(model), preprocessed(model).interpolation) == (((0.5,) * 3, (0.5,) * 3), "bilinear")
    assert not differences(preprocessed(model).network, take_snapshot(network))
    assert has_own_weights(f"hf:{tmp_path}") and not has_own_weights(f"hf:{tmp_path}?pretrained=false")
    untrained = load_model(f"hf:{tmp_path}?pretrained=false&size=16", classes=["a", "b"])
    assert (untrained.classes, untrained.input_shape) == (("a", "b"), (3, 16, 16))


@pytest.mark.parametrize(
    "settings",
    [
        {"resample": 3},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3},
        {"kind": "LevitImageProcessor", "size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}},
        {"kind": "MobileViTImageProcessor", "size": {"shortest_edge": 32}, "do_center_crop": False},
    ],
)
def test_the_image_processor_is_followed(libs: Libraries, tmp_path: Path, settings: dict[str, Any]) -> None:
    network = saved(libs, tmp_path, **settings)
    model = load_model(f"hf:{tmp_path}")
    processor = libs.transformers.AutoImageProcessor.from_pretrained(tmp_path)
    picture = Image.fromarray((images(32, 32, 3) * 255).byte().numpy())
    pixels = processor(images=[picture], return_tensors="pt", do_resize=False, do_center_crop=False)["pixel_values"]
    x = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected, found = network(pixels).logits, preprocessed(model)(x).logits
    # The processor scales and normalises in another order of the same float32 operations.
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_a_processor_with_a_twist_of_its_own_is_refused(libs: Libraries, tmp_path: Path) -> None:
    saved(libs, tmp_path, kind="EfficientNetImageProcessor", include_top=True, image_std=[0.25] * 3)
    with pytest.raises(InputError, match="does more than resize, crop, scale and normalise; wrap"):
        load_model(f"hf:{tmp_path}")


def test_placeholder_names_are_not_taken_for_names(libs: Libraries, tmp_path: Path) -> None:
    saved(libs, tmp_path, names=None)
    with pytest.raises(InputError, match="does not name its outputs"):
        load_model(f"hf:{tmp_path}")
    assert load_model(f"hf:{tmp_path}", classes=["ant", "bee"]).classes == ("ant", "bee")


def test_names_that_come_twice_get_their_index(libs: Libraries, tmp_path: Path) -> None:
    saved(libs, tmp_path, names=("crane", "dog, hound", "crane"))
    assert load_model(f"hf:{tmp_path}").classes == ("crane (0)", "dog, hound", "crane (2)")


def test_weights_without_a_classifier_are_refused(libs: Libraries, tmp_path: Path) -> None:
    saved(libs, tmp_path)
    libs.transformers.ResNetModel.from_pretrained(tmp_path).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no weights for classifier\S+, so its answers would be random"):
        load_model(f"hf:{tmp_path}")


def test_a_folder_without_image_processor_is_refused(libs: Libraries, tmp_path: Path) -> None:
    saved(libs, tmp_path)
    for path in tmp_path.glob("*processor_config.json"):
        path.unlink()
    with pytest.raises(
        InputError, match="image processor.*; give an ID of the hub, or a folder with network and image"
    ):
        load_model(f"hf:{tmp_path}")


# ------------------------------------------------------------------------------------------------ refused
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:resnet10", "there is no model of timm 'resnet10' (did you mean 'resnet10t'?); there are "),
        ("timm:resnet18.a1_in2k", "'resnet18.a1_in2k' (did you mean 'resnet18.a1_in1k'?); there are resnet18.a1_in1k"),
        ("timm:owner/name", "there is no model of timm 'owner/name'"),
        ("timm:local-dir:no/such/folder", "timm cannot load timm:local-dir:no/such/folder: Config file not found"),
        ("timm:resnet10t?sise=3", "timm: there is no option 'sise' (did you mean 'size'?); there are pretrained, size"),
        ("timm:resnet10t?size=big", "size=big: expected a whole number above 0"),
        ("timm:resnet10t?size=0", "size=0: expected a whole number above 0"),
        ("timm:resnet10t?pretrained=no", "pretrained=no: expected true or false"),
        ("timm:vit_small_patch14_dinov2?pretrained=false&size=28", "has no classifier; choose a network with one"),
        ("torchvision:renset18", "there is no classifier of torchvision 'renset18' (did you mean 'resnet18'?)"),
        ("torchvision:fasterrcnn_resnet50_fpn", "there is no classifier of torchvision 'fasterrcnn_resnet50_fpn'"),
        ("torchvision:resnet18?weights=V3", "there is no entry of weights 'V3'; there are IMAGENET1K_V1"),
        ("hf:no/such/folder", "transformers cannot load hf:no/such/folder: "),
    ],
)
def test_bad_specs_are_refused(libs: Libraries, spec: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_model(spec)


def test_without_a_network_there_is_one_clear_error(
    libs: Libraries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known\nand more")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    monkeypatch.setattr(libs.transformers.AutoConfig, "from_pretrained", fail)
    for spec in ("timm:resnet10t", "torchvision:shufflenet_v2_x0_5"):
        with pytest.raises(InputError) as caught:
            load_model(spec)
        assert str(caught.value) == (
            f"model: {spec.split(':')[0]} cannot load {spec}: Name or service not known; "
            "weights=FILE or ?pretrained=false need no download"
        )
    with pytest.raises(InputError, match="^model: transformers cannot load hf:a/b: Name or service not known; give an"):
        load_model("hf:a/b")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("x"), 'the package timm is needed for this; pip install "pnc[models]"'),
        (RuntimeError("operator x::nms\nand more"), "installed but cannot be imported (operator x::nms); install the"),
    ],
)
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(library_networks.importlib, "import_module", fail)
    with pytest.raises(InputError, match=re.escape(message)):
        load_model("timm:resnet18")


# ------------------------------------------------------------------------------------------------ command line
def command(words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["pnc", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    return int(stopped.value.code or 0)


def test_cuts_of_a_network_of_a_library(libs: Libraries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"cuts timm:resnet10t?pretrained=false&size=32 --input-shape 1,8,8 --json {tmp_path / 'c.json'}"
    assert command(words, monkeypatch) == 0
    facts = json.loads((tmp_path / "c.json").read_text())
    assert (facts["classifier"], facts["cuts"][0]["shape"]) == ("network.fc", [1, 8, 8])


def test_clone_of_a_network_of_a_library(
    libs: Libraries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(libs, tmp_path / "hf")
    save_model(pair().target, tmp_path / "t.safetensors", {})
    networks = f"--source hf:{tmp_path / 'hf'} --target {tmp_path / 't.safetensors'} --data digits"
    assert command(f"clone {networks} --out {tmp_path / 'c'} --classes 6,8 --max-macs 1", monkeypatch) == 0
    assert (pnc.inspect(tmp_path / "c")["classes"], pnc.inspect(tmp_path / "c")["kind"]) == (["6", "8"], "thin")
    assert command(f"eval {tmp_path / 'c'} {networks} --json {tmp_path / 'e.json'}", monkeypatch) == 0
    facts = json.loads((tmp_path / "e.json").read_text())
    assert facts["base_logits_equal"] is True
    assert facts["classes"] == [*BASE, "6", "8"]

    capsys.readouterr()
    untrained = networks.replace(f"{tmp_path / 'hf'}", f"{tmp_path / 'hf'}?pretrained=false")
    assert command(f"clone {untrained} --out {tmp_path / 'd'}", monkeypatch) == 2
    assert "has random weights; give --source-weights, or a file of `pnc pretrain`" in capsys.readouterr().err
