"""Admission: how many requests and bytes are in the server at a time, of all clients and of each."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from pnc.serving.limits import Limits
from pnc.serving.refusals import BUSY, TOO_MANY, Refusal


class Admission:
    """Counts what is in the server; used by the event loop only.

    A request takes a place once its body has arrived: a client that sends slowly takes none.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._clients: Counter[str] = Counter()
        self.n_requests = self.n_bytes = 0

    @contextmanager
    def bytes_of(self) -> Iterator["Bytes"]:
        """Count the bytes of one body within the block."""
        held = Bytes(self)
        try:
            yield held
        finally:
            self.n_bytes -= held.n

    @contextmanager
    def place(self, client: str) -> Iterator[None]:
        """Take a place within the block.

        Raises:
            Refusal: 429 if the client has too many requests here, 503 if all clients together have.
        """
        limits = self._limits
        if self._clients[client] >= limits.per_client:
            raise Refusal(
                TOO_MANY, f"{limits.per_client} requests of this client are being answered; wait for answers", 1
            )
        if self.n_requests >= limits.queue:
            raise Refusal(BUSY, f"the queue is full: {limits.queue} requests are being answered; try again later", 1)
        self.n_requests += 1
        self._clients[client] += 1
        try:
            yield
        finally:
            self.n_requests -= 1
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]

    def add_bytes(self, number: int) -> None:
        """Count more bytes.

        Raises:
            Refusal: 503 if there are too many in memory.
        """
        if self.n_bytes + number > self._limits.all_bytes:
            raise Refusal(BUSY, "too many bytes of requests are in memory; try again later", 1)
        self.n_bytes += number


class Bytes:
    """The bytes of one body."""

    def __init__(self, admission: Admission) -> None:
        self._admission, self.n = admission, 0

    def add(self, number: int) -> None:
        """Count more bytes of this body; as `Admission.add_bytes`."""
        self._admission.add_bytes(number)
        self.n += number
