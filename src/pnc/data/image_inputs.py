"""Unlabelled images from files, folders, Pillow images, arrays and tensors."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pnc.data.image_files import (
    PIL_MODES,
    check_depth,
    fitted_pixels,
    image_errors,
    image_suffixes,
    load_images,
    required,
)
from pnc.data.image_set import ImageSet, images_as_float
from pnc.data.normalization import Normalization
from pnc.data.support import Support
from pnc.foundation.errors import InputError
from pnc.foundation.file_writing import checked_path, path_text


@dataclass(frozen=True, eq=False)
class ImageInput:
    """One image, not yet read.

    Attributes:
        content: A path, a Pillow image, or a tensor (C, H, W).
        path: The path of its file, as given or found; None if there is none.
    """

    content: Any
    path: str | None


def find_images(images: Any) -> list[ImageInput]:
    """List images without reading them.

    Args:
        images: The path of a file; the path of a folder, for all images in it and below, sorted by path; a Pillow
            image; a uint8 array (H, W), (H, W, C) or (N, H, W, C), as from Pillow or OpenCV (after BGR to RGB); a
            tensor (C, H, W) or (N, C, H, W); an ImageSet or a Support; or a sequence of any of these.
    Raises:
        InputError: there is no such file or folder, a folder has no image, nothing is given, or it is of another type.
    """
    found = list(_found(images))
    if not found:
        raise InputError("images: expected at least one, got none")
    return found


def _found(images: Any) -> Iterable[ImageInput]:
    if isinstance(images, str | Path):
        yield from (ImageInput(path, str(path)) for path in _files(checked_path(images, "images")))
    elif isinstance(images, ImageSet | Support):
        yield from _found(images.images)
    elif isinstance(images, Tensor):
        if images.ndim not in (3, 4):
            raise InputError(f"images: expected a tensor (C, H, W) or (N, C, H, W), got {tuple(images.shape)}")
        yield from (ImageInput(one, None) for one in (images if images.ndim == 4 else images[None]))
    elif isinstance(images, np.ndarray):
        yield from (ImageInput(_pillow_image(one), None) for one in (images if images.ndim == 4 else [images]))
    elif _is_pillow(images):
        yield ImageInput(images, getattr(images, "filename", None) or None)
    elif isinstance(images, Iterable):
        for one in images:
            yield from _found(one)
    else:
        raise InputError(
            "images: expected paths, Pillow images, uint8 arrays (H, W, C), tensors (C, H, W), or a sequence of these; "
            f"got {type(images).__name__}"
        )


def _files(path: Path) -> Sequence[Path]:
    if not path.is_dir():
        if not path.exists():
            raise InputError(f"images: there is no file or folder {path_text(path)}")
        return [path]
    suffixes = image_suffixes()
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in suffixes and not file.name.startswith(".") and file.is_file()
    ]
    if not files:
        raise InputError(f"images: the folder {path_text(path)} has no image in it, such as a .jpg or a .png file")
    return files


def read_images(
    images: Sequence[ImageInput], input_shape: Sequence[int], normalization: Normalization | None = None
) -> Tensor:
    """Read images in the shape and the normalization that a network takes.

    Files, Pillow images and arrays are turned upright, cropped at their centre to the ratio of the network's images,
    resized and normalized, as in `pnc predict`. Tensors of type uint8 are divided by 255 and normalized; floating-point
    tensors are used unchanged.

    Args:
        images: From `find_images`.
        input_shape: (C, H, W) that the network takes.
        normalization: What the network's own loader does to images in [0, 1]; None for nothing.
    Returns:
        (N, C, H, W), float32.
    Raises:
        InputError: a file is not a readable image, a tensor has another shape, or C is neither 1 nor 3 and an image is
            not a tensor.
    """
    return torch.stack([_read(one, tuple(input_shape), normalization) for one in images])


def _read(image: ImageInput, input_shape: tuple[int, ...], normalization: Normalization | None) -> Tensor:
    content = image.content
    if isinstance(content, Tensor):
        if tuple(content.shape) != input_shape:
            raise InputError(
                f"images: expected tensors {input_shape}, as the network takes them, got {tuple(content.shape)}; "
                "resize them, or pass paths, Pillow images or arrays"
            )
        pixels = content[None]
    elif isinstance(content, Path):
        pixels = load_images([content], input_shape)
    else:
        pixels = _fitted(content, input_shape)
    if pixels.is_floating_point():
        return pixels[0].float()
    scaled = images_as_float(pixels)
    return (scaled if normalization is None else normalization.apply(scaled))[0]


def _fitted(image: Any, input_shape: tuple[int, ...]) -> Tensor:
    """A Pillow image in the form in which `load_images` returns a file, (1, C, H, W), uint8."""
    channels, height, width = input_shape
    if channels not in PIL_MODES:
        raise InputError(f"images: Pillow images and arrays have 1 or 3 channels, this network takes {channels}")
    check_depth(image, "images: an image")
    with image_errors(getattr(image, "filename", None) or "an image", "images"):
        upright = required("PIL.ImageOps", "data", "images").exif_transpose(image)
        pixels = np.array(fitted_pixels(upright, channels, (width, height)))  # a copy, which torch may write to
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _is_pillow(image: Any) -> bool:
    pillow = sys.modules.get("PIL.Image")  # if it is not loaded, there cannot be an image of it
    return pillow is not None and isinstance(image, pillow.Image)


def _pillow_image(array: np.ndarray[Any, Any]) -> Any:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        raise InputError(
            f"images: expected arrays (H, W) or (H, W, C) of type uint8, got {array.dtype} {array.shape}; "
            "pass images that are ready for the network as tensors"
        )
    pillow = required("PIL.Image", "data", "images")
    return pillow.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)
