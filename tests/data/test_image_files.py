"""Image files that are damaged or unusual: one error that names the file, or the image not turned."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pnc.data.image_files import decode, load_images
from pnc.data.readers import load_data
from pnc.foundation.errors import InputError

PICTURE = np.arange(60, dtype=np.uint8).reshape(4, 5, 3) * 4


def encoded(kind: str = "PNG", image: Image.Image | None = None, **save: Any) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(PICTURE)).save(buffer, kind, **save)
    return buffer.getvalue()


def exif_of(kind: int, value: bytes) -> bytes:
    """EXIF data whose orientation is not a 16-bit number."""
    return b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00" + struct.pack("<HHI", 0x0112, kind, 4) + value + bytes(4)


def png_with(chunk: bytes, content: bytes) -> bytes:
    """A PNG with an extra chunk after its header."""
    whole = encoded()
    made = struct.pack(">I", len(content)) + chunk + content + struct.pack(">I", zlib.crc32(chunk + content))
    return whole[:33] + made + whole[33:]


AS_IT_LIES = torch.from_numpy(PICTURE).permute(2, 0, 1)[None]


@pytest.mark.parametrize(
    "content",
    [
        png_with(b"eXIf", b"\x00\x00\x00\x08\x00\x02\x01\x12\x00\x03"),
        png_with(b"eXIf", b""),
        png_with(b"eXIf", b"II*\x00\xff\xff\xff\xff"),
        encoded(exif=exif_of(2, b"6\x00\x00\x00")),
        encoded(exif=exif_of(5, b"\x06\x00\x00\x00")),
        encoded(exif=exif_of(3, b"\x63\x00\x00\x00")),
        encoded(exif=exif_of(3, b"\x00\x00\x00\x00")),
    ],
)
def test_broken_or_strange_exif_leaves_an_image_as_it_lies(content: bytes) -> None:
    assert torch.equal(decode([content], ["x"], 3, None), AS_IT_LIES)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_all_orientations_are_pillows(kind: str, turn: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = turn
    content = encoded(kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    assert torch.equal(decode([content], ["x"], 3, None), torch.from_numpy(expected.copy()).permute(2, 0, 1)[None])


def bomb() -> bytes:
    """A PNG of 200 million pixels in a few bytes."""
    return encoded(image=Image.new("1", (20000, 10000)))


def lying_header() -> bytes:
    """A PNG whose header claims two billion pixels, with data for twenty."""
    header = struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0)
    whole = encoded()
    return whole[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + whole[33:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bomb(), "is too large to be opened safely"),
        (lying_header(), "is too large to be opened safely"),
        (b"", "is not a readable image"),
        (b"GIF89a", "is not a readable image"),
        (encoded("TIFF")[:60], "is not a readable image"),
        (encoded("BMP")[:-20], "is not a readable image"),
        (encoded()[:-30], "is not a readable image"),
        (png_with(b"zTXt", b"a\x00\x00" + zlib.compress(bytes(80_000_000))), "is not a readable image"),
        (encoded("TIFF", Image.fromarray(np.zeros((4, 5), dtype=np.float32))), "more than 8 bits per channel"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "",
)
def test_files_that_cannot_be_decoded_are_one_error(tmp_path: Path, content: bytes, message: str) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(encoded())
    (tmp_path / "a" / "1.png").write_bytes(content)
    for call in (
        lambda: load_data(f"folder:{tmp_path}?size=4"),
        lambda: load_images([tmp_path / "a/1.png"], (3, 4, 4)),
    ):
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "1.png" in str(caught.value) and "\n" not in str(caught.value)


def test_any_damage_gives_pixels_or_one_error() -> None:
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = bytearray(encoded(kind))
        for _ in range(60):
            broken = whole.copy()
            for place in generator.integers(0, len(whole), 4):
                broken[place] = generator.integers(0, 256)
            try:
                assert decode([bytes(broken)], ["x"], 3, (5, 4)).shape == (1, 3, 4, 5)
            except InputError as error:
                assert "x " in str(error)


@pytest.mark.parametrize("path", ["a" * 5000, "a\0b.png", "missing.png", "."])
def test_paths_of_images_are_checked(path: str) -> None:
    with pytest.raises(InputError, match=r"images: "):
        load_images([path], (3, 4, 4))
