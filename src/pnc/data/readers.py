"""Data specs: labelled images from digits, parquet files, image folders and the hub, by one line of text."""

import importlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pnc.data.image_set import ImageSet
from pnc.foundation.class_names import listed, unknown_name
from pnc.foundation.errors import InputError
from pnc.foundation.specs import split_spec

Split = Literal["train", "test"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm", ".pgm"})
_PIL_MODES = {1: "L", 3: "RGB"}
_GREY_MODES = frozenset({"1", "L", "LA", "La"})
_ORIENTATION = 0x0112  # the EXIF tag; values from 5 swap width and height


def load_data(spec: str, split: Split = "train") -> ImageSet:
    """Read labelled images from a data spec; the order is the same each time.

    Specs:
        - ``digits``: scikit-learn's 1,797 handwritten digits, (1, 8, 8) in [0, 1]. Of each class the images number
          3, 7, 11, ... in scikit-learn's order are the test split (a quarter), the others the training split.
        - ``parquet:PATH``: Hugging Face `datasets` image layout. PATH is a folder with train.parquet and test.parquet
          (or shards train-*.parquet), or one file, which is read whole whatever the split.
        - ``folder:PATH``: PATH/train/CLASS/* and PATH/test/CLASS/*, or PATH/CLASS/*, which is read whole.
        - ``hf:NAME`` or ``hf:NAME@CONFIG``: a data set of the hub, or a local folder that `datasets` can load.

    Options, as in ``folder:photos?size=32&channels=3``:
        - ``size``: Images are cropped at their centre to a square and resized to it.
        - ``channels``: 1 or 3; without it what most images are, 3 where there are as many of both.
        - ``train``, ``test``: How the data names this split. Without ``test``, "validation" and "valid" also serve.
        - ``image``, ``label`` (parquet, hf): The columns; without them they are found by their type.

    Raises:
        InputError: an unknown spec or option, a path, split or column that is not there, a damaged image, images of
            several sizes without ``size``, or a missing package (the message names the extra to install).
    """
    scheme, body, options = split_spec(spec, "spec")
    if not scheme:
        scheme, body = body, ""
    if scheme not in _READERS:
        usages = [reader.usage for reader in _READERS.values()]
        raise InputError(f"spec: {spec!r} is of no known kind; expected one of {listed(usages)}")
    reader = _READERS[scheme]
    if bool(body) != (":" in reader.usage):
        raise InputError(f"spec: expected {reader.usage}, got {spec!r}")
    for key in options:
        if key not in reader.options:
            raise InputError(f"spec: {scheme}: {unknown_name(key, reader.options, 'option')}")
    if split not in ("train", "test"):
        raise InputError(f"split: expected 'train' or 'test', got {split!r}")
    return reader.read(body, split, options)


def _read_digits(body: str, split: Split, options: Mapping[str, str]) -> ImageSet:
    digits = _require("sklearn.datasets", "digits").load_digits()
    images = torch.from_numpy(digits.images).float().div_(16)[:, None]
    labels = torch.from_numpy(digits.target).to(torch.int64)
    number_in_class = torch.empty_like(labels)
    for digit in range(10):
        of_class = labels == digit
        number_in_class[of_class] = torch.arange(int(of_class.sum()))
    chosen = (number_in_class % 4 == 3) == (split == "test")
    return ImageSet(images[chosen], labels[chosen], tuple(map(str, range(10))))


# --------------------------------------------------------------------------------------------------- tables
def _read_parquet(body: str, split: Split, options: Mapping[str, str]) -> ImageSet:
    path = Path(body)
    if not path.exists():
        raise InputError(f"spec: there is no file or folder {body}")
    paths = _split_files(path, split, options) if path.is_dir() else [path]
    datasets, pyarrow = _require("datasets", "data"), _require("pyarrow", "data")
    parquet = _require("pyarrow.parquet", "data")
    try:
        table = pyarrow.concat_tables([parquet.read_table(file) for file in paths])
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"spec: {paths[0]} cannot be read as parquet: {error}") from error
    # Not through load_dataset: that would write a copy of the data into the user's cache.
    return _read_columns(datasets.Dataset(datasets.table.InMemoryTable(table)), options)


def _split_files(folder: Path, split: Split, options: Mapping[str, str]) -> list[Path]:
    for name in _split_names(split, options):
        whole = folder / f"{name}.parquet"
        files = [whole] if whole.is_file() else sorted(folder.glob(f"{name}-*.parquet"))
        if files:
            return files
    there = sorted(file.name for file in folder.glob("*.parquet"))
    raise InputError(
        f"spec: no {split}.parquet in {folder}, which has {listed(there)}; say {split}=NAME for NAME.parquet"
    )


def _split_names(split: Split, options: Mapping[str, str]) -> Sequence[str]:
    if split in options:
        return (options[split],)
    return ("train",) if split == "train" else ("test", "validation", "valid")


def _read_hub(body: str, split: Split, options: Mapping[str, str]) -> ImageSet:
    datasets = _require("datasets", "data")
    name, _, config = body.partition("@")
    with _load_errors(body):
        there = datasets.get_dataset_split_names(name, config or None)
    wanted = [known for known in _split_names(split, options) if known in there]
    if not wanted:
        raise InputError(f"spec: hf:{body} has no split {split}, it has {listed(there)}; say {split}=NAME")
    with _load_errors(body):
        table = datasets.load_dataset(name, config or None, split=wanted[0])
    return _read_columns(table, options)


@contextmanager
def _load_errors(body: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # what `datasets` raises for unknown names, no connection, damaged files
        raise InputError(f"spec: hf:{body} cannot be loaded: {error}") from error


def _read_columns(table: Any, options: Mapping[str, str]) -> ImageSet:
    """Make an image set of the image and the label column of a `datasets.Dataset`."""
    datasets = _require("datasets", "data")
    image_column = _column(table, "image", options, lambda feature: isinstance(feature, datasets.Image))
    label_column = _column(table, "label", options, lambda feature: isinstance(feature, datasets.ClassLabel))
    raw = table.select_columns([image_column, label_column])
    raw = raw.cast_column(image_column, datasets.Image(decode=False)).with_format("arrow")
    encoded: list[bytes] = []
    values: list[Any] = []
    for batch in raw.iter(batch_size=1000):
        values.extend(batch[label_column].to_pylist())
        encoded.extend(map(_encoded_image, batch[image_column].to_pylist()))
    names = [f"the image in row {row}" for row in range(len(encoded))]
    feature = table.features[label_column]
    labels, classes = _label_ids(values, list(feature.names) if isinstance(feature, datasets.ClassLabel) else None)
    return ImageSet(_decode_as_asked(encoded, names, options), labels, classes)


def _encoded_image(cell: Mapping[str, Any] | None) -> bytes:
    if cell is None:
        return b""
    content: bytes | None = cell["bytes"]
    if content is None and cell["path"]:
        return Path(cell["path"]).read_bytes()
    return content or b""


def _label_ids(values: Sequence[Any], classes: Sequence[str] | None) -> tuple[Tensor, tuple[str, ...]]:
    if classes is None:
        if not all(isinstance(value, str | int) for value in values):
            raise InputError(
                "spec: the labels must be ClassLabel, whole numbers or text; say label=COLUMN for another column"
            )
        kinds = sorted(set(values))
        place = {kind: index for index, kind in enumerate(kinds)}
        return torch.tensor([place[value] for value in values]), tuple(map(str, kinds))
    if None in values:
        raise InputError(f"spec: row {values.index(None)} has no label; remove such rows")
    return torch.tensor(values, dtype=torch.int64), tuple(classes)


def _column(table: Any, role: str, options: Mapping[str, str], fits: Callable[[Any], bool]) -> str:
    """Return the column asked for; else the one named `role` or "fine_`role`"; else the only one whose type fits."""
    there: list[str] = list(table.features)
    found = [name for name in there if fits(table.features[name])]
    if role in options:
        if options[role] not in there:
            raise InputError(f"spec: {unknown_name(options[role], there, 'column')}")
        if role == "image" and options[role] not in found:
            raise InputError(f"spec: the column {options[role]} holds no images; those that do are {listed(found)}")
        return options[role]
    for name in (role, f"fine_{role}"):
        if name in found or (name == role == "label" and name in there):
            return name
    if len(found) != 1:
        raise InputError(f"spec: the {role} could be {listed(found)} of the columns {listed(there)}; say {role}=COLUMN")
    return found[0]


# --------------------------------------------------------------------------------------------------- image files
def _read_folder(body: str, split: Split, options: Mapping[str, str]) -> ImageSet:
    root = Path(body)
    if not root.is_dir():
        raise InputError(f"spec: there is no folder {body}")
    names = [name for name in _split_names(split, options) if (root / name).is_dir()]
    others = _split_names("test" if split == "train" else "train", options)
    if not names and (split in options or any((root / name).is_dir() for name in others)):
        raise InputError(f"spec: {body} has no folder for the split {split}; say {split}=NAME")
    root = root / names[0] if names else root
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    files = [
        (class_id, file)
        for class_id, folder in enumerate(folders)
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
    ]
    if not files:
        raise InputError(f"spec: no image in {root}/CLASS/; expected one folder of images per class")
    encoded, names = [file.read_bytes() for _, file in files], [str(file) for _, file in files]
    images = _decode_as_asked(encoded, names, options)
    return ImageSet(images, torch.tensor([class_id for class_id, _ in files]), tuple(folder.name for folder in folders))


def load_images(paths: Sequence[str | Path], input_shape: Sequence[int]) -> Tensor:
    """Read image files as a network takes them.

    Args:
        paths: Files; any sizes.
        input_shape: (C, H, W), with 1 or 3 channels. Images are cropped at their centre to that ratio and resized.

    Returns:
        (N, C, H, W), uint8.

    Raises:
        InputError: a file is not there or no image, or C is neither 1 nor 3.
    """
    channels, height, width = input_shape
    if channels not in _PIL_MODES:
        raise InputError(f"input_shape: image files have 1 or 3 channels, this network takes {channels}; pass tensors")
    missing = [str(path) for path in paths if not Path(path).is_file()]
    if missing or not paths:
        raise InputError(f"images: there is no file {listed(missing, 3)}")
    return _decode([Path(path).read_bytes() for path in paths], list(map(str, paths)), channels, (width, height))


def _decode_as_asked(encoded: Sequence[bytes], names: Sequence[str], options: Mapping[str, str]) -> Tensor:
    size = _option_int(options, "size", range(1, 4097))
    return _decode(encoded, names, _option_int(options, "channels", (1, 3)), (size, size) if size else None)


def _decode(
    encoded: Sequence[bytes], names: Sequence[str], channels: int | None, size: tuple[int, int] | None
) -> Tensor:
    """Decode image files to uint8 (N, C, H, W); the headers first, because they decide on what is not given.

    Args:
        encoded: The files' bytes.
        names: What to call each in a message.
        channels: 1 or 3; None takes what most images have.
        size: (width, height); None takes the one that all images have.
    """
    ops, resampling = _require("PIL.ImageOps", "data"), _require("PIL.Image", "data").Resampling.BILINEAR
    headers = [_opened(content, name) for content, name in zip(encoded, names, strict=True)]
    if not headers:
        raise InputError("spec: the data has no row")
    if channels is None:
        channels = 1 if sum(image.mode in _GREY_MODES for image in headers) > len(headers) / 2 else 3
    # Asking a PNG without EXIF for it would decode the image.
    turned = [image.getexif().get(_ORIENTATION, 1) if "exif" in image.info else 1 for image in headers]
    sizes = {image.size[:: -1 if turn >= 5 else 1] for image, turn in zip(headers, turned, strict=True)}
    if size is None and len(sizes) > 1:
        some = listed([f"{width}x{height}" for width, height in sorted(sizes)], 3)
        raise InputError(f"spec: the images have different sizes ({some}); choose one, as in ?size=64")
    width, height = size or next(iter(sizes))
    pixels = np.empty((len(headers), height, width, channels), dtype=np.uint8)
    for index, (image, turn) in enumerate(zip(headers, turned, strict=True)):
        with _image_errors(names[index]):
            upright = ops.exif_transpose(image) if turn != 1 else image
            upright = upright.convert(_PIL_MODES[channels])
        if upright.size != (width, height):
            upright = ops.fit(upright, (width, height), method=resampling)
        pixels[index] = np.asarray(upright).reshape(height, width, channels)
        image.close()  # frees its pixels, which have any size
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _opened(content: bytes, name: str) -> Any:
    with _image_errors(name):
        image = _require("PIL.Image", "data").open(io.BytesIO(content))
    if image.mode == "F" or image.mode.startswith("I"):
        raise InputError(f"spec: {name} has more than 8 bits per channel (mode {image.mode}); convert it first")
    return image


@contextmanager
def _image_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for files that are no image or cut short
        raise InputError(f"spec: {name} is no readable image ({error}); remove or replace it") from error


def _option_int(options: Mapping[str, str], key: str, allowed: Sequence[int]) -> int | None:
    if key not in options:
        return None
    if not options[key].isdecimal() or int(options[key]) not in allowed:
        raise InputError(f"spec: {key}={options[key]} is not allowed; expected {_described(allowed)}")
    return int(options[key])


def _described(allowed: Sequence[int]) -> str:
    if isinstance(allowed, range):
        return f"a whole number from {allowed[0]} to {allowed[-1]}"
    return " or ".join(map(str, allowed))


def _require(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise InputError(f'spec: the package {package} is needed for this; pip install "pnc[{extra}]"') from error


@dataclass(frozen=True)
class _Reader:
    read: Callable[[str, Split, Mapping[str, str]], ImageSet]
    usage: str
    options: tuple[str, ...]


_PIXELS = ("size", "channels", "train", "test")
_READERS = {
    "digits": _Reader(_read_digits, "digits", ()),
    "parquet": _Reader(_read_parquet, "parquet:PATH", (*_PIXELS, "image", "label")),
    "folder": _Reader(_read_folder, "folder:PATH", _PIXELS),
    "hf": _Reader(_read_hub, "hf:NAME[@CONFIG]", (*_PIXELS, "image", "label")),
}
