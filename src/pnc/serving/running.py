"""A server from its first to its last moment: uvicorn, its settings, and a graceful stop."""

import gc
import logging
import warnings
from collections.abc import Callable
from typing import Any

import uvicorn

from pnc.foundation.errors import InputError
from pnc.serving.kept_memory import keep_freed_memory
from pnc.serving.patient_protocol import patient_protocol
from pnc.serving.web_app import Server, make_app

STOP_SECONDS = 30
"""Time that running requests have once the server is asked to stop."""

KEEP_ALIVE_SECONDS = 75


class _Announced(uvicorn.Server):
    """uvicorn's server, which says where it listens."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[str, int], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: Any = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._announce(host, port)


def uvicorn_server(server: Server, host: str, port: int, announce: Callable[[str, int], None]) -> uvicorn.Server:
    """The server, ready to run: `run()` returns after SIGINT or SIGTERM, or once `should_exit` is set.

    Args:
        server: What it serves.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        announce: Is called with host and port once the server listens.
    """
    config = uvicorn.Config(
        make_app(server),
        host=host,
        port=port,
        http=patient_protocol(server.limits.body_seconds),
        loop="auto",  # uvloop where it is installed
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    return _Announced(config, announce)


def run(server: Server, host: str, port: int, announce: Callable[[str, int], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        InputError: the address cannot be used.
    """
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # it warns of every request that is not HTTP
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # and this of every damaged form
    warnings.filterwarnings("ignore", module=r"PIL\.")  # and this of damaged files: clients are told
    keep_freed_memory()
    gc.collect()
    gc.freeze()  # what is loaded by now stays: collections after each change of the clones need not look at it
    running = uvicorn_server(server, host, port, announce)
    try:
        running.run()
    except SystemExit as error:  # uvicorn has logged why it cannot listen
        raise InputError(f"host: cannot listen on {host}:{port}; choose another --host or --port") from error
