"""HTTP connections that are closed if the head of a request does not arrive in time, or is too long.

uvicorn closes connections that are idle between requests, but waits for ever for the first request and for the rest of
a head, and its parser in C, httptools, holds a head of any length.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 1 << 16


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with limits on the time that a client may take for a head, and on its length."""

    seconds = 20.0

    def connection_made(self, transport: Any) -> None:
        """Wait for the first head."""
        super().connection_made(transport)
        self._awaits_head, self._n_bytes = True, 0
        self._timer: asyncio.TimerHandle | None = self.loop.call_later(self.seconds, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop to wait."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on; the time counts from the first byte of a head, and of a body that nobody reads any more."""
        if self._timer is None and (self._awaits_head or self.cycle.response_complete):
            self._timer = self.loop.call_later(self.seconds, self.transport.close)
        if self._awaits_head:
            self._n_bytes += len(data)
        super().data_received(data)
        if self._awaits_head and self._n_bytes > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The head of a request may have {HEAD_BYTES} bytes.")

    def on_headers_complete(self) -> None:
        """The head is here."""
        self._stop()
        self._awaits_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is here: what follows is another head."""
        self._stop()
        self._awaits_head, self._n_bytes = True, 0
        super().on_message_complete()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def patient_protocol(seconds: float) -> type[PatientProtocol]:
    """The protocol with this limit."""
    return type("Patient", (PatientProtocol,), {"seconds": seconds})
