"""Bodies of requests: raw bytes, forms with files, and JSON with base64; and the images in them, decoded."""

import base64
import binascii
import io
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pnc.data.image_files import decode, image_errors, required
from pnc.data.image_set import images_as_float
from pnc.data.normalization import Normalization
from pnc.foundation.errors import InputError
from pnc.serving.limits import Limits
from pnc.serving.refusals import OTHER_TYPE, TOO_LARGE, UNUSABLE, Refusal

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are read; Pillow hands others, such as EPS, to programs of the system."""

SMALL_BYTES, SMALL_PIXELS = 1 << 13, 1 << 14
"""Images up to this size are decoded where they are: handing them to another thread would take longer."""

_RAW = ("", "application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded")
"""Content types of an image as it is; the last one is what curl sends with --data-binary."""
_JSON_HINT = 'expected {"image": BASE64} or {"images": [BASE64, ...]}'


@dataclass(frozen=True)
class Upload:
    """The bytes of one image file, and its name if it came with one."""

    content: bytes
    name: str | None = None

    @property
    def text(self) -> str:
        """What messages call it."""
        return self.name or "the image"


async def uploads_of(content_type: str, headers: Any, body: bytes, limits: Limits) -> list[Upload]:
    """Find the images in a body.

    Args:
        content_type: The header of that name.
        headers: All headers, as Starlette's form parser takes them.
        body: The whole body.
        limits: Of the server.
    Raises:
        Refusal: 415 for another content type, 413 for too many images, 422 for none and for damaged forms and JSON.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        found = await _form_files(headers, body, limits.batch)
    elif kind == "application/json":
        found = _json_images(body)
    elif kind in _RAW or kind.startswith("image/"):
        found = [Upload(body)] if body else []
    else:
        raise Refusal(
            OTHER_TYPE, f"content type {kind[:80]!r}: send an image as it is, multipart/form-data, or application/json"
        )
    if not found:
        raise Refusal(UNUSABLE, "the request has no image; send at least one")
    if len(found) > limits.batch:
        raise Refusal(TOO_LARGE, f"{len(found)} images; send at most {limits.batch} at a time")
    return found


async def _form_files(headers: Any, body: bytes, most: int) -> list[Upload]:
    parsers = required("starlette.formparsers", "serve", "serve")
    multipart = required("python_multipart.exceptions", "serve", "serve")

    async def parts() -> AsyncIterator[bytes]:
        yield body

    parser = None
    try:
        parser = parsers.MultiPartParser(headers, parts(), max_files=most + 1, max_fields=most + 1)
        form = await parser.parse()
        files = [(one, one.filename) for _, one in form.multi_items() if not isinstance(one, str)]
        found = [Upload(await one.read(), name) for one, name in files]
    except (parsers.MultiPartException, multipart.FormParserError) as error:
        reason = " ".join(str(getattr(error, "message", error)).split())
        status = TOO_LARGE if "Too many" in reason else UNUSABLE
        raise Refusal(status, f"the form cannot be read ({reason:.200})") from error
    except (KeyError, UnicodeError, LookupError, ValueError) as error:  # no boundary, or an unknown charset
        raise Refusal(UNUSABLE, "the form cannot be read; send multipart/form-data with a boundary") from error
    finally:
        for file in getattr(parser, "_files_to_close_on_error", ()):  # also those of parts that never end
            file.close()
    return [one for one in found if one.content]


def _json_images(body: bytes) -> list[Upload]:
    try:
        facts = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(UNUSABLE, f"the body is not JSON; {_JSON_HINT}") from error
    if not isinstance(facts, dict) or ("image" in facts) == ("images" in facts):  # both: which one is meant?
        raise Refusal(UNUSABLE, _JSON_HINT)
    texts = facts["images"] if "images" in facts else [facts["image"]]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Refusal(UNUSABLE, _JSON_HINT)
    encoded = [text.partition(",")[2] if text.startswith("data:") else text for text in texts]
    try:
        return [Upload(base64.b64decode(text, validate=True)) for text in encoded]
    except (binascii.Error, ValueError) as error:
        raise Refusal(UNUSABLE, f"an image is not base64 ({error}); {_JSON_HINT}") from error


def is_small(uploads: Sequence[Upload]) -> bool:
    """Whether the images can be decoded at once, without another thread."""
    return sum(len(one.content) for one in uploads) <= SMALL_BYTES


def decoded(
    uploads: Sequence[Upload],
    input_shape: tuple[int, ...],
    normalization: Normalization | None,
    pixels: int,
) -> Tensor:
    """Decode images as `pnc.predict` does: upright, cropped at the centre, resized, in [0, 1], normalized.

    Args:
        uploads: The files.
        input_shape: (C, H, W) that the network takes.
        normalization: What the network's own loader does to images in [0, 1].
        pixels: Most pixels of one image, by its header; checked before any is decoded.
    Returns:
        (N, C, H, W), float32.
    Raises:
        Refusal: 413 for too many pixels, 422 for what is not an image of a known format.
    """
    for one in uploads:
        width, height = _size(one)
        if width * height > pixels:
            raise Refusal(TOO_LARGE, f"{one.text} has {width}x{height} pixels; send at most {pixels:,}")
    channels, height, width = input_shape
    contents = [one.content for one in uploads]
    try:
        images = decode(contents, [one.text for one in uploads], channels, (width, height), "images")
    except InputError as error:
        raise Refusal(UNUSABLE, str(error).removeprefix("images: ")) from error
    scaled = images_as_float(images)
    return scaled if normalization is None else normalization.apply(scaled)


def has_few_pixels(uploads: Sequence[Upload]) -> bool:
    """Whether all images are so small that decoding them takes no time worth mentioning."""
    return all(width * height <= SMALL_PIXELS for width, height in map(_size, uploads))


def _size(upload: Upload) -> tuple[int, int]:
    """Width and height by the header."""
    pillow = required("PIL.Image", "serve", "serve")
    try:
        with image_errors(upload.text, "images"), pillow.open(io.BytesIO(upload.content), "r", FORMATS) as image:
            size: tuple[int, int] = image.size
    except InputError as error:
        if isinstance(error.__cause__, pillow.DecompressionBombError | pillow.DecompressionBombWarning):
            raise Refusal(TOO_LARGE, f"{upload.text} has more pixels than can be decoded safely; shrink it") from error
        known = ", ".join(FORMATS)
        raise Refusal(UNUSABLE, f"{upload.text} is not an image of a known format; send one of {known}") from error
    return size
