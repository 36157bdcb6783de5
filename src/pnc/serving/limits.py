"""Limits of a server: what one request, one client and all of them together may take."""

import math
from dataclasses import dataclass, fields

from pnc.foundation.errors import InputError

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Limits of a server; all above 0, except that `wait_ms` may be 0.

    Attributes:
        batch: Images that the network computes at a time, and most images of one request.
        wait_ms: Milliseconds that the first image of a batch waits for others.
        queue: Requests that are decoded, wait or are computed at a time; beyond it the server answers 503.
        per_client: The same for one client's address; beyond it the client gets 429.
        body_bytes: Size of a request's body; beyond it 413.
        all_bytes: Size of all bodies in memory; beyond it 503.
        clone_bytes: Size of a clone file; beyond it 413.
        pixels: Pixels of one image, from its header; beyond it 413.
        body_seconds: Time for a body to arrive; beyond it 408. The head of a request has the same time.
    """

    batch: int = 32
    wait_ms: float = 2.0
    queue: int = 256
    per_client: int = 128
    body_bytes: int = 16 * MIB
    all_bytes: int = 256 * MIB
    clone_bytes: int = 256 * MIB
    pixels: int = 25_000_000
    body_seconds: float = 20.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "wait_ms" else 1e-3 if field.type is float else 1
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
                raise InputError(f"{field.name}: expected a number, at least {least:g}; got {value!r}")
