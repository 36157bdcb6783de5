"""Attacks on clone files: files damaged in many ways are read, and processes are killed while they save."""

import multiprocessing
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from random import Random
from typing import Any, Never

import torch
from torch import Tensor, nn

from pnc.bench.bench import Bench, Row, Rows, one_by_one
from pnc.bench.file_damage import FORGED, MUTATIONS
from pnc.bench.result_files import Claim, at_least, at_most, table
from pnc.clones.clone import Clone
from pnc.clones.clone_file import FileKind, inspect, load, save
from pnc.composite.composite import attach
from pnc.foundation.errors import InputError, PNCError
from pnc.foundation.fingerprints import fingerprint
from pnc.foundation.tensor_bits import same_bits
from pnc.method.pipeline import fit
from pnc.method.positions import scan
from pnc.method.task import prepare_task

try:
    import resource
except ImportError:  # Windows, where the bench cannot limit a process's memory
    resource = None  # type: ignore[assignment]

KEYS = ("part", "chunk")
SECONDS, MEMORY = 1.0, 1 << 28
"""Limits for reading one file: CPU time, which other work on the machine does not change, and additional memory."""

FILES_PER_CHUNK, KILLS_PER_CHUNK = 2000, 100
OUTCOMES = ("refused", "accepted", "other_weights", "crashes", "hangs", "over_memory")
SHAPE = (1, 8, 8)
FINGERPRINT_BYTES = 10**9
KILLED_WIDTH = 192
"""Width of the networks whose clone is saved when processes are killed: its full file takes a while to write."""
_PATIENCE = 600.0
"""Seconds after which a process that sends nothing counts as hanging; starting one takes a while."""

_KINDS: tuple[FileKind, ...] = ("thin", "full")


# ----------------------------------------------------------------------------------------------------------- material
@dataclass(frozen=True, eq=False)
class Material:
    """Two tiny networks, a clone, and its files as bytes, thin and full."""

    source: nn.Module
    target: nn.Module
    clone: Clone
    files: tuple[bytes, ...]
    images: Tensor
    logits: Tensor


def material(width: int = 6, density: float = 0.5) -> Material:
    """Make the networks, a clone and its files; every call gives the same."""
    source, target = _network(1, 4, width), _network(0, 3, width)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(28, *SHAPE, generator=generator)
    names = ["a", "b", "c", "u", "v", "w", "x"]
    support = images, [names[index % 7] for index in range(28)]
    task = prepare_task(source, target, support, classes=None, source_classes=names[3:], base_classes=names[:3])
    found = scan(task, exhaustive=True)
    place = max(found.positions, key=lambda position: position.n_params)  # the file then holds most of the source
    made = fit(task, found.adapter(place), density=density, tune="none")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clone"
        files = []
        for kind in _KINDS:
            save(made, path, kind)
            files.append(path.read_bytes())
    with torch.no_grad():
        logits = attach(target, made)(images[:4])
    return Material(source, target, made, tuple(files), images[:4], logits)


def _network(seed: int, n_classes: int, width: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width + 2, 3, stride=2, padding=1),
        nn.BatchNorm2d(width + 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width + 2, n_classes),
    )
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model.eval()


def damaged(original: Material, number: int) -> tuple[str, bytes]:
    """Damage a file; `number` determines the kind, which is returned with the bytes."""
    random = Random(number)
    kind = list(MUTATIONS)[number % len(MUTATIONS)]
    return kind, MUTATIONS[kind](random.choice(original.files), random)


# ------------------------------------------------------------------------------------------------------------- judging
def judge(original: Material, path: Path, forged: bool) -> str:
    """Inspect, load and attach a damaged file, a full one with and without its source; returns one of `OUTCOMES`.

    Args:
        original: What was damaged.
        path: The damaged file.
        forged: Its digest was recomputed: if it is accepted, its weights must be the original ones, but a number or a
            name in the metadata may differ.
    """
    try:
        needs_source = inspect(path)["needs_source"]
        found = load(path, source=original.source)
        if not _same_weights(found, original.clone):
            return "other_weights"
        found = found if needs_source else load(path)
        net = attach(original.target, found)
        with torch.no_grad():
            logits = net(original.images)
    except PNCError as error:
        return "over_memory" if _lacked_memory(error) else "refused"
    except Exception as error:  # noqa: BLE001 - any other error is what the bench looks for
        return "over_memory" if _lacked_memory(error) else "crashes"
    return "accepted" if forged or same_bits(logits, original.logits) else "other_weights"


def _same_weights(a: Clone, b: Clone) -> bool:
    """Compare all tensors but BatchNorm's batch counters, which matter only in training and are not in thin files."""
    ours, theirs = a.branch.state_dict(), b.branch.state_dict()
    names = [name for name in ours if not name.endswith("num_batches_tracked")]
    return ours.keys() == theirs.keys() and all(same_bits(ours[name], theirs[name]) for name in names)


def _lacked_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def judge_many(numbers: Sequence[int], folder: Path, memory: int | None, connection: Connection) -> None:
    """Damage and read files, and send (number, kind, outcome, seconds) for each; runs in its own process."""
    torch.set_num_threads(1)
    original = material()
    path = folder / f"{numbers[0]}.safetensors"
    path.write_bytes(original.files[0])
    judge(original, path, forged=False)  # load everything that is loaded at first use
    if memory is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, resource.RLIM_INFINITY))
    for number in numbers:
        kind, data = damaged(original, number)
        path.write_bytes(data)
        connection.send((number, kind, None, 0.0))
        started = time.process_time()
        outcome = judge(original, path, kind in FORGED)
        seconds = time.process_time() - started
        connection.send((number, kind, "hangs" if seconds > SECONDS else outcome, seconds))
    connection.close()


def _chunk_of_files(numbers: Sequence[int], folder: Path, seed: int) -> dict[str, Any]:
    """Judge some files in separate processes; if one dies or hangs, its file counts, and another process continues."""
    kinds: dict[str, Counter[str]] = {kind: Counter() for kind in MUTATIONS}
    slowest = dict.fromkeys(MUTATIONS, 0.0)
    bad: list[int] = []
    left = [seed * 1_000_003 + number for number in numbers]
    while left:
        current: tuple[int, str] | None = None
        ended = "crashes"
        with _process(judge_many, left, folder, MEMORY) as (worker, receiver):
            try:
                while receiver.poll(_PATIENCE):
                    number, kind, outcome, seconds = receiver.recv()
                    current = (number, kind) if outcome is None else None
                    if outcome is not None:
                        kinds[kind][outcome] += 1
                        slowest[kind] = max(slowest[kind], seconds)
                        bad += [number] if outcome not in ("refused", "accepted") else []
                        left = left[left.index(number) + 1 :]
                ended = "hangs"
                worker.kill()
            except EOFError:  # it is finished, or dead
                pass
        if current is not None:
            kinds[current[1]][ended] += 1
            bad.append(current[0])
            left = left[left.index(current[0]) + 1 :]
        elif left:
            raise InputError(f"bench: a process that reads files ended with {worker.exitcode} before its first file")
    rows = {kind: {"files": counts.total(), **counts, "slowest": slowest[kind]} for kind, counts in kinds.items()}
    return {"kinds": rows, "bad": bad}


# ------------------------------------------------------------------------------------------------------------- killing
def kill_many(number: int, folder: Path, seed: str, connection: Connection) -> None:
    """Fork processes that save, kill them at random moments, and send what each left; runs in its own process.

    Forked processes start at once, because everything that they need is loaded already.
    """
    torch.set_num_threads(1)
    original, random = material(width=KILLED_WIDTH, density=1.0), Random(seed)
    path = folder / "clone.safetensors"
    started = time.perf_counter()
    for kind in _KINDS:
        save(original.clone, path, kind)
    seconds = time.perf_counter() - started
    for _ in range(number):
        child = os.fork()
        if child == 0:
            _save_repeatedly(original.clone, path)
        time.sleep(random.uniform(0, 3) * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        connection.send(_after_a_kill(original, path))
    connection.close()


def _save_repeatedly(made: Clone, path: Path) -> Never:
    """Save a clone as a thin and a full file in turn, until killed."""
    try:
        while True:
            for kind in _KINDS:
                save(made, path, kind)
    finally:
        os._exit(1)  # never run code of the parent process here


def _after_a_kill(original: Material, path: Path) -> dict[str, int]:
    """Count what is in the file and beside it; then save to the same path, and count what is still beside it."""
    content = path.read_bytes()
    found = {f"is_{kind}": int(content == data) for kind, data in zip(_KINDS, original.files, strict=True)}
    while_writing = len(list(path.parent.iterdir())) > 1
    save(original.clone, path)
    left = len(list(path.parent.iterdir())) - 1
    neither = int(not any(found.values()))
    return {"kills": 1, **found, "neither": neither, "while_writing": int(while_writing), "left_behind": left}


def _chunk_of_kills(number: int, folder: Path, seed: str) -> dict[str, int]:
    counts: Counter[str] = Counter()
    with _process(kill_many, number, folder, seed) as (_, receiver):
        for _ in range(number):
            if not receiver.poll(_PATIENCE):
                raise InputError("bench: a process that kills others does not respond; run the bench again")
            counts.update(receiver.recv())
    return dict(counts)


@contextmanager
def _process(work: Callable[..., None], *arguments: Any) -> Iterator[tuple[SpawnProcess, Connection]]:
    """A new process that does some work and sends its results; it is ended afterwards."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=work, args=(*arguments, sender))
    worker.start()
    sender.close()
    try:
        yield worker, receiver
        worker.join(_PATIENCE)
    finally:
        worker.kill()
        worker.join()


# -------------------------------------------------------------------------------------------------------- fingerprints
def measure_fingerprint(n_bytes: int) -> dict[str, float]:
    """Time the fingerprint of a network with `n_bytes` of weights; the best of three runs.

    Returns:
        `gigabytes`; `cpu_seconds`, summed over threads, which other work on the machine does not change; `seconds`.
    """
    network = nn.ParameterList(torch.ones(n_bytes // 80) for _ in range(20))
    times = []
    for _ in range(3):
        started = time.process_time(), time.perf_counter()
        fingerprint(network)
        times.append((time.process_time() - started[0], time.perf_counter() - started[1]))
    return {
        "gigabytes": n_bytes / 1e9,
        "cpu_seconds": min(cpu for cpu, _ in times),
        "seconds": min(seconds for _, seconds in times),
    }


# ---------------------------------------------------------------------------------------------------------- the bench
def bench(n_files: int, n_kills: int, seed: int) -> Bench:
    """Damage and read `n_files` files, kill `n_kills` processes while they save, and time a fingerprint.

    Args:
        n_files: Number of damaged files, equally many of each kind.
        n_kills: Number of processes killed, each at a random moment.
        seed: Of both.
    Raises:
        InputError: this system cannot limit the memory of a process.
    """
    if resource is None or not Path("/proc/self/statm").exists():
        raise InputError("bench: files are read under a memory limit, which needs Linux")
    settings = {"files": n_files, "kills": n_kills, "seed": seed}
    wanted = [
        *(("files", start) for start in range(0, n_files, FILES_PER_CHUNK)),
        *(("kills", start) for start in range(0, n_kills, KILLS_PER_CHUNK)),
        ("fingerprint", 0),
    ]

    def make(cell: Row) -> Row:
        start = cell["chunk"]
        if cell["part"] == "fingerprint":
            return measure_fingerprint(FINGERPRINT_BYTES)
        with tempfile.TemporaryDirectory() as folder:
            if cell["part"] == "files":
                return _chunk_of_files(range(start, min(start + FILES_PER_CHUNK, n_files)), Path(folder), seed)
            return _chunk_of_kills(min(KILLS_PER_CHUNK, n_kills - start), Path(folder), f"{seed} {start}")

    def facts(rows: Rows) -> Row:
        bad = [number for row in rows for number in row.get("bad", [])]
        return {**settings, "rows": summary(rows), "bad": bad}

    measure = one_by_one([dict(zip(KEYS, cell, strict=True)) for cell in wanted], make)
    return Bench("files", KEYS, settings, measure, claims, markdown, facts)


def summary(rows: Rows) -> list[dict[str, Any]]:
    """One row for each kind of damage, with counts of `OUTCOMES`, one for the kills, and one for the fingerprint."""
    found = []
    for kind in MUTATIONS:
        parts = [row["kinds"][kind] for row in rows if row["part"] == "files"]
        counts = {key: sum(part.get(key, 0) for part in parts) for key in ("files", *OUTCOMES)}
        found.append({"damage": kind, **counts, "slowest": max((part["slowest"] for part in parts), default=0.0)})
    kills: Counter[str] = Counter()
    for row in rows:
        if row["part"] == "kills":
            kills.update({key: value for key, value in row.items() if key not in KEYS})
    timed = [{k: v for k, v in row.items() if k not in KEYS} for row in rows if row["part"] == "fingerprint"]
    return [*found, {"damage": "kill -9 while saving", **kills}, {"damage": "none: fingerprint", **timed[0]}]


def claims(rows: Rows) -> list[Claim]:
    """Required figures, with what was counted."""
    *kinds, kills, timed = summary(rows)
    total = {key: sum(row[key] for row in kinds) for key in ("files", *OUTCOMES)}
    return [
        at_least("damaged files that were read", 20_000, total["files"]),
        at_most("errors other than PNCError, and processes that died", 0, total["crashes"]),
        at_most(f"files that took more than {SECONDS:g} s, or forever", 0, total["hangs"]),
        at_most("slowest file, seconds", SECONDS, max(row["slowest"] for row in kinds)),
        at_most(f"files for which more than {MEMORY >> 20} MiB were requested", 0, total["over_memory"]),
        at_most("files that were accepted with other weights", 0, total["other_weights"]),
        at_least("kills while saving", 200, kills.get("kills", 0)),
        at_least("of these, kills while the temporary file was there", 20, kills.get("while_writing", 0)),
        at_most("files that were neither the old nor the new one", 0, kills.get("neither", 0)),
        at_most("temporary files that the next save left", 0, kills.get("left_behind", 0)),
        at_most("fingerprint, CPU seconds for each GB of weights", 1.0, timed["cpu_seconds"] / timed["gigabytes"]),
    ]


def markdown(rows: Rows) -> str:
    """A table of the kinds of damage, and sentences about kills and fingerprint."""
    *kinds, kills, timed = summary(rows)
    header = ("damage", "files", *(name.replace("_", " ") for name in OUTCOMES), "slowest, s")
    body = [[row["damage"], row["files"], *(row[name] for name in OUTCOMES), row["slowest"]] for row in kinds]
    return "\n".join(
        [
            "Files of one clone of tiny networks at density 0.5, thin and full, were damaged, inspected, loaded and "
            "attached. refused: one PNCError. accepted: the change does not matter; the clone gives the same bits "
            "(forged: its digest was recomputed, so that a name or a number may differ, but not its weights). over "
            f"memory: more than {MEMORY >> 20} MiB in addition to what the process had before. Seconds are CPU time to "
            "inspect, load and attach; a process that sends nothing for ten minutes also counts as hanging.",
            "",
            table(header, body),
            "",
            f"Of {kills.get('kills', 0)} processes killed at random moments while they saved a thin and a full file in "
            f"turn, {kills.get('while_writing', 0)} left a temporary file, which the next save removed. The file was "
            f"the thin one {kills.get('is_thin', 0)} times, the full one {kills.get('is_full', 0)} times.",
            "",
            f"Fingerprint of a network of {timed['gigabytes']:g} GB: {timed['cpu_seconds']:.2f} s of CPU time over all "
            f"threads, {timed['seconds']:.2f} s of wall-clock time on a machine with other work.",
        ]
    )
