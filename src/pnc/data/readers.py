"""Data specs: labelled images from digits, parquet files, image folders or the hub, named by one line of text."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pnc.data.image_files import decode, load_images, read_file, required
from pnc.data.image_folders import list_folder
from pnc.data.image_set import ImageSet
from pnc.data.image_tables import (
    Columns,
    Kind,
    column_of,
    encoded_image,
    joined_labels,
    read_parquet,
    split_files,
)
from pnc.data.splits import Split, find
from pnc.foundation.class_names import listed, unknown_name
from pnc.foundation.errors import InputError, PNCWarning
from pnc.foundation.specs import split_spec

__all__ = ["Split", "load_data", "load_images"]


def load_data(spec: str, split: Split = "train") -> ImageSet:
    """Read labelled images from a data spec, always in the same order.

    Specs:
        - ``digits``: scikit-learn's 1,797 handwritten digits, (1, 8, 8) in [0, 1]. Images 3, 7, 11, ... of each class,
          in scikit-learn's order, are the test split (a quarter); the others are the training split.
        - ``parquet:PATH``: A folder with train.parquet and test.parquet (or complete shards ``train-*.parquet``), or
          one file, which is read whole for either split. Shards are matched by their class names.
        - ``folder:PATH``: ``PATH/train/CLASS/*`` and ``PATH/test/CLASS/*``, or ``PATH/CLASS/*``, which is read whole.
          All formats that Pillow decodes are read, links to folders are followed; a `PNCWarning` counts the rest.
        - ``hf:NAME`` or ``hf:NAME@CONFIG``: A data set of the hub, or a local folder that `datasets` can load.

    Options, as in ``folder:photos?size=32&channels=3``:
        - ``size``: Crop images at their centre to a square and resize them to this size.
        - ``channels``: 1 or 3; by default that of most images, 3 in a tie.
        - ``train``, ``test``: What the data calls this split. By default the common words, in any case: "train",
          "training"; "test", "testing", "validation", "valid", "val".
        - ``image``, ``label`` (parquet, hf): The columns; by default they are found by their type.
        - ``paths`` (parquet, hf): "yes" reads images that a cell names by path, only within the data's own folder.

    Raises:
        InputError: an unknown spec or option, a missing path, split, shard or column, a damaged image, images of
            several sizes without ``size``, or a missing package (the message names the extra to install).

    >>> load_data("digits", "test")
    ImageSet(445 images 1x8x8, 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, ... (10))
    """
    scheme, body, options = split_spec(spec, "spec")
    if not scheme:
        scheme, body = body, ""
    if scheme not in _READERS:
        usages = [reader.usage for reader in _READERS.values()]
        raise InputError(f"spec: {spec!r} is of an unknown kind; expected one of {listed(usages)}")
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
    digits = required("sklearn.datasets", "digits").load_digits()
    images = torch.from_numpy(digits.images).float().div_(16)[:, None]
    labels = torch.from_numpy(digits.target).to(torch.int64)
    number_in_class = torch.empty_like(labels)
    for digit in range(10):
        of_class = labels == digit
        number_in_class[of_class] = torch.arange(int(of_class.sum()))
    chosen = (number_in_class % 4 == 3) == (split == "test")
    return ImageSet(images[chosen], labels[chosen], tuple(map(str, range(10))))


def _read_folder(body: str, split: Split, options: Mapping[str, str]) -> ImageSet:
    found = list_folder(body, split, options)
    encoded, names = [read_file(file) for _, file in found.files], [str(file) for _, file in found.files]
    images = _decoded(encoded, names, options)
    _warn_of_skipped(body, found.skipped)
    return ImageSet(images, torch.tensor([class_id for class_id, _ in found.files]), found.classes)


def _read_parquet(body: str, split: Split, options: Mapping[str, str]) -> ImageSet:
    files, others = split_files(body, split, options)
    root = Path(body)
    base = (root if root.is_dir() else root.parent) if _paths_allowed(options) else None
    tables = [read_parquet(file, options, base, "" if len(files) == 1 else f" of {file.name}") for file in files]
    found = _from_tables(tables, options)
    _warn_of_skipped(body, f"files beside the shards: {listed(others, 3)}" if others else "")
    return found


def _from_tables(tables: Sequence[Columns], options: Mapping[str, str]) -> ImageSet:
    labels, classes = joined_labels(tables)
    encoded, rows = ([one for table in tables for one in getattr(table, name)] for name in ("images", "rows"))
    return ImageSet(_decoded(encoded, rows, options), labels, classes)


def _read_hub(body: str, split: Split, options: Mapping[str, str]) -> ImageSet:
    datasets = required("datasets", "data")
    name, _, config = body.partition("@")
    with _load_errors(body):
        splits = datasets.get_dataset_split_names(name, config or None)
    wanted = find(split, options, splits, f"hf:{body}")
    if wanted is None:
        raise InputError(f"spec: hf:{body} has no split {split}, it has {listed(splits)}; give {split}=NAME")
    with _load_errors(body):
        table = datasets.load_dataset(name, config or None, split=wanted)
    base = Path(name) if Path(name).is_dir() else Path(datasets.config.HF_CACHE_HOME)
    return _from_tables([_hub_columns(datasets, table, options, base if _paths_allowed(options) else None)], options)


def _hub_columns(datasets: Any, table: Any, options: Mapping[str, str], base: Path | None) -> Columns:
    """The image and the label column of a `datasets.Dataset`."""
    kinds = {
        name: Kind(
            isinstance(feature, datasets.Image),
            names=tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None,
        )
        for name, feature in table.features.items()
    }
    image, label = (column_of(role, kinds, options) for role in ("image", "label"))
    raw = table.select_columns([image, label]).cast_column(image, datasets.Image(decode=False)).with_format("arrow")
    rows = [f"the image in row {row}" for row in range(len(table))]
    cells: list[Any] = []
    labels: list[Any] = []
    for batch in raw.iter(batch_size=1000):
        labels.extend(batch[label].to_pylist())
        cells.extend(batch[image].to_pylist())
    images = [encoded_image(cell, row, base) for cell, row in zip(cells, rows, strict=True)]
    return Columns(images, labels, kinds[label].names, rows)


@contextmanager
def _load_errors(body: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # what `datasets` raises for unknown names, no connection, damaged files
        raise InputError(f"spec: hf:{body} cannot be loaded: {error}") from error


def _warn_of_skipped(body: str, skipped: str) -> None:
    if skipped:
        warnings.warn(f"data: not read in {body}: {skipped}", PNCWarning, stacklevel=5)


def _decoded(encoded: Sequence[bytes], names: Sequence[str], options: Mapping[str, str]) -> Tensor:
    size = _option_int(options, "size", range(1, 4097))
    return decode(encoded, names, _option_int(options, "channels", (1, 3)), (size, size) if size else None)


def _paths_allowed(options: Mapping[str, str]) -> bool:
    asked = options.get("paths", "no")
    if asked not in ("yes", "no"):
        raise InputError(f"spec: paths={asked} is not allowed; expected yes or no")
    return asked == "yes"


def _option_int(options: Mapping[str, str], key: str, allowed: Sequence[int]) -> int | None:
    if key not in options:
        return None
    if not options[key].isdecimal() or len(options[key]) > 9 or int(options[key]) not in allowed:
        raise InputError(f"spec: {key}={options[key]:.40} is not allowed; expected {_described(allowed)}")
    return int(options[key])


def _described(allowed: Sequence[int]) -> str:
    if isinstance(allowed, range):
        return f"a whole number from {allowed[0]} to {allowed[-1]}"
    return " or ".join(map(str, allowed))


@dataclass(frozen=True)
class _Reader:
    read: Callable[[str, Split, Mapping[str, str]], ImageSet]
    usage: str
    options: tuple[str, ...]


_PIXELS = ("size", "channels", "train", "test")
_COLUMNS = ("image", "label", "paths")
_READERS = {
    "digits": _Reader(_read_digits, "digits", ()),
    "parquet": _Reader(_read_parquet, "parquet:PATH", (*_PIXELS, *_COLUMNS)),
    "folder": _Reader(_read_folder, "folder:PATH", _PIXELS),
    "hf": _Reader(_read_hub, "hf:NAME[@CONFIG]", (*_PIXELS, *_COLUMNS)),
}
