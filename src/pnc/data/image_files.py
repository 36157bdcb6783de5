"""Image files decoded to pixels, by Pillow: which formats, upright, of one size, and one error whatever is in them."""

import importlib
import io
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pnc.foundation.class_names import listed
from pnc.foundation.errors import InputError
from pnc.foundation.file_writing import checked_path, path_text

_PIL_MODES = {1: "L", 3: "RGB"}
_GREY_MODES = frozenset({"1", "L", "LA", "La"})
_ORIENTATION = 0x0112  # the EXIF tag; values from 5 swap width and height
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_ONLY_IDENTIFIED = frozenset({"BUFR", "GRIB", "HDF5", "MPEG"})
"""Formats that Pillow knows by their first bytes and cannot decode."""

# What decoders raise for files that are no image, damaged, cut short or too large: anything that bytes can lead to.
_DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError),
    *(RuntimeError, MemoryError, struct.error, zlib.error),
    Warning,  # of Pillow's, where the caller makes errors of warnings
)


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes, in small letters, of the formats that Pillow can decode."""
    pillow = required("PIL.Image", "data")
    pillow.init()
    readable = pillow.OPEN.keys() - _ONLY_IDENTIFIED
    return frozenset(suffix for suffix, kind in pillow.registered_extensions().items() if kind in readable)


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
    missing = [path_text(path) for path in paths if not checked_path(path, "images").is_file()]
    if missing or not paths:
        raise InputError(f"images: there is no file {listed(missing, 3)}")
    return decode([read_file(Path(path), "images") for path in paths], list(map(str, paths)), channels, (width, height))


def read_file(path: Path, argument: str = "spec") -> bytes:
    """Read a regular file.

    Raises:
        InputError: it is none, or cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a FIFO would be waited for, a device has no end
            raise InputError(f"{argument}: {path_text(path)} is no regular file; remove or replace it")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{argument}: {path_text(path)} cannot be read: {error.strerror or error}") from error


def decode(
    encoded: Sequence[bytes], names: Sequence[str], channels: int | None, size: tuple[int, int] | None
) -> Tensor:
    """Decode image files to uint8 (N, C, H, W); the headers first, because they decide on what is not given.

    An image that its EXIF data says to turn is turned; where these are damaged it stays as it lies. Of a file with
    several pictures the first is taken.

    Args:
        encoded: The files' bytes.
        names: What to call each in a message.
        channels: 1 or 3; None takes what most images have.
        size: (width, height); None takes the one that all images have.
    """
    ops, pillow = required("PIL.ImageOps", "data"), required("PIL.Image", "data")
    headers = [_opened(content, name) for content, name in zip(encoded, names, strict=True)]
    if not headers:
        raise InputError("spec: the data has no row")
    if channels is None:
        channels = 1 if sum(image.mode in _GREY_MODES for image in headers) > len(headers) / 2 else 3
    turned = [_orientation(image) for image in headers]
    sizes = {image.size[:: -1 if turn >= 5 else 1] for image, turn in zip(headers, turned, strict=True)}
    if size is None and len(sizes) > 1:
        some = listed([f"{width}x{height}" for width, height in sorted(sizes)], 3)
        raise InputError(f"spec: the images have different sizes ({some}); choose one, as in ?size=64")
    width, height = size or next(iter(sizes))
    pixels = np.empty((len(headers), height, width, channels), dtype=np.uint8)
    for index, (image, turn) in enumerate(zip(headers, turned, strict=True)):
        with image_errors(names[index]):
            upright = image.transpose(pillow.Transpose[_TURNS[turn]]) if turn != 1 else image
            upright = upright.convert(_PIL_MODES[channels])
            if upright.size != (width, height):
                upright = ops.fit(upright, (width, height), method=pillow.Resampling.BILINEAR)
            pixels[index] = np.asarray(upright).reshape(height, width, channels)
        image.close()  # frees its pixels, which have any size
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _opened(content: bytes, name: str) -> Any:
    with image_errors(name):
        image = required("PIL.Image", "data").open(io.BytesIO(content))
    if image.mode == "F" or image.mode.startswith("I"):
        raise InputError(f"spec: {name} has more than 8 bits per channel (mode {image.mode}); convert it first")
    return image


def _orientation(image: Any) -> int:
    """How an image is to be turned, 1 to 8 as in EXIF; 1, as it lies, where nothing readable says so."""
    if image.format == "TIFF" or "exif" not in image.info:
        return 1  # Pillow turns TIFF files itself; asking a PNG without EXIF for it would decode the image
    try:
        turn = image.getexif().get(_ORIENTATION, 1)
    except _DECODING_ERRORS:  # broken EXIF, which decoding needs nothing of
        return 1
    return turn if type(turn) is int and turn in _TURNS else 1


@contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Turn what decoding an image may raise into one line that calls it by `name`."""
    pillow = required("PIL.Image", "data")
    try:
        yield
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise InputError(f"spec: {name} is too large to be opened safely ({error}); shrink it, or remove it") from error
    except _DECODING_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"spec: {name} is no readable image ({reason:.200}); remove or replace it") from error


def required(module: str, extra: str) -> Any:
    """Import a module of an optional package.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise InputError(f'spec: the package {package} is needed for this; pip install "pnc[{extra}]"') from error
