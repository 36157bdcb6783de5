"""Files of networks that ask for more than they hold: refused before memory is taken or weights are read."""

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pnc.data.image_store import MAX_IMAGE
from pnc.foundation.errors import FileFormatError, InputError, MismatchError
from pnc.foundation.tensor_files import METADATA_KEY, canonical_json, read_tensors, write_tensors
from pnc.models import model_specs, pretraining
from pnc.models.model_specs import build_model, load_model, save_model
from pnc.models.pretraining import Recipe


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_model(build_model("zoo:cnn?width=0.25", ["a", "b"], (1, 8, 8)), tmp_path / "n.safetensors", {})
    return tmp_path / "n.safetensors"


def changed(file: Path, **facts: Any) -> str:
    tensors, known = read_tensors(file)
    write_tensors(file, tensors, {**known, **facts})
    return str(file)


@pytest.mark.parametrize("shape", [[1, 60000, 60000], [1, 2**40, 2**40], [3, 4096, 4096], [1, 2**24 + 1, 1]])
def test_images_larger_than_any_are_refused(file: Path, shape: list[int]) -> None:
    with pytest.raises(InputError, match=f"input_shape: .* values; the maximum is {MAX_IMAGE}"):
        load_model(changed(file, input_shape=shape))


@pytest.mark.parametrize("shape", [[1, 0, 8], [1, 8], [True, 8, 8], [1.0, 8, 8], ["1", 8, 8], [-1, 8, 8], [[1], 8, 8]])
def test_shapes_that_are_none_are_refused(file: Path, shape: list[Any]) -> None:
    with pytest.raises(InputError, match="input_shape: expected three positive whole numbers"):
        load_model(changed(file, input_shape=shape))


def test_large_images_within_the_bound_take_no_memory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = torch.zeros

    def small(*sizes: Any, **settings: Any) -> torch.Tensor:
        tensor = made(*sizes, **settings)
        assert tensor.is_meta or tensor.numel() < 2**22
        return tensor

    monkeypatch.setattr(torch, "zeros", small)
    assert load_model(changed(file, input_shape=[1, 4096, 4096])).input_shape == (1, 4096, 4096)


@pytest.mark.parametrize(
    "spec",
    [
        "zoo:vit_tiny?dim=2048&depth=64",
        "zoo:resnet56?width=16",
        "zoo:mobilenetv2?width=16",
        "zoo:cnn?width=16",
        "zoo:resnet20",
    ],
)
def test_networks_larger_than_the_tensors_of_the_file_are_never_built(
    file: Path, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_specs, "load_tensors", None)
    started = time.monotonic()
    with pytest.raises(MismatchError, match="they do not fit the network"):
        load_model(changed(file, model=spec))
    assert time.monotonic() - started < 30  # vit_tiny of that size took 66 s and gigabytes


def test_a_file_without_a_digest_is_refused(file: Path) -> None:
    tensors, facts = read_tensors(file)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    safetensors.torch.save_file(zeros, file, {METADATA_KEY: canonical_json(facts)})
    with pytest.raises(FileFormatError, match="has no digest of the content"):
        load_model(str(file))


def test_sparse_files_of_others_are_compared_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for n_bytes in (1 << 31, 1 << 40):
        header = json.dumps({"x": {"dtype": "U8", "shape": [n_bytes], "data_offsets": [0, n_bytes]}}).encode()
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + n_bytes)
        with pytest.raises((MismatchError, FileFormatError)):
            load_model("zoo:cnn", path, ["a", "b"], (1, 8, 8))
    path.unlink()


def test_errors_of_a_function_are_not_taken_for_the_files(file: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def broken():\n    raise LookupError('own fault')\n")
    with pytest.raises(Exception, match="own fault") as caught:
        load_model(f"py:{tmp_path}/own.py:broken", file)
    assert not isinstance(caught.value, FileFormatError)


@pytest.mark.parametrize("history", [None, 5, [1], {"a": 1}])
def test_a_partial_file_with_wrong_facts_is_one_error(
    tmp_path: Path, history: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pnc.data.image_set import ImageSet

    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    train = ImageSet(images, torch.tensor([0, 1] * 4), ("a", "b"))
    test = ImageSet(images.flip(3), torch.tensor([0, 1] * 4), ("a", "b"))
    recipe, out = Recipe(epochs=1, batch_size=4), tmp_path / "o.safetensors"
    identity = pretraining._identity("zoo:cnn?width=0.25", train, test, recipe)
    write_tensors(tmp_path / "o.safetensors.partial.safetensors", {}, {"identity": identity, "history": history})
    with pytest.raises(FileFormatError, match="is damaged; remove the file to start training again"):
        pretraining.pretrain("zoo:cnn?width=0.25", train, test, recipe, out)
