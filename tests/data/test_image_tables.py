"""Parquet files: shards matched by class names, files from any program, cells with paths."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pnc.data.image_set import ImageSet
from pnc.data.readers import load_data
from pnc.foundation.errors import InputError, PNCWarning

CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
VALUES = {"black": 0, "grey": 100, "white": 255}


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), value).save(buffer, "PNG")
    return buffer.getvalue()


def write(
    path: Path, labels: Any, names: Any = None, images: Any = None, kind: Any = CELL, label: str = "label"
) -> Path:
    """One row for each label; every pixel of a class's images has the value of the class."""
    if images is None:
        images = [{"bytes": png(VALUES[names[one]]), "path": None} for one in labels]
    table = pa.table(
        {"image": pa.array(images, kind), label: labels if isinstance(labels, pa.Array) else pa.array(labels)}
    )
    if names is not None:
        features = {"image": {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def all_right(data: ImageSet) -> bool:
    """Whether every image has the class that its pixels stand for."""
    pairs = zip(data.images, data.labels, strict=True)
    return all(int(image.max()) == VALUES[data.classes[label]] for image, label in pairs)


# --------------------------------------------------------------------------------------------------- shards
@pytest.mark.parametrize(
    "orders",
    [
        [["black", "grey", "white"], ["white", "black", "grey"]],
        [["black", "white"], ["white", "grey"]],
        [["white"], ["black"], ["grey", "white"]],
        [["black", "grey"]] * 3,
    ],
)
@pytest.mark.parametrize("pattern", ["train-{}-of-{}.parquet", "Train-{:05d}-of-{:05d}.parquet", "train-{}.parquet"])
def test_ids_of_each_shard_mean_its_own_names(tmp_path: Path, orders: list[list[str]], pattern: str) -> None:
    for number, names in enumerate(orders):
        write(tmp_path / pattern.format(number, len(orders)), list(range(len(names))), names)
    data = load_data(f"parquet:{tmp_path}")
    assert all_right(data)
    assert len(data) == sum(map(len, orders))
    assert data.classes[: len(orders[0])] == tuple(orders[0])


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        (["0-of-3", "2-of-3"], "there are 2 shards of train, their names say 3: number 1 is missing; get the whole"),
        (["1-of-2"], "number 0 is missing"),
        (["0-of-2"], "number 1 is missing"),
        (["0-of-1", "00-of-1"], "a number appears twice, or is too high"),
        (["0-of-2", "1-of-2", "5-of-2"], "there are 3 shards of train, their names say 2"),
        (["0-of-2", "1-of-2", "0-of-3"], "numbered of 2 and of 3; keep one series"),
        (["0-of-99999999"], "number 1 is missing"),
    ],
)
def test_an_incomplete_set_of_shards_is_refused(tmp_path: Path, shards: list[str], message: str) -> None:
    for shard in shards:
        write(tmp_path / f"train-{shard}.parquet", [0], ["black"])
    with pytest.raises(InputError, match=message):
        load_data(f"parquet:{tmp_path}")


def test_shards_and_a_whole_file_at_once_are_refused(tmp_path: Path) -> None:
    for name in ("train", "train-0-of-1"):
        write(tmp_path / f"{name}.parquet", [0], ["black"])
    with pytest.raises(InputError, match="has train.parquet, train-0-of-1.parquet; choose with train=NAME"):
        load_data(f"parquet:{tmp_path}")


def test_files_beside_the_shards_are_said(tmp_path: Path) -> None:
    for name in ("train-0-of-1", "train-extra-0-of-1"):
        write(tmp_path / f"{name}.parquet", [0], ["black"])
    with pytest.warns(PNCWarning, match="files beside the shards: train-extra-0-of-1.parquet"):
        assert len(load_data(f"parquet:{tmp_path}")) == 1


def test_shards_of_which_some_have_no_names_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", [0], ["black"])
    write(tmp_path / "train-1.parquet", [0], None, [{"bytes": png(0), "path": None}])
    with pytest.raises(InputError, match="some of the files name their classes and others do not"):
        load_data(f"parquet:{tmp_path}")


def test_an_id_beyond_the_names_of_its_shard_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", [0, 1], ["black", "white"])
    cell = [{"bytes": png(0), "path": None}]
    write(tmp_path / "train-1.parquet", [1], ["black"], cell)
    with pytest.raises(InputError, match=r"row 0 of train-1.parquet: ids must lie in 0-0, got 1"):
        load_data(f"parquet:{tmp_path}")


def test_names_that_come_twice_are_refused(tmp_path: Path) -> None:
    cells = [{"bytes": png(0), "path": None}] * 2
    for names in (["crane", "crane"], ["a", "crane", "crane"]):
        path = write(tmp_path / "a.parquet", [0, 1], names, cells)
        with pytest.raises(InputError, match="has several classes named crane"):
            load_data(f"parquet:{path}")


# --------------------------------------------------------------------------------------------------- any writer
LARGE = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])


@pytest.mark.parametrize("options", ["", "?image=image", "?image=image&label=label"])
@pytest.mark.parametrize("kind", [CELL, LARGE, pa.struct([("bytes", pa.binary())]), pa.binary(), pa.large_binary()])
@pytest.mark.parametrize(
    "labels", [pa.array(["cat", "ant"]), pa.array([1, 0]), pa.array(["cat", "ant"]).dictionary_encode()], ids=str
)
def test_files_without_metadata_are_read(tmp_path: Path, options: str, kind: pa.DataType, labels: pa.Array) -> None:
    images: list[Any] = [png(0), png(255)]
    if pa.types.is_struct(kind):
        images = [{"bytes": one, "path": "0.png"} if kind.num_fields == 2 else {"bytes": one} for one in images]
    data = load_data(f"parquet:{write(tmp_path / 'a.parquet', labels, None, images, kind)}{options}")
    assert data.labels.tolist() == [1, 0]
    assert data.images.flatten(1).float().mean(1).tolist() == [0, 255]


def test_pandas_writes_what_is_read(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"label": pandas.Categorical(["b", "a"]), "image": [{"bytes": png(0)}, {"bytes": png(255)}]}, index=[7, 9]
    )
    frame.to_parquet(tmp_path / "train.parquet")
    data = load_data(f"parquet:{tmp_path}")
    assert (data.classes, data.labels.tolist()) == (("a", "b"), [1, 0])


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"info": 1}', b"[" * 50000])
def test_damaged_metadata_is_one_error(tmp_path: Path, text: bytes) -> None:
    path = write(tmp_path / "a.parquet", [0], None, [{"bytes": png(0), "path": None}])
    pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": text}), path)
    with pytest.raises(InputError, match="has column types that are not the JSON"):
        load_data(f"parquet:{path}")


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.parquet")
    for spec in (tmp_path, tmp_path / "train.parquet"):
        with pytest.raises(InputError, match="is not a regular file"):
            load_data(f"parquet:{spec}")


# --------------------------------------------------------------------------------------------------- paths
@pytest.fixture
def paths(tmp_path: Path) -> Path:
    """The folder of a data set, with one image inside and one beside it."""
    (tmp_path / "set" / "pictures").mkdir(parents=True)
    (tmp_path / "set" / "pictures" / "0.png").write_bytes(png(77))
    (tmp_path / "elsewhere.png").write_bytes(png(99))
    (tmp_path / "set" / "out.png").symlink_to(tmp_path / "elsewhere.png")
    os.mkfifo(tmp_path / "set" / "pipe.png")
    return tmp_path / "set"


def path_cell(folder: Path, path: str) -> Path:
    return write(folder / "train.parquet", [0], ["a"], [{"bytes": None, "path": path}])


@pytest.mark.parametrize("path", ["pictures/0.png", "/etc/hostname", "zip://x", "../elsewhere.png", "pipe.png"])
def test_cells_that_are_paths_are_refused_by_default(paths: Path, path: str) -> None:
    file = path_cell(paths, path)
    for spec in (paths, file):
        with pytest.raises(InputError, match=r"row 0 is only a path .*; use \?paths=yes to read paths within"):
            load_data(f"parquet:{spec}")
        with pytest.raises(InputError, match="is only a path"):
            load_data(f"parquet:{spec}?paths=no")


def test_where_they_are_allowed_they_are_read_within_the_folder(paths: Path) -> None:
    for path in ("pictures/0.png", "./pictures/../pictures/0.png", str(paths / "pictures" / "0.png")):
        file = path_cell(paths, path)
        for spec in (paths, file):
            assert int(load_data(f"parquet:{spec}?paths=yes").images.max()) == 77


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/etc/hostname", "which is not within"),
        ("../elsewhere.png", "which is not within"),
        ("pictures/../../elsewhere.png", "which is not within"),
        ("out.png", "which is not within"),
        ("pipe.png", "is not a regular file"),
        ("pictures", "is not a regular file"),
        ("missing.png", "cannot be read: No such file"),
        ("zip://x", "cannot be read: No such file"),
        ("a" * 5000, "cannot be looked up"),
        ("a\0b", "cannot be looked up"),
    ],
)
def test_other_places_stay_out_of_reach(paths: Path, path: str, message: str) -> None:
    path_cell(paths, path)
    with pytest.raises(InputError, match=message):
        load_data(f"parquet:{paths}?paths=yes")


def test_other_values_of_the_option_are_refused(paths: Path) -> None:
    path_cell(paths, "pictures/0.png")
    with pytest.raises(InputError, match="paths=true is not allowed; expected yes or no"):
        load_data(f"parquet:{paths}?paths=true")


def test_a_column_that_a_file_has_twice_is_an_error(tmp_path):
    images = pa.array([png(100), png(200)])
    table = pa.Table.from_arrays([images, pa.array([0, 1]), pa.array([1, 0])], names=["image", "label", "label"])
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(InputError, match="several columns named label"):
        load_data(f"parquet:{tmp_path}", "train")


def test_a_path_that_is_not_text_is_an_error(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.int64())])
    images = pa.array([{"bytes": None, "path": 3}], kind)
    pq.write_table(pa.table({"image": images, "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(InputError, match="its path is not text"):
        load_data(f"parquet:{tmp_path}?paths=yes", "train")


def test_an_image_that_is_missing_is_an_error_in_words(tmp_path):
    pq.write_table(pa.table({"image": pa.array([png(1), None]), "label": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"row 1 is not a readable image \(empty, or of no format that Pillow knows"):
        load_data(f"parquet:{tmp_path}", "train")
