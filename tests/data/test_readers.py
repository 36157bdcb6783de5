import importlib
import io
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from pnc.data.image_set import ImageSet
from pnc.data.readers import load_data, load_images
from pnc.foundation.errors import InputError
from pnc.foundation.specs import split_spec

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
GREYS = COLOURS[..., 0]


def png(pixels: np.ndarray[Any, Any], **save: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", **save)
    return buffer.getvalue()


def table(images: list[bytes | None], labels: list[Any], **features: Any) -> datasets.Dataset:
    names = list(features) or ["image", "label"]
    kinds = features or {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])}
    cells = [None if image is None else {"bytes": image, "path": None} for image in images]
    columns = [cells, labels, *([labels] * (len(names) - 2))]
    return datasets.Dataset.from_dict(dict(zip(names, columns, strict=True)), features=datasets.Features(kinds))


def write(path: Path, data: datasets.Dataset) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data.to_parquet(path)
    return path


def channels_first(pixels: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(pixels if pixels.ndim == 4 else pixels[..., None]).permute(0, 3, 1, 2)


@pytest.fixture(autouse=True)
def quiet_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    labels = [2, 0, 1, 1, 0, 2]
    write(tmp_path / "set" / "train.parquet", table([png(image) for image in COLOURS], labels))
    write(tmp_path / "set" / "test.parquet", table([png(COLOURS[3])], [1]))
    return tmp_path / "set"


# ------------------------------------------------------------------------------------------------ specs
def test_specs_are_split() -> None:
    assert split_spec("zoo:resnet20?width=2&x=a:b", "spec") == ("zoo", "resnet20", {"width": "2", "x": "a:b"})
    assert split_spec("py:module:function", "spec") == ("py", "module:function", {})
    assert split_spec("digits", "spec") == ("", "digits", {})


@pytest.mark.parametrize("query", ["size", "size=", "=3", "size=1&size=2"])
def test_bad_options_are_refused(query: str) -> None:
    with pytest.raises(InputError, match="must be an option of the form key=value, given once"):
        split_spec(f"folder:x?{query}", "spec")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("csv:x", "an unknown kind; expected one of digits, parquet:PATH, folder:PATH, hf:NAME[@CONFIG]"),
        ("photos", "'photos' is of an unknown kind"),
        ("digits:x", "expected digits, got 'digits:x'"),
        ("parquet:", "expected parquet:PATH, got 'parquet:'"),
        ("parquet", "expected parquet:PATH, got 'parquet'"),
        ("digits?size=8", "digits: there is no option 'size'; there are none"),
        ("folder:x?sizes=8", "folder: there is no option 'sizes' (did you mean 'size'?)"),
        ("folder:missing", "there is no folder missing"),
        ("parquet:missing", "there is no file or folder missing"),
    ],
)
def test_bad_specs_are_refused(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_data(spec)


def test_bad_splits_are_refused() -> None:
    with pytest.raises(InputError, match="split: expected 'train' or 'test', got 'val'"):
        load_data("digits", "val")  # type: ignore[arg-type]


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> ModuleType:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(
        InputError, match=re.escape('the package sklearn is needed for this; pip install "pnc[digits]"')
    ):
        load_data("digits")


# ------------------------------------------------------------------------------------------------ digits
def test_digits_are_split_by_class_into_all_of_scikit_learns_images() -> None:
    train, test = load_data("digits"), load_data("digits", "test")
    assert train.classes == test.classes == tuple("0123456789")
    assert train.input_shape == (1, 8, 8)
    assert (len(train), len(test)) == (1352, 445)
    assert all(abs(n - 3 * m) <= 3 for n, m in zip(train.counts().values(), test.counts().values(), strict=True))
    raw = load_digits()
    both = torch.cat([train.images, test.images]).flatten(1)
    whole = torch.from_numpy(raw.images).float().flatten(1) / 16
    assert sorted(both.tolist()) == sorted(whole.tolist())
    of_three = (torch.from_numpy(raw.target) == 3).nonzero().flatten()[3]
    assert torch.equal(test.images[test.labels == 3][0].flatten(), whole[of_three])


# ------------------------------------------------------------------------------------------------ parquet
def test_parquet_gives_pixels_labels_and_names_in_order(parquet: Path) -> None:
    train, test = load_data(f"parquet:{parquet}"), load_data(f"parquet:{parquet}", "test")
    assert torch.equal(train.images, channels_first(COLOURS))
    assert train.labels.tolist() == [2, 0, 1, 1, 0, 2]
    assert train.classes == test.classes == ("ant", "bee", "cat")
    assert torch.equal(test.images, channels_first(COLOURS[3:4]))


def test_reading_writes_nothing(parquet: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    load_data(f"parquet:{parquet}")
    assert sorted(tmp_path.rglob("*")) == before


def test_one_parquet_file_is_read_whole(parquet: Path) -> None:
    whole = [load_data(f"parquet:{parquet / 'train.parquet'}", split) for split in ("train", "test")]
    assert torch.equal(whole[0].images, whole[1].images)


def test_shards_are_joined_in_order(tmp_path: Path) -> None:
    for shard in (1, 0):
        path = tmp_path / f"train-{shard:05d}-of-00002.parquet"
        write(path, table([png(image) for image in COLOURS[3 * shard : 3 * shard + 3]], [shard] * 3))
    data = load_data(f"parquet:{tmp_path}")
    assert torch.equal(data.images, channels_first(COLOURS))
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_other_names_of_splits(parquet: Path) -> None:
    (parquet / "test.parquet").rename(parquet / "validation.parquet")
    assert len(load_data(f"parquet:{parquet}", "test")) == 1
    assert len(load_data(f"parquet:{parquet}?test=train", "test")) == 6
    with pytest.raises(
        InputError, match=r"no test.parquet in .*, which has train.parquet, validation.parquet; give test="
    ):
        load_data(f"parquet:{parquet}?test=holdout", "test")


CLASSES = datasets.ClassLabel(names=["x", "y"])


@pytest.mark.parametrize(
    ("features", "options", "classes"),
    [
        ({"img": datasets.Image(), "fine_label": CLASSES, "coarse_label": CLASSES}, "", ("x", "y")),
        ({"picture": datasets.Image(), "kind": CLASSES}, "", ("x", "y")),
        ({"img": datasets.Image(), "a": CLASSES, "b": CLASSES}, "?label=b", ("x", "y")),
        ({"image": datasets.Image(), "label": datasets.Value("int64")}, "", ("0", "1")),
        ({"image": datasets.Image(), "kind": datasets.Value("int64")}, "?label=kind", ("0", "1")),
    ],
)
def test_columns_are_found_by_type(tmp_path: Path, features: Any, options: str, classes: tuple[str, ...]) -> None:
    path = write(tmp_path / "a.parquet", table([png(image) for image in COLOURS], [1, 1, 0, 0, 1, 0], **features))
    data = load_data(f"parquet:{path}{options}")
    assert data.classes == classes
    assert data.labels.tolist() == [1, 1, 0, 0, 1, 0]


def test_text_labels_become_sorted_classes(tmp_path: Path) -> None:
    kinds = {"image": datasets.Image(), "label": datasets.Value("string")}
    path = write(tmp_path / "a.parquet", table([png(COLOURS[0])] * 3, ["yak", "ant", "yak"], **kinds))
    data = load_data(f"parquet:{path}")
    assert data.classes == ("ant", "yak")
    assert data.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        ({"img": datasets.Image(), "a": CLASSES, "b": CLASSES}, "", "the label could be a, b of the columns img, a, b"),
        (
            {"a": CLASSES, "label": CLASSES},
            "",
            "the image could be none of the columns a, label; choose with image=",
        ),
        ({"img": datasets.Image(), "label": CLASSES}, "?label=lable", "no column 'lable' (did you mean 'label'?)"),
        ({"img": datasets.Image(), "label": CLASSES}, "?image=label", "the column label has no images"),
        ({"img": datasets.Image(), "label": datasets.Value("float32")}, "", "the labels must be ClassLabel, whole"),
    ],
)
def test_doubtful_columns_are_refused(tmp_path: Path, features: Any, options: str, message: str) -> None:
    rows: list[Any] = [png(COLOURS[0])] if any(isinstance(kind, datasets.Image) for kind in features.values()) else [0]
    data = (
        table(rows, [1], **features)
        if rows != [0]
        else datasets.Dataset.from_dict({name: [0] for name in features}, features=datasets.Features(features))
    )
    with pytest.raises(InputError, match=re.escape(message)):
        load_data(f"parquet:{write(tmp_path / 'a.parquet', data)}{options}")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([png(COLOURS[0]), None], [0, 1], "the image in row 1 is not a readable image"),
        ([png(COLOURS[0]), b"no image"], [0, 1], "the image in row 1 is not a readable image"),
        ([png(COLOURS[0])[:-40]], [0], "the image in row 0 is not a readable image"),
        ([png(COLOURS[0])], [None], "row 0 has no label"),
        ([png(COLOURS[0])], [-1], "ids must lie in 0-2"),
        ([], [], "the data has no rows"),
        ([png(GREYS[0].astype(np.uint16))], [0], "row 0 has more than 8 bits per channel"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, images: list[bytes | None], labels: list[Any], message: str) -> None:
    path = write(tmp_path / "a.parquet", table(images, labels))
    with pytest.raises(InputError, match=message):
        load_data(f"parquet:{path}")


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        load_data(f"parquet:{tmp_path / 'a.parquet'}")


# ------------------------------------------------------------------------------------------------ hub
def test_a_data_set_that_datasets_loads_by_name(parquet: Path) -> None:
    train, test = load_data(f"hf:{parquet}"), load_data(f"hf:{parquet}", "test")
    assert torch.equal(train.images, channels_first(COLOURS))
    assert (train.classes, len(test)) == (("ant", "bee", "cat"), 1)
    with pytest.raises(InputError, match="has no split test, it has train, test; give test=NAME"):
        load_data(f"hf:{parquet}?test=holdout", "test")


def test_a_hub_name_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="spec: hf:.* cannot be loaded"):
        load_data(f"hf:{tmp_path / 'missing'}")


# ------------------------------------------------------------------------------------------------ folders
@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, numbers in (("train", range(5)), ("test", [5])):
        for number in numbers:
            path = tmp_path / "photos" / split / ("dog" if number % 2 else "cat") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(COLOURS[number]))
    (tmp_path / "photos" / "train" / "cat" / ".DS_Store").write_text("no image")
    return tmp_path / "photos"


def test_folders_are_read_sorted_by_class_and_name(folder: Path) -> None:
    train = load_data(f"folder:{folder}")
    assert train.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(train.images, channels_first(COLOURS[[0, 2, 4, 1, 3]]))
    assert load_data(f"folder:{folder}", "test").classes == ("dog",)


def test_a_folder_without_splits_is_read_whole(folder: Path) -> None:
    assert len(load_data(f"folder:{folder / 'train'}", "test")) == 5


def test_bad_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no image in .*/CLASS/; expected one folder of images per class"):
        load_data(f"folder:{folder / 'train' / 'dog'}")
    with pytest.raises(InputError, match="has no folder for the split test; give test=NAME"):
        load_data(f"folder:{folder}?test=holdout", "test")
    (folder / "train" / "dog" / "1.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"1\.png is not a readable image .*; remove or replace it"):
        load_data(f"folder:{folder}")


# ------------------------------------------------------------------------------------------------ pixels
def write_photos(folder: Path, images: list[Image.Image], suffix: str = "png", **save: Any) -> str:
    (folder / "a").mkdir()
    for number, image in enumerate(images):
        image.save(folder / "a" / f"{number}.{suffix}", **save)
    return f"folder:{folder}"


@pytest.mark.parametrize(
    ("n_grey", "options", "n_channels"),
    [(1, "", 3), (2, "", 3), (3, "", 1), (3, "?channels=3", 3), (0, "?channels=1", 1)],
)
def test_channels_follow_the_majority_or_the_option(tmp_path: Path, n_grey: int, options: str, n_channels: int) -> None:
    images = [Image.fromarray(GREYS[i] if i < n_grey else COLOURS[i]) for i in range(4)]
    data = load_data(write_photos(tmp_path, images) + options)
    assert data.input_shape == (n_channels, 4, 5)
    if n_grey:
        assert torch.equal(data.images[0], torch.from_numpy(GREYS[0]).expand(n_channels, 4, 5))


def test_different_sizes_need_a_size(tmp_path: Path) -> None:
    spec = write_photos(tmp_path, [Image.new("RGB", (5, 4)), Image.new("RGB", (4, 5))])
    expected = r"have different sizes: 1 of 2 are 5x4, \S+\.png is 4x5; choose one, for example \?size=4"
    with pytest.raises(InputError, match=expected):
        load_data(spec)
    assert load_data(f"{spec}?size=3").images.shape == (2, 3, 3, 3)


@pytest.mark.parametrize("option", ["size=0", "size=-3", "size=big", "channels=2"])
def test_bad_numbers_are_refused(tmp_path: Path, option: str) -> None:
    spec = write_photos(tmp_path, [Image.new("RGB", (5, 4))])
    with pytest.raises(InputError, match=f"{option} is not allowed; expected"):
        load_data(f"{spec}?{option}")


def test_resizing_crops_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((4, 16), dtype=np.uint8)
    wide[:, 4:12] = 200  # the centre and what the filter reads around it
    data = load_data(write_photos(tmp_path, [Image.fromarray(wide)]) + "?size=2")
    assert torch.equal(data.images, torch.full((1, 1, 2, 2), 200, dtype=torch.uint8))


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    data = load_data(write_photos(tmp_path, [Image.fromarray(COLOURS[0])], exif=exif))
    assert data.input_shape == (3, 5, 4)
    assert torch.equal(data.images[0], channels_first(COLOURS)[0].rot90(-1, (1, 2)))


def test_transparent_and_palette_images_are_read(tmp_path: Path) -> None:
    opaque = Image.fromarray(COLOURS[0]).convert("RGBA")
    palette = Image.fromarray(GREYS[0]).convert("P")
    data = load_data(write_photos(tmp_path, [opaque, palette]))
    assert torch.equal(data.images[0], channels_first(COLOURS)[0])
    assert torch.equal(data.images[1], torch.from_numpy(GREYS[0]).expand(3, 4, 5))


def test_image_files_are_read_as_a_network_takes_them(folder: Path) -> None:
    paths = [folder / "test" / "dog" / "5.png", str(folder / "train" / "cat" / "0.png")]
    images = load_images(paths, (3, 4, 5))
    assert torch.equal(images, channels_first(COLOURS[[5, 0]]))
    assert load_images(paths, (1, 8, 6)).shape == (2, 1, 8, 6)


def test_bad_image_files_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="images: there is no file missing.png"):
        load_images(["missing.png"], (3, 4, 5))
    with pytest.raises(InputError, match="image files have 1 or 3 channels, this network takes 4"):
        load_images([folder / "test" / "dog" / "5.png"], (4, 4, 5))


def test_what_is_read_is_checked_like_any_image_set(parquet: Path) -> None:
    assert isinstance(load_data(f"parquet:{parquet}"), ImageSet)
