"""Servers for the bench, each in a process of its own: `pnc serve`, and the same server with whole networks.

As a program it serves whole networks: TARGET SOURCE NUMBER, and as many copies of the source as the number says.
"""

import copy
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from pnc.bench.latency import SideBySide
from pnc.data.image_files import required
from pnc.foundation.errors import InputError
from pnc.models.model_specs import load_model
from pnc.serving.deployment import Deployment, Target
from pnc.serving.limits import Limits
from pnc.serving.served_set import ServedSet

TOKEN = "token-of-the-bench"
_PATIENCE = 120.0
"""Seconds after which a server that has not started counts as failed."""


@dataclass(frozen=True)
class Process:
    """A running server."""

    pid: int
    port: int

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def meter(self, name: str) -> float:
        """A value of its /metrics."""
        text: str = required("httpx", "serve").get(f"{self.url}/metrics", timeout=60).text
        return next(float(line.split()[-1]) for line in text.splitlines() if line.split()[0] == name)


@contextmanager
def served(words: Sequence[str], wait_ms: float = 0.0, batch: int = Limits.batch) -> Iterator[Process]:
    """Run `python -m WORDS`, a server on a free port with one thread, within the block."""
    environment = {**os.environ, "PNC_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *words, "--batch", str(batch), "--wait-ms", str(wait_ms)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "serving" not in line:
            raise InputError("a server has not started; its error is above")
        port = int(line.split()[0].rstrip(":").rpartition(":")[2])
        end = time.monotonic() + _PATIENCE
        httpx = required("httpx", "serve")
        while httpx.get(f"http://127.0.0.1:{port}/ready").status_code != 200:
            if time.monotonic() > end:
                raise InputError("a server does not get ready")
            time.sleep(0.05)
        yield Process(process.pid, port)
    finally:
        process.terminate()
        process.wait(60)
        if process.stdout is not None:
            process.stdout.close()


def serve_words(target: str, source: str, clones: Sequence[Path]) -> list[str]:
    """The command of a target with clones, in the order of the files."""
    words = ["pnc", "serve", "--target", target, "--source", source, "--port", "0", "--threads", "1"]
    for path in clones:
        words += ["--clone", str(path)]
    return words


def whole_words(target: str, source: str, n_sources: int) -> list[str]:
    """The command of a target with whole sources beside it."""
    return [__name__, target, source, str(n_sources)]


def main(words: Sequence[str]) -> None:
    """Serve whole networks side by side, as fast as the server can."""
    from pnc.serving.running import run
    from pnc.serving.web_app import Server

    torch.set_num_threads(1)
    target, source = load_model(words[0]), load_model(words[1])
    deployment = Deployment(Target(target.module, target.classes, target.input_shape))
    copies = [copy.deepcopy(source.module) for _ in range(int(words[2]))]
    classes = [f"{name} of source {number + 1}" for number in range(len(copies)) for name in source.classes]
    net = SideBySide(target.module, *copies).eval()
    deployment.current = ServedSet(1, net, (*target.classes, *classes), ())
    batch, wait_ms = (words[words.index(option) + 1] for option in ("--batch", "--wait-ms"))
    limits = Limits(int(batch), float(wait_ms))
    server = Server(deployment, limits, TOKEN)
    run(server, "127.0.0.1", 0, lambda host, port: print(f"http://{host}:{port}: serving", flush=True))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
