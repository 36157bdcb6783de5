"""Image files decoded to pixels of one size by Pillow, turned upright, with one error for any bad file."""

import importlib
import io
import stat
import struct
import zlib
from collections import Counter
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

PIL_MODES = {1: "L", 3: "RGB"}
"""Pillow's mode for each number of channels."""

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
"""Formats that Pillow identifies but cannot decode."""

# Everything that decoders raise for files that are not images, damaged, truncated or too large.
_DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError),
    *(RuntimeError, MemoryError, struct.error, zlib.error),
    Warning,  # from Pillow, if the caller turns warnings into errors
)


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes, in lower case, of the formats that Pillow can decode."""
    pillow = required("PIL.Image", "data")
    pillow.init()
    readable = pillow.OPEN.keys() - _ONLY_IDENTIFIED
    return frozenset(suffix for suffix, kind in pillow.registered_extensions().items() if kind in readable)


def load_images(paths: Sequence[str | Path], input_shape: Sequence[int]) -> Tensor:
    """Read image files in the shape that a network takes.

    Args:
        paths: Image files of any size.
        input_shape: (C, H, W), with 1 or 3 channels. Images are cropped at their centre to this ratio and resized.

    Returns:
        (N, C, H, W), uint8.

    Raises:
        InputError: a file does not exist or is not an image, or C is neither 1 nor 3.
    """
    channels, height, width = input_shape
    if channels not in PIL_MODES:
        raise InputError(f"input_shape: image files have 1 or 3 channels, this network takes {channels}; pass tensors")
    missing = [path_text(path) for path in paths if not checked_path(path, "images").is_file()]
    if missing or not paths:
        raise InputError(f"images: there is no file {listed(missing, 3)}")
    encoded = [read_file(Path(path), "images") for path in paths]
    return decode(encoded, list(map(str, paths)), channels, (width, height), "images")


def read_file(path: Path, argument: str = "spec") -> bytes:
    """Read a regular file.

    Raises:
        InputError: it is not a regular file, or cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a FIFO would block, a device might never end
            raise InputError(f"{argument}: {path_text(path)} is not a regular file; remove or replace it")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{argument}: {path_text(path)} cannot be read: {error.strerror or error}") from error


def decode(
    encoded: Sequence[bytes],
    names: Sequence[str],
    channels: int | None,
    size: tuple[int, int] | None,
    argument: str = "spec",
) -> Tensor:
    """Decode image files to uint8 (N, C, H, W); their headers decide what is not given.

    Images are turned upright by their EXIF data; images with damaged EXIF data are not turned. Of a file with several
    pictures the first is used.

    Args:
        encoded: The bytes of each file.
        names: What messages call each file.
        channels: 1 or 3; None for that of most images.
        size: (width, height); None for the one size that all images have.
        argument: The argument that errors name.
    """
    pillow = required("PIL.Image", "data")
    headers = [_opened(content, name, argument) for content, name in zip(encoded, names, strict=True)]
    if not headers:
        raise InputError(f"{argument}: the data has no rows")
    if channels is None:
        channels = 1 if sum(image.mode in _GREY_MODES for image in headers) > len(headers) / 2 else 3
    turns = [_orientation(image) for image in headers]
    sizes = [image.size[:: -1 if turn >= 5 else 1] for image, turn in zip(headers, turns, strict=True)]
    (width, height), n_alike = Counter(sizes).most_common(1)[0]
    if size is None and n_alike < len(sizes):
        other = next(place for place, one in enumerate(sizes) if one != (width, height))
        raise InputError(
            f"{argument}: the images have different sizes: {n_alike} of {len(sizes)} are {width}x{height}, "
            f"{path_text(names[other])} is {sizes[other][0]}x{sizes[other][1]}; choose one, for example ?size={height}"
        )
    width, height = size or (width, height)
    pixels = np.empty((len(headers), height, width, channels), dtype=np.uint8)
    for index, (image, turn) in enumerate(zip(headers, turns, strict=True)):
        with image_errors(names[index], argument):
            upright = image.transpose(pillow.Transpose[_TURNS[turn]]) if turn != 1 else image
            pixels[index] = fitted_pixels(upright, channels, (width, height))
        image.close()  # frees its pixels, which may be many
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _opened(content: bytes, name: str, argument: str) -> Any:
    with image_errors(name, argument):
        image = required("PIL.Image", "data").open(io.BytesIO(content))
    check_depth(image, f"{argument}: {name}")
    return image


def check_depth(image: Any, name: str) -> None:
    """Raise an `InputError` if a Pillow image has more than 8 bits per channel; its message begins with `name`."""
    if image.mode == "F" or image.mode.startswith("I"):
        raise InputError(f"{name} has more than 8 bits per channel (mode {image.mode}); convert it first")


def fitted_pixels(image: Any, channels: int, size: tuple[int, int]) -> Any:
    """The pixels of an upright Pillow image, cropped at its centre and resized: an array (H, W, channels), uint8.

    Args:
        image: The image.
        channels: 1 or 3.
        size: (width, height).
    """
    ops, pillow = required("PIL.ImageOps", "data"), required("PIL.Image", "data")
    image = image.convert(PIL_MODES[channels])
    if image.size != size:
        image = ops.fit(image, size, method=pillow.Resampling.BILINEAR)
    return np.asarray(image).reshape(size[1], size[0], channels)


def _orientation(image: Any) -> int:
    """The EXIF orientation of an image, 1 to 8; 1, upright, if there is no readable one."""
    if image.format == "TIFF" or "exif" not in image.info:
        return 1  # Pillow turns TIFF files itself; asking for the EXIF data of a PNG without any would decode the image
    try:
        turn = image.getexif().get(_ORIENTATION, 1)
    except _DECODING_ERRORS:  # damaged EXIF data do not prevent decoding
        return 1
    return turn if type(turn) is int and turn in _TURNS else 1


@contextmanager
def image_errors(name: str, argument: str) -> Iterator[None]:
    """Turn any error of decoding an image into one `InputError`, which calls the image `name`, of an argument."""
    pillow, name = required("PIL.Image", "data"), path_text(name)
    try:
        yield
    except pillow.UnidentifiedImageError as error:  # its text names an object of Python
        raise InputError(
            f"{argument}: {name} is not a readable image (empty, or of no format that Pillow knows); remove or "
            "replace it"
        ) from error
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise InputError(
            f"{argument}: {name} is too large to be opened safely ({error}); shrink it, or remove it"
        ) from error
    except _DECODING_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{argument}: {name} is not a readable image ({reason:.200}); remove or replace it") from error


def required(module: str, extra: str, argument: str = "spec") -> Any:
    """Import a module of an optional package.

    Args:
        module: Its name.
        extra: The extra of pnc that installs it.
        argument: What the message begins with.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise InputError(f'{argument}: the package {package} is needed for this; pip install "pnc[{extra}]"') from error
