"""Clone files whose metadata claims more than they hold, or other image sizes, are refused before any work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pnc
from pnc.clones import clone_file
from pnc.foundation import tensor_files
from pnc.foundation.errors import FileFormatError, MismatchError
from pnc.foundation.tensor_files import read_tensors, write_tensors
from pnc.graph.dry_run import shapes_without_values


class Net(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Linear(6, k)

    def forward(self, images: Tensor) -> Any:
        return self.fc(self.norm(self.conv(images)).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return Net(2).eval(), Net(2).eval()


@pytest.fixture
def file(networks: tuple[nn.Module, nn.Module], tmp_path: Path) -> Path:
    levels = torch.linspace(0, 1, 32).reshape(32, 1, 1, 1)
    images = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * levels
    labels = [name for name in "abcd" for _ in range(8)]
    made = pnc.clone(*networks, (images, labels), source_classes=["c", "d"], base_classes=["a", "b"])
    pnc.save(made, tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


def forged(file: Path, shape: list[int]) -> Path:
    """The same file with another image size and a correct digest."""
    tensors, facts = read_tensors(file)
    for role in ("source", "target"):
        facts[role]["input_shape"] = shape
    write_tensors(file, tensors, facts)
    return file


@pytest.fixture
def never_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise AssertionError("the source was run on images of that size")

    monkeypatch.setattr(clone_file, "record", refuse)


@pytest.mark.usefixtures("never_recorded")
@pytest.mark.parametrize("shape", [[1, 1024, 1024], [1, 4096, 4096], [1, 1, 2**20], [3, 1000, 1000]])
def test_an_image_size_that_gives_no_tensor_of_the_right_shape(
    networks: tuple[nn.Module, nn.Module], file: Path, shape: list[int]
) -> None:
    with pytest.raises((MismatchError, pnc.RecordingError, AssertionError)) as caught:
        pnc.load(forged(file, shape), source=networks[0])
    if shape[0] == 1:  # with three channels, recording fails first
        assert "this source has no tensor of that shape" in str(caught.value)


@pytest.mark.usefixtures("never_recorded")
def test_the_caller_bounds_the_images(networks: tuple[nn.Module, nn.Module], file: Path) -> None:
    for shape in ((1, 28, 28), [3, 8, 8]):
        with pytest.raises(MismatchError, match=r"is for images \(1, 8, 8\), not "):
            pnc.load(file, source=networks[0], input_shape=shape)


def test_the_right_images_are_accepted(networks: tuple[nn.Module, nn.Module], file: Path) -> None:
    assert pnc.load(file, source=networks[0], input_shape=[1, 8, 8]).input_shape == (1, 8, 8)


@pytest.mark.parametrize("change", ["metadata", "shape", "another tensor", "missing"])
def test_damage_outside_the_values_is_found_before_they_are_read(
    file: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, facts = read_tensors(file)
    name = next(name for name in tensors if name.startswith("head."))
    if change == "metadata":
        facts["classes"] = ["c", "d", "e"]
    elif change == "shape":
        tensors[name] = torch.zeros(7, 7, 7)
    elif change == "another tensor":
        tensors["x"] = torch.zeros(1)
    else:
        del tensors[name]
    write_tensors(file, tensors, facts)
    monkeypatch.setattr(tensor_files, "_read_tensor", None)
    with pytest.raises(FileFormatError, match="damaged"):
        pnc.inspect(file)


# --------------------------------------------------------------------------------------------------- dry run
class Reads(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images if images.mean() > 0 else -images


def test_shapes_are_those_of_a_real_run_and_the_network_is_unchanged() -> None:
    network = Net(3).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    shapes = shapes_without_values(network, (1, 5, 7))
    assert shapes is not None
    assert {(1, 5, 7), (6, 5, 7), (6,), (3,)} <= shapes
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(tensor.is_meta for tensor in network.state_dict().values())


def test_a_network_that_reads_values_has_no_dry_run() -> None:
    assert shapes_without_values(Reads(), (1, 4, 4)) is None
    assert shapes_without_values(Net(2), (3, 4, 4)) is None


def test_huge_images_take_no_memory() -> None:
    for shape in ((1, 2**20, 2**20), (1, 4096, 4096)):
        found = shapes_without_values(Net(2), shape)
        assert found is not None and (6, *shape[1:]) in found
