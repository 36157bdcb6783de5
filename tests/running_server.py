"""A server of the small pair's target in this process, and images for it."""

import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

import pnc
import small_pair
from pnc.serving.deployment import Deployment, Target
from pnc.serving.limits import Limits
from pnc.serving.running import uvicorn_server
from pnc.serving.watched_folder import WatchedFolder
from pnc.serving.web_app import Server

TOKEN = "a-token-for-tests"


def served_target():
    return Target(small_pair.target(), small_pair.BASE, (1, 8, 8))


def deployment(state=None, *names):
    """A deployment of the small pair, with clones of these classes attached over HTTP."""
    found = Deployment(served_target(), [("the source", small_pair.source())], state)
    for name in names:
        found.attach(name, clone_file(name))
    return found


@cache
def clone_file(*names, kind="thin"):
    """The bytes of a clone file of these classes."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder) / "clone.safetensors"
        pnc.save(small_pair.clone(*names), path, kind)
        return path.read_bytes()


def image_bytes(n, seed=9, kind="PNG", size=8):
    """Random grey images as files."""
    found = []
    for pixels in np.random.default_rng(seed).integers(0, 256, (n, size, size), dtype=np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        found.append(buffer.getvalue())
    return found


@dataclass
class Running:
    """A running server."""

    url: str
    server: Server

    def client(self, token: str | None = TOKEN) -> pnc.Client:
        return pnc.Client(self.url, token)

    def post(self, content: bytes | Sequence[bytes], query: str = "", **more) -> httpx.Response:
        return httpx.post(f"{self.url}/predict{query}", content=content, timeout=30, **more)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@contextmanager
def running(
    found: Deployment, limits: Limits | None = None, token: str | None = TOKEN, watch: Path | None = None
) -> Iterator[Running]:
    """Serve within the block, in another thread."""
    limits = limits or Limits()
    watched = None if watch is None else WatchedFolder(watch, found, limits.clone_bytes)
    server, started, where = Server(found, limits, token, watched), threading.Event(), []

    def announce(host: str, port: int) -> None:
        where.append(f"http://{host}:{port}")
        started.set()

    uvicorn = uvicorn_server(server, "127.0.0.1", 0, announce)
    thread = threading.Thread(target=uvicorn.run)
    thread.start()
    try:
        assert started.wait(30)
        yield Running(where[0], server)
    finally:
        uvicorn.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
