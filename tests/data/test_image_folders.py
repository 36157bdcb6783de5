"""Folders of images: every skipped file is reported."""

import os
from pathlib import Path

import pytest
from PIL import Image, features

from pnc.data.image_files import image_suffixes
from pnc.data.readers import load_data
from pnc.foundation.errors import InputError, PNCWarning


def save(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, 0, 0)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("forest", "river"):
        save(tmp_path / "data" / name / "0.png")
    return tmp_path / "data"


@pytest.mark.parametrize(
    "suffix",
    [".tif", ".tiff", ".jfif", ".jpe", ".TIF", ".Png", ".gif", ".ppm", ".pgm", ".pnm", ".tga", ".ico", ".pcx", ".dib"],
)
def test_every_format_that_pillow_reads_is_read(root: Path, suffix: str) -> None:
    save(root / "river" / f"1{suffix}")
    assert load_data(f"folder:{root}?size=8").counts() == {"forest": 1, "river": 2}


@pytest.mark.parametrize(("suffix", "feature"), [(".webp", "webp"), (".jp2", "jpg_2000"), (".avif", "avif")])
def test_formats_of_optional_decoders_are_read_where_pillow_has_them(root: Path, suffix: str, feature: str) -> None:
    if not features.check(feature):
        pytest.skip(f"this Pillow has no {feature}")
    save(root / "river" / f"1{suffix}")
    assert load_data(f"folder:{root}").counts()["river"] == 2


def test_what_pillow_only_writes_or_identifies_is_no_image() -> None:
    assert not {".pdf", ".h5", ".mpg", ".grib", ".txt", ""} & image_suffixes()


def test_what_is_not_read_is_counted_and_said_once(root: Path) -> None:
    for path in ("forest/notes.txt", "river/labels.csv", "river/more.csv", "river/README", "forest/._0.png"):
        (root / path).write_text("x")
    (root / "forest" / "Thumbs.db").write_text("of the system")
    (root / "river" / ".git").mkdir()
    save(root / "loose.png")
    (root / "river" / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(root / "river" / "pipe.png")
    with pytest.warns(PNCWarning) as caught:
        data = load_data(f"folder:{root}")
    assert data.counts() == {"forest": 1, "river": 1}
    assert len(caught) == 1
    text = str(caught[0].message)
    for part in ("2 .csv", "1 .txt", "1 file without suffix", "1 hidden file", "1 hidden folder"):
        assert part in text or "in all" in text
    assert text.startswith(f"data: not read in {root}: ")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.with_name("a.xcf").write_text("x"), "1 .xcf"),
        (lambda path: os.mkfifo(path), "1 not a regular file"),
        (lambda path: path.symlink_to("nowhere"), "1 broken link"),
        (lambda path: path.symlink_to(path.name), "1 broken link"),
        (lambda path: path.with_name(".hidden.png").write_text("x"), "1 hidden file"),
        (lambda path: path.with_name(".cache").mkdir(), "1 hidden folder"),
        (lambda path: save(path.parents[1] / "beside.png"), "1 .png beside the folders of classes"),
    ],
)
def test_each_reason_is_named(root: Path, make, words: str) -> None:  # type: ignore[no-untyped-def]
    make(root / "river" / "1.png")
    with pytest.warns(PNCWarning, match=words):
        load_data(f"folder:{root}")


def test_a_folder_without_any_image_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.xcf").write_text("x")
    with pytest.raises(InputError, match=r"no image in .*/CLASS/; .*; skipped: 1 \.xcf"):
        load_data(f"folder:{tmp_path}")


# --------------------------------------------------------------------------------------------------- splits
@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training", "Training"])
@pytest.mark.parametrize("test", ["test", "Test", "Testing", "val", "Valid", "VALIDATION"])
def test_splits_have_the_common_names_in_any_case(tmp_path: Path, train: str, test: str) -> None:
    for name in ("forest", "river"):
        save(tmp_path / train / name / "0.png")
        save(tmp_path / train / name / "1.png")
        save(tmp_path / test / name / "0.png")
    assert load_data(f"folder:{tmp_path}").counts() == {"forest": 2, "river": 2}
    assert load_data(f"folder:{tmp_path}", "test").counts() == {"forest": 1, "river": 1}


def test_folders_that_differ_by_case_alone_are_refused(tmp_path: Path) -> None:
    for split in ("train", "Train"):
        save(tmp_path / split / "a" / "0.png")
    if len(list(tmp_path.iterdir())) == 1:
        pytest.skip("this file system does not tell cases apart")
    with pytest.raises(InputError, match="has Train and train; choose with train=NAME"):
        load_data(f"folder:{tmp_path}")
    assert len(load_data(f"folder:{tmp_path}?train=Train")) == 1


def test_classes_may_have_names_of_splits(root: Path) -> None:
    for name in ("valid", "Train", "test"):
        save(root / name / "0.png")  # contains no folder, so it is a class
    assert set(load_data(f"folder:{root}").classes) == {"forest", "river", "valid", "Train", "test"}


# --------------------------------------------------------------------------------------------------- links
def test_linked_folders_and_files_are_followed(root: Path, tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / "elsewhere" / "deep" / f"{number}.png", number)
    (root / "forest" / "part").symlink_to(tmp_path / "elsewhere")
    (root / "sea").symlink_to(tmp_path / "elsewhere" / "deep")
    (root / "river" / "1.png").symlink_to(tmp_path / "elsewhere" / "deep" / "2.png")
    assert load_data(f"folder:{root}").counts() == {"forest": 4, "river": 2, "sea": 3}


@pytest.mark.parametrize("to", [".", "..", "../forest", "../../data"])
def test_loops_of_links_end_and_are_said(root: Path, to: str) -> None:
    (root / "forest" / "loop").symlink_to(to)
    with pytest.warns(PNCWarning, match="linked folder that was read already"):
        counts = load_data(f"folder:{root}").counts()
    assert counts["river"] == 1 and 1 <= counts["forest"] <= 3


def test_folders_that_link_to_each_other_do_not_multiply(root: Path) -> None:
    for depth in range(12):  # 2^12 ways lead to the last one
        folder = root / "forest" / f"d{depth}"
        save(folder / "1.png", depth)
        for link in ("x", "y"):
            (folder / link).symlink_to(f"../d{depth + 1}")
    with pytest.warns(PNCWarning, match="linked folder that was read already"):
        assert load_data(f"folder:{root}").counts()["forest"] == 13


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_one_error(root: Path) -> None:
    (root / "forest" / "0.png").chmod(0)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        load_data(f"folder:{root}")


@pytest.mark.parametrize("body", ["a" * 5000, "a\0b"])
@pytest.mark.parametrize("scheme", ["folder", "parquet"])
def test_paths_that_cannot_be_looked_up(scheme: str, body: str) -> None:
    with pytest.raises(InputError, match="spec: .* cannot be looked up"):
        load_data(f"{scheme}:{body}")


def test_messages_about_files_with_odd_names_are_one_line(tmp_path):
    folder = tmp_path / "train" / "a\nb"
    folder.mkdir(parents=True)
    (folder / "x\ny.png").write_bytes(b"junk")
    with pytest.raises(InputError) as caught:
        load_data(f"folder:{tmp_path}", "train")
    assert "\n" not in str(caught.value) and r"x\ny.png is not a readable image" in str(caught.value)
