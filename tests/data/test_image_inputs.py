"""Images from files, folders, Pillow images, arrays and tensors, all read in the same way."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pnc.data.image_files import load_images
from pnc.data.image_inputs import find_images, read_images
from pnc.data.image_set import ImageSet
from pnc.data.normalization import Normalization
from pnc.foundation.errors import InputError

SHAPE = (3, 8, 8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Photos of several sizes and modes, in nested folders, one of them to be rotated."""
    (tmp_path / "more").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "b.png")
    Image.fromarray(pixels[:, :, 0]).save(tmp_path / "more" / "grey.png")
    Image.fromarray(pixels).convert("P").save(tmp_path / "more" / "palette.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels[:10, :7]).save(tmp_path / "a.jpg", exif=turned)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def read(images: Any, shape: tuple[int, ...] = SHAPE, normalization: Normalization | None = None) -> torch.Tensor:
    return read_images(find_images(images), shape, normalization)


def test_a_folder_is_all_images_in_it_and_below_by_path(photos: Path) -> None:
    found = find_images(photos)
    assert [one.path for one in found] == [
        str(photos / name) for name in ("a.jpg", "b.png", "more/grey.png", "more/palette.png")
    ]
    assert find_images([photos / "b.png", str(photos)])[0].path == str(photos / "b.png")


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8), (3, 6, 10)])
def test_files_pillow_images_and_arrays_give_the_same_pixels(photos: Path, shape: tuple[int, ...]) -> None:
    files = sorted(photos.rglob("*.[pj][np]g"))
    expected = load_images(files, shape).float() / 255
    assert torch.equal(read(photos, shape), expected)
    assert torch.equal(read([Image.open(file) for file in files], shape), expected)
    arrays = [np.asarray(Image.open(file)) for file in (photos / "b.png", photos / "more" / "grey.png")]
    assert torch.equal(read(arrays, shape), expected[1:3])
    assert torch.equal(read(np.stack([arrays[0]] * 2), shape), expected[[1, 1]])


def test_a_pillow_image_that_was_opened_knows_its_file(photos: Path) -> None:
    with Image.open(photos / "b.png") as photo:
        assert find_images(photo)[0].path == str(photos / "b.png")
    assert find_images(Image.new("L", (3, 3)))[0].path is None


def test_tensors_are_taken_as_they_are_and_bytes_scaled() -> None:
    images = torch.randint(0, 256, (3, *SHAPE), dtype=torch.uint8)
    normalized = torch.randn(2, *SHAPE)
    assert torch.equal(read(images), images.float() / 255)
    assert torch.equal(read(images[0]), images[:1].float() / 255)
    assert torch.equal(read([normalized, images[1]])[:2], normalized)
    assert torch.equal(read(ImageSet(images, torch.zeros(3, dtype=torch.int64), ("a",))), images.float() / 255)
    both = Normalization(0.5, (0.1, 0.2, 0.4))
    assert torch.equal(read(normalized, normalization=both), normalized), "normalized by its loader already"
    std = torch.tensor([0.1, 0.2, 0.4])[:, None, None]
    assert torch.equal(read(images, normalization=both), (images.float() / 255 - 0.5) / std)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images: expected at least one, got none"),
        ("no.png", "images: there is no file or folder no.png"),
        (3, "images: expected paths, Pillow images, uint8 arrays.* got int"),
        (torch.rand(8, 8), r"images: expected a tensor \(C, H, W\) or \(N, C, H, W\), got \(8, 8\)"),
        (torch.rand(3, 9, 8), r"images: expected tensors \(3, 8, 8\), as the network takes them, got \(3, 9, 8\)"),
        (np.zeros((8, 8, 3)), r"images: expected arrays .* of type uint8, got float64 \(8, 8, 3\)"),
        (np.zeros((3, 8, 8), np.uint8), r"images: expected arrays .* got uint8 \(3, 8, 8\)"),
        (Image.new("I;16", (8, 8)), r"images: an image has more than 8 bits per channel \(mode I;16\)"),
    ],
)
def test_what_is_no_image_is_refused(images: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(images)


def test_an_empty_folder_and_odd_channels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no image in it, such as a .jpg or a .png file"):
        find_images(tmp_path)
    with pytest.raises(InputError, match="have 1 or 3 channels, this network takes 4"):
        read(Image.new("RGB", (8, 8)), (4, 8, 8))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (float("nan"), 1, "mean: expected one number, or one for each channel"),
        ((), 1, "mean: expected one number"),
        (0, (1, 0), "std: expected numbers above 0, got 0"),
        ((0, 0), (1, 1, 1), "std: expected as many numbers as mean has, 2, or one; got 3"),
    ],
)
def test_normalizations_that_make_no_sense_are_refused(mean: Any, std: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Normalization(mean, std)


def test_a_normalization_is_undone() -> None:
    images = torch.rand(2, 3, 4, 4)
    one = Normalization((0.25, 0.5, 0.75), 0.5)  # powers of two: exact
    assert torch.equal(one.undo(one.apply(images.round(decimals=0))), images.round(decimals=0))
    with pytest.raises(InputError, match=r"mean: expected one number, or one for each of 1 channels; got \(0.25"):
        one.apply(images[:, :1])
