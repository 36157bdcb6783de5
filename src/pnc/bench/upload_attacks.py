"""Mutated uploads to a server of clones: damaged images, forms, JSON and clone files; none may bring it down."""

import base64
import io
import json
import time
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

from pnc.bench.file_damage import MUTATIONS, Mutation, flip_bits, move_bytes, truncate
from pnc.data.image_files import required

SECONDS = 10.0
"""Time after which an upload counts as hanging."""

_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
_BYTES: Sequence[Mutation] = (flip_bits, truncate, move_bytes)
_FORM = "multipart/form-data; boundary=limit"


def images_as_files(pixels: Sequence[Any]) -> list[tuple[str, bytes]]:
    """Images in every format that the server reads, and as forms and JSON: content types and bodies.

    Args:
        pixels: Arrays (H, W) or (H, W, 3), uint8.
    """
    pillow, found = required("PIL.Image", "serve"), []
    for one in pixels:
        for suffix in _FORMATS:
            buffer = io.BytesIO()
            pillow.fromarray(one).save(buffer, suffix)
            found.append(("application/octet-stream", buffer.getvalue()))
        content = found[-len(_FORMATS)][1]
        text = base64.b64encode(content).decode()
        found.append(("application/json", json.dumps({"images": [text, text]}).encode()))
        part = b'--limit\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n' + content
        found.append((_FORM, part + b"\r\n" + part + b"\r\n--limit--\r\n"))
    return found


def upload(
    url: str, token: str, numbers: Sequence[int], images: Sequence[tuple[str, bytes]], clones: Sequence[bytes]
) -> dict[str, Any]:
    """Send mutated uploads, one after the other.

    Args:
        url: Of the server.
        token: Of the server.
        numbers: Each determines one upload: even ones are images, odd ones clone files.
        images: Good bodies, from `images_as_files`.
        clones: Good clone files.
    Returns:
        How often each status came, by the kind of upload; server errors other than 503; uploads that took too long or
        lost their connection; and the longest time in seconds.
    """
    httpx = required("httpx", "serve")
    found: Counter[str] = Counter()
    errors, hangs, lost, longest = 0, 0, 0, 0.0
    names = list(MUTATIONS)
    with httpx.Client(base_url=url, timeout=SECONDS, headers={"Authorization": f"Bearer {token}"}) as client:
        for number in numbers:
            random, start = Random(number), time.perf_counter()
            try:
                if number % 2:
                    content = MUTATIONS[names[number // 2 % len(names)]](random.choice(clones), random)
                    kind, answer = "clone", client.put("/clones/attacked", content=content)
                else:
                    content_type, content = random.choice(images)
                    content = random.choice(_BYTES)(content, random)
                    headers = {"Content-Type": content_type}
                    kind, answer = "image", client.post("/predict", content=content, headers=headers)
            except httpx.TimeoutException:
                hangs += 1
                continue
            except httpx.TransportError:
                lost += 1
                continue
            longest = max(longest, time.perf_counter() - start)
            found[f"{kind} {answer.status_code}"] += 1
            errors += answer.status_code >= 500 and answer.status_code != 503
            if kind == "clone" and answer.is_success:
                client.delete("/clones/attacked")
    return {
        "statuses": dict(sorted(found.items())),
        "errors": errors,
        "hangs": hangs,
        "lost": lost,
        "longest_s": longest,
    }
