"""Tables of images, as in parquet files: their shards, their image and label columns, and the content of cells."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pnc.data.image_files import read_file, required
from pnc.data.splits import Split, words_of
from pnc.foundation.class_names import listed, unknown_name
from pnc.foundation.errors import InputError
from pnc.foundation.file_writing import checked_path, path_text

_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet", re.IGNORECASE)


@dataclass(frozen=True)
class Columns:
    """The image and the label column of one table.

    Attributes:
        images: Bytes of the image files.
        labels: Values of the label column.
        names: Class names that label ids index; None if the table has none.
        rows: What messages call each row.
    """

    images: list[bytes]
    labels: list[Any]
    names: tuple[str, ...] | None
    rows: list[str]


# --------------------------------------------------------------------------------------------------- which files
def split_files(body: str, split: Split, options: Mapping[str, str]) -> tuple[list[Path], list[str]]:
    """The parquet files of a split, and the names of similar files that are not read.

    Raises:
        InputError: there are none, a shard of "-of-N" is missing, or there are several series of shards.
    """
    path = checked_path(body, "spec")
    if not path.exists():
        raise InputError(f"spec: there is no file or folder {path_text(body)}")
    if not path.is_dir():
        return [path], []
    try:
        candidates = sorted(entry for entry in path.iterdir() if entry.suffix.lower() == ".parquet")
    except OSError as error:
        raise InputError(f"spec: {path_text(path)} cannot be read: {error.strerror or error}") from error
    for word in words_of(split, options):
        whole = [file for file in candidates if file.stem.casefold() == word.casefold()]
        shards = [file for file in candidates if file.name.casefold().startswith(f"{word}-".casefold())]
        numbered = [file for file in shards if _SHARD.fullmatch(file.name[len(word) :])]
        found = [whole, numbered, [] if numbered else shards]
        kinds = [files for files in found if files]
        if len(kinds) > 1 or len(whole) > 1:
            some = listed([file.name for files in kinds for file in files], 4)
            raise InputError(f"spec: {path_text(path)} has {some}; choose with {split}=NAME, or move one")
        if kinds:
            _check_complete(numbered, word)
            return kinds[0], [file.name for file in shards if numbered and file not in numbered]
    names = listed([file.name for file in candidates])
    raise InputError(
        f"spec: no {split}.parquet in {path_text(path)}, which has {names}; give {split}=NAME for NAME.parquet"
    )


def _check_complete(shards: Sequence[Path], word: str) -> None:
    """Refuse shards if one is missing, duplicated, or from another series."""
    found = [match.groups() for shard in shards if (match := _SHARD.fullmatch(shard.name[len(word) :]))]
    totals = sorted({int(total) for _, total in found})
    if len(totals) > 1:
        raise InputError(f"spec: shards of {word} are numbered of {totals[0]} and of {totals[1]}; keep one series")
    if not totals:
        return
    numbers = sorted(int(number) for number, _ in found)
    missing = sorted(set(range(min(totals[0], 100_000))) - set(numbers))
    if missing or len(numbers) != totals[0]:
        what = f"number {missing[0]} is missing" if missing else "a number appears twice, or is too high"
        raise InputError(
            f"spec: there are {len(numbers)} shards of {word}, their names say {totals[0]}: {what}; get the whole set"
        )


# --------------------------------------------------------------------------------------------------- one file
def read_parquet(path: Path, options: Mapping[str, str], base: Path | None, of: str = "") -> Columns:
    """Read the image and the label column of a parquet file from any program.

    Columns are found by the types that `datasets` wrote into the file or, without these, by those of parquet: images
    are structs with a field "bytes", or columns of bytes.

    Args:
        path: The file.
        options: "image" and "label" name the columns.
        base: The folder in which cells may name files; None refuses cells with only a path.
        of: What messages add to the number of a row.
    Raises:
        InputError: the file cannot be read, the columns are ambiguous, or a class name appears twice.
    """
    if not path.is_file():
        raise InputError(f"spec: {path_text(path)} is not a regular file")
    parquet, pyarrow = required("pyarrow.parquet", "data"), required("pyarrow", "data")
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            kinds = _kinds(schema, path)
            image, label = (column_of(role, kinds, options) for role in ("image", "label"))
            table = file.read(columns=[image, label])
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"spec: {path_text(path)} cannot be read as parquet: {reason:.200}") from error
    rows = [f"the image in row {row}{of}" for row in range(table.num_rows)]
    cells = table.column(image).to_pylist()
    images = [encoded_image(cell, row, base) for cell, row in zip(cells, rows, strict=True)]
    return Columns(images, table.column(label).to_pylist(), kinds[label].names, rows)


@dataclass(frozen=True)
class Kind:
    """What a column may contain: images (declared, or possible by its type), or class ids (with their `names`)."""

    is_image: bool = False
    may_be_image: bool = False
    names: tuple[str, ...] | None = None


def _kinds(schema: Any, path: Path) -> dict[str, Kind]:
    types = required("pyarrow.types", "data")

    def is_binary(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def may_be_image(kind: Any) -> bool:
        fields = (
            {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)} if types.is_struct(kind) else {}
        )
        return is_binary(kind) or ("bytes" in fields and is_binary(fields["bytes"]))

    features = _features(schema, path)
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise InputError(f"spec: {path_text(path)} has several columns named {listed(twice, 3)}; rename all but one")
    found = {}
    for column in schema:
        feature = features.get(column.name)
        declared = feature if isinstance(feature, dict) else {}
        names = declared.get("names") if declared.get("_type") == "ClassLabel" else None
        found[column.name] = Kind(
            declared.get("_type") == "Image", may_be_image(column.type), None if names is None else _names(names, path)
        )
    return found


def _features(schema: Any, path: Path) -> Mapping[str, Any]:
    """The types that `datasets` wrote into a file; {} if there are none."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        features = json.loads(text)["info"]["features"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise InputError(f"spec: {path_text(path)} has column types that are not the JSON of `datasets`") from error
    return features if isinstance(features, dict) else {}


def _names(names: Any, path: Path) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"spec: the class names of {path_text(path)} are not text")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"spec: {path_text(path)} has several classes named {listed(twice, 3)}; give each class its own name"
        )
    return tuple(names)


def column_of(role: str, kinds: Mapping[str, Kind], options: Mapping[str, str]) -> str:
    """Return the column given in `options`; else the one named `role` or "fine_`role`"; else the only one that fits."""
    columns = list(kinds)
    found = [name for name, kind in kinds.items() if (kind.is_image if role == "image" else kind.names is not None)]
    possible = [name for name in columns if kinds[name].may_be_image]
    if role in options:
        if options[role] not in columns:
            raise InputError(f"spec: {unknown_name(options[role], columns, 'column')}")
        if role == "image" and options[role] not in {*found, *possible}:
            some = listed(found or possible)
            raise InputError(f"spec: the column {options[role]} has no images; the columns with images are {some}")
        return options[role]
    if role == "image" and not found:
        found = possible
    for name in (role, f"fine_{role}"):
        if name in found or (name == role == "label" and name in columns):
            return name
    if len(found) != 1:
        some, every = listed(found), listed(columns)
        raise InputError(f"spec: the {role} could be {some} of the columns {every}; choose with {role}=COLUMN")
    return found[0]


# --------------------------------------------------------------------------------------------------- cells and labels
def encoded_image(cell: Any, row: str, base: Path | None) -> bytes:
    """The bytes of an image file in a cell: bytes, or an object with bytes or, if allowed, a path.

    Args:
        cell: The cell's content; None gives no bytes.
        row: What messages call it.
        base: The folder that must contain the path; None allows no paths.
    Raises:
        InputError: a path is not allowed, is outside of the folder, or is not a regular file.
    """
    if cell is None or isinstance(cell, bytes):
        return cell or b""
    content: bytes | None = cell["bytes"]
    path = cell.get("path")
    if content is not None or not path:
        return content or b""
    if not isinstance(path, str):
        raise InputError(f"spec: {row} has no bytes, and its path is not text; write the images into the file")
    if base is None:
        raise InputError(
            f"spec: {row} is only a path ({path_text(path)}), and a file from elsewhere could name any file of this "
            "machine; use ?paths=yes to read paths within the data's own folder, or write the images into the file"
        )
    root = os.path.realpath(base)
    place = os.path.realpath(checked_path(Path(root, path), "spec"))
    if os.path.commonpath([root, place]) != root:
        raise InputError(f"spec: {row} names {path_text(path)}, which is not within {path_text(base)}; copy it there")
    return read_file(Path(place))


def joined_labels(tables: Sequence[Columns]) -> tuple[Tensor, tuple[str, ...]]:
    """The labels of several tables, and the class names that they index; ids of each table mean its own names.

    Raises:
        InputError: a label is missing, or is neither an id nor text, or only some of the tables have class names.
    """
    if all(table.names is None for table in tables):
        return _label_ids([value for table in tables for value in table.labels])
    classes: dict[str, int] = {}
    labels = []
    for table in tables:
        if table.names is None:
            raise InputError(
                "spec: some of the files name their classes and others do not, so an id may mean different ones; "
                "write them with one schema"
            )
        place = [classes.setdefault(name, len(classes)) for name in table.names]
        for row, value in zip(table.rows, table.labels, strict=True):
            if value is None:
                raise InputError(f"spec: {row.removeprefix('the image in ')} has no label; remove such rows")
            if not isinstance(value, int) or not 0 <= value < len(place):
                raise InputError(
                    f"spec: {row.removeprefix('the image in ')}: ids must lie in 0-{len(place) - 1}, got {value!r:.80}"
                )
            labels.append(place[value])
    return torch.tensor(labels, dtype=torch.int64), tuple(classes)


def _label_ids(values: Sequence[Any]) -> tuple[Tensor, tuple[str, ...]]:
    if not (all(isinstance(value, str) for value in values) or all(type(value) is int for value in values)):
        raise InputError(
            "spec: the labels must be ClassLabel, whole numbers or text; give label=COLUMN for another column"
        )
    kinds = sorted(set(values))
    place = {kind: index for index, kind in enumerate(kinds)}
    return torch.tensor([place[value] for value in values], dtype=torch.int64), tuple(map(str, kinds))
