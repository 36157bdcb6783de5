"""Load on a server of clones, from a process of its own: connections that ask again as soon as they are answered.

It speaks HTTP by hand, so that it takes little of the machine that the server needs. As a program it reads a JSON
object with the fields of `Load` from standard input and writes the facts of its run to standard output.
"""

import asyncio
import base64
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pnc.foundation.errors import InputError

_MOST_LOST = 1000
"""Connections that one client opens before it gives up."""

MIXED = 1e-3
"""Difference of a probability above which an answer is not that of the set of clones that it names: a hundred times
what another batch changes."""


@dataclass(frozen=True)
class Load:
    """What is asked of a server.

    Attributes:
        port: Of the server, on this machine.
        connections: Number of clients.
        images: Image files in base64, asked in turn.
        seconds: Time that counts.
        warm: Seconds before it.
        until_told: Go on until `finish_load`, whatever `seconds` is.
        expected: By the names of the attached clones, joined by ", ": for each image the probability of each class.
            Empty: answers are not compared.
        top: Number of classes to ask for.
    """

    port: int
    connections: int
    images: Sequence[str]
    seconds: float = 0.0
    warm: float = 0.0
    until_told: bool = False
    expected: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    top: int = 1


@dataclass
class Tally:
    """What came back.

    Attributes:
        seconds: Latency of each answer that counts.
        failed: Answers other than 200, and lost connections, by what happened.
        mixed: Answers that no set of clones gives.
        sets: Number of answers of each set.
    """

    seconds: list[float]
    failed: dict[str, int]
    mixed: int
    sets: dict[str, int]


def start_load(load: Load) -> "subprocess.Popen[bytes]":
    """Start a process that makes the load; `finish_load` waits for its facts."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pnc.bench.load_generator"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(asdict(load)).encode() + b"\n")
    process.stdin.flush()
    return process


def finish_load(process: "subprocess.Popen[bytes]") -> dict[str, Any]:
    """End a load, and return its facts: rate, quantiles of the latency in ms, failed and mixed answers.

    A load of a number of seconds ends by itself.
    """
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    found = process.stdout.read()
    process.stdout.close()
    if process.wait() != 0:
        raise InputError("the process that makes the load has failed; its error is above")
    facts: dict[str, Any] = json.loads(found)
    return facts


async def _client(
    load: Load,
    requests: Sequence[bytes],
    first: int,
    times: tuple[float, float],
    told: asyncio.Event,
    tally: Tally,
) -> None:
    """One connection, which is opened again if it is lost."""
    number = first
    for _ in range(_MOST_LOST):
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", load.port)
            try:
                while not told.is_set() if load.until_told else time.perf_counter() < times[1]:
                    await _ask(load, requests, number % len(requests), reader, writer, times[0], tally)
                    number += load.connections
                return
            finally:
                writer.close()
        except (OSError, asyncio.IncompleteReadError) as error:
            _count(tally.failed, type(error).__name__)
            number += load.connections


async def _ask(
    load: Load,
    requests: Sequence[bytes],
    image: int,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    counts_from: float,
    tally: Tally,
) -> None:
    start = time.perf_counter()
    writer.write(requests[image])
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
    body = await reader.readexactly(length)
    end = time.perf_counter()
    if end >= counts_from:
        tally.seconds.append(end - start)
    if not head.startswith(b"http/1.1 200"):
        _count(tally.failed, head[9:12].decode())
    elif load.expected:
        _check(load, image, json.loads(body), tally)


def _check(load: Load, image: int, facts: Mapping[str, Any], tally: Tally) -> None:
    """Compare an answer with that of the set of clones that it names."""
    name = ", ".join(facts["clones"])
    _count(tally.sets, name)
    known = load.expected.get(name)
    found = {one["class"]: one["probability"] for one in facts["predictions"][0]["classes"]}
    same = known is not None and known[image].keys() == found.keys()
    if not same or any(abs(found[key] - value) > MIXED for key, value in known[image].items()):  # type: ignore[index]
        tally.mixed += 1


def _count(counts: dict[str, int], key: str) -> None:
    counts[key] = counts.get(key, 0) + 1


def _request(load: Load, image: str) -> bytes:
    content = base64.b64decode(image)
    head = (
        f"POST /predict?top={load.top} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def make_load(load: Load, told: asyncio.Event) -> dict[str, Any]:
    """Make a load in this process, and return its facts.

    Args:
        load: What is asked.
        told: Ends a load that is to go on until it is told.
    """
    requests = [_request(load, image) for image in load.images]
    start = time.perf_counter()
    times = start + load.warm, start + load.warm + load.seconds
    tally = Tally([], {}, 0, {})
    await asyncio.gather(*(_client(load, requests, first, times, told, tally) for first in range(load.connections)))
    took = time.perf_counter() - times[0]
    ordered = sorted(tally.seconds) or [0.0]
    return {
        "n_answers": len(tally.seconds),
        "per_second": len(tally.seconds) / took,
        "p50_ms": 1000 * ordered[len(ordered) // 2],
        "p99_ms": 1000 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "failed": tally.failed,
        "mixed": tally.mixed,
        "sets": tally.sets,
    }


async def _until_closed(load: Load) -> dict[str, Any]:
    """Make a load that is told to end by the end of standard input."""
    told = asyncio.Event()
    reading = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    reading.add_done_callback(lambda _: told.set())
    found = await make_load(load, told)
    await reading
    return found


def main() -> None:
    """Read a load from the first line, make it, write its facts."""
    load = Load(**json.loads(sys.stdin.readline()))
    sys.stdout.write(json.dumps(asyncio.run(_until_closed(load))))


if __name__ == "__main__":
    main()
