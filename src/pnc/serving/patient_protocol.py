"""HTTP connections that are closed if the head of a request does not arrive in time.

uvicorn closes connections that are idle between requests, but waits for ever for the first request and for the rest of
a head.
"""

from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class PatientProtocol(H11Protocol):
    """uvicorn's protocol, with a limit on the time that a client may take for a head."""

    seconds = 20.0

    def connection_made(self, transport: Any) -> None:
        """Start to look at the connection."""
        super().connection_made(transport)
        self._seen: object = self
        self._timer = self.loop.call_later(self.seconds, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop to look at it."""
        self._timer.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Close the connection if it has waited for the same head since the last look."""
        waits = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None
        if self.cycle is None or (waits and self._seen is self.cycle):
            self.transport.close()
            return
        self._seen = self.cycle if waits else self
        self._timer = self.loop.call_later(self.seconds, self._look)


def patient_protocol(seconds: float) -> type[PatientProtocol]:
    """The protocol with this limit."""
    return type("Patient", (PatientProtocol,), {"seconds": seconds})
