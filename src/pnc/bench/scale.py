"""Time and memory of cloning as supports and networks grow, and in several processes.

Weights and images are random: neither time nor memory depends on their content. Each cell is measured in a process of
its own.
"""

import math
import os
import resource
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.utils.data import Dataset

from pnc.bench.bench import Bench, Row, Rows, one_by_one
from pnc.bench.clock_and_memory import finish, peak_memory
from pnc.bench.result_files import Claim, at_most, commit, table
from pnc.clones.clone_file import save
from pnc.composite.composite import attach
from pnc.data.image_store import GIB
from pnc.foundation.fingerprints import fingerprint
from pnc.foundation.process_team import ALONE, Team, joined
from pnc.method.pipeline import clone, fit
from pnc.method.positions import scan
from pnc.method.task import Precision, prepare_task
from pnc.models.reference_networks import resnet

SAMPLES = (64, 256, 1024)
CUTS = (2, 8, 32)
KEYS = ("cell", "n")
LARGE, LARGE_HALF = "clone, ResNet-50", "clone, ResNet-50, bfloat16"
N_CLASSES = 10
"""Number of base classes, and of new ones; networks for 32x32 know as many, ResNet-50 as a source knows 1000."""
GROWTH = {"scan, samples": "n", "scan, cuts": "cuts"}
"""Cells that are measured at several sizes, and the column of the size."""
COLUMNS = ("cell", "n", "seconds", "cpu_seconds", "peak_gib", "positions", "cuts", "macs_share")


class Noise(Dataset[tuple[Tensor, int]]):
    """Random images made on demand, like a reader of files."""

    def __init__(self, n_images: int, size: int) -> None:
        self._n_images, self._size = n_images, size

    def __len__(self) -> int:
        return self._n_images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, self._size, self._size), generator=generator, dtype=torch.uint8)
        return image, index % (2 * N_CLASSES)


class Bottleneck(nn.Module):
    """Three convolutions with a shortcut (He et al., CVPR 2016), the stride in the second as in torchvision."""

    def __init__(self, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_layer(n_in, width, 1, 1), nn.ReLU(), *_layer(width, width, 3, stride), nn.ReLU(),
            *_layer(width, 4 * width, 1, 1),
        )  # fmt: skip
        shortcut = stride > 1 or n_in != 4 * width
        self.shortcut = nn.Sequential(*_layer(n_in, 4 * width, 1, stride)) if shortcut else nn.Identity()
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, n_in, H, W) to (B, 4 * width, H / stride, W / stride)."""
        made: Tensor = self.activation(self.body(x) + self.shortcut(x))
        return made


def resnet50(n_classes: int) -> nn.Module:
    """ResNet-50 for images of 224x224, with random weights."""
    layers: list[nn.Module] = [*_layer(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    n_channels = 64
    for width, n_blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(n_blocks):
            layers.append(Bottleneck(n_channels, width, 2 if block == 0 and width > 64 else 1))
            n_channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_channels, n_classes)).eval()


def _layer(n_in: int, n_out: int, kernel: int, stride: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(n_out)


# ----------------------------------------------------------------------------------------------------------- the cells


def cells(n_stream: int, n_large: int, n_scan: int, device: str = "cpu") -> list[dict[str, Any]]:
    """Names of the cells, with numbers of samples, cuts or processes.

    ResNet-50 is left out if `n_large` is 0; each process needs its own GPU.
    """
    most_processes = torch.cuda.device_count() if torch.device(device).type == "cuda" else 2
    return [
        *({"cell": "scan, samples", "n": n} for n in SAMPLES),
        *({"cell": "scan, cuts", "n": n} for n in CUTS),
        *({"cell": "clone, processes", "n": n} for n in (1, 2) if n <= most_processes),
        {"cell": "scan, 32x32", "n": n_scan},
        {"cell": "clone, streaming", "n": n_stream},
        *({"cell": cell, "n": n_large} for cell in (LARGE, LARGE_HALF) if n_large),
    ]


def bench(wanted: Rows, threads: int, device: str = "cpu", picture: str | None = None) -> Bench:
    """Measure cells one after the other, each in a process of its own.

    Args:
        wanted: From `cells`.
        threads: For torch, in each process; cells of several processes use one each.
        device: Where networks are.
        picture: Name of the picture that the Markdown shows.
    """

    def make(cell: Row) -> Row:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "row.pt"
            processes = cell["n"] if cell["cell"] == "clone, processes" else 1
            spawn(_measure, (dict(cell), processes, threads, device, _free_port(), str(out)), processes)
            return {**torch.load(out), "commit": commit()}

    settings, text = {"threads": threads, "device": device}, partial(markdown, threads=threads, picture=picture)
    own_device, facts = torch.device(device), lambda rows: {"rows": rows}
    return Bench("scale", KEYS, settings, one_by_one(wanted, make), claims, text, facts, own_device)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _measure(
    rank: int, cell: Mapping[str, Any], processes: int, threads: int, device: str, port: int, out: str
) -> None:
    """Measure one cell in this process."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(processes))
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1 if cell["cell"] == "clone, processes" else threads)
    torch.manual_seed(0)
    with joined(device) as (team, own_device):
        row = _CELLS[cell["cell"]](cell["n"], team, own_device)
        if team.is_main:
            torch.save(row, out)


def _timed(work: Any, device: torch.device) -> dict[str, Any]:
    """The result of `work`, with wall-clock time, CPU time and peak growth of memory of this process."""
    started, used = time.perf_counter(), time.process_time()
    made, peak = peak_memory(work, device)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"made": made, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gib": (peak or most) / GIB}


def _pair(device: torch.device, n_blocks: int, width: float = 1.0) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    source, target = (resnet((3, 32, 32), N_CLASSES, n_blocks, width).eval().to(device) for _ in range(2))
    return source, target, _names(N_CLASSES)


def _names(n_source: int) -> dict[str, Any]:
    new = [f"new {number}" for number in range(n_source)]
    return {
        "classes": new[:N_CLASSES],
        "source_classes": new,
        "base_classes": [f"base {n}" for n in range(N_CLASSES)],
    }


def _scan(source: nn.Module, target: nn.Module, names: Mapping[str, Any], data: Any, max_cuts: int) -> dict[str, Any]:
    def work() -> Any:
        task = prepare_task(source, target, data, **names)
        try:
            return scan(task, max_cuts=max_cuts)
        finally:
            task.close()

    row = _timed(work, _device_of(target))
    found = row.pop("made")
    n_cuts = len({names[1] for names in found.adapter_errors})
    return {**row, "positions": len(found.positions), "cuts": n_cuts, "macs_share": None}


def _device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _scan_samples(n: int, team: Team, device: torch.device) -> dict[str, Any]:
    return _scan(*_pair(device, 3), Noise(n, 32), 12)


def _scan_cuts(n: int, team: Team, device: torch.device) -> dict[str, Any]:
    return _scan(*_pair(device, 11, 0.5), Noise(48, 32), n)


def _clone(source: nn.Module, target: nn.Module, names: Mapping[str, Any], data: Any, team: Team) -> dict[str, Any]:
    row = _timed(lambda: clone(source, target, data, team=team, effort="seconds", **names), _device_of(target))
    made = row.pop("made")
    return {**row, "positions": None, "cuts": None, "macs_share": made.recipe["macs_share"]}


def _clone_streaming(n: int, team: Team, device: torch.device) -> dict[str, Any]:
    return _clone(*_pair(device, 3), Noise(n, 32), ALONE)


def _clone_processes(n: int, team: Team, device: torch.device) -> dict[str, Any]:
    return _clone(*_pair(device, 3), Noise(512, 32), team)


def _clone_resnet50(n: int, team: Team, device: torch.device, precision: Precision = "float32") -> dict[str, Any]:
    source, target, names = resnet50(1000).to(device), resnet50(N_CLASSES).to(device), _names(1000)
    task = prepare_task(source, target, Noise(n, 224), precision=precision, **names)
    scanned = _timed(lambda: scan(task), device)
    found = scanned.pop("made")
    fitted = _timed(lambda: fit(task, found.adapter(found.choose())), device)
    made = fitted.pop("made")
    task.close()
    net = attach(target, made)
    laps = [
        (_shortest(lambda: net.detach(made.name), device, 1), _shortest(lambda: net.attach(made), device, 1))
        for _ in range(5)
    ]
    detach_seconds, attach_again_seconds = map(min, zip(*laps, strict=True))
    times = {
        "fingerprint_seconds": _shortest(lambda: fingerprint(target), device),
        "detach_seconds": detach_seconds,
        "attach_again_seconds": attach_again_seconds,
        "attach_seconds": _shortest(lambda: attach(target, made), device),
    }
    with tempfile.TemporaryDirectory() as folder:
        times["file_bytes"] = save(made, Path(folder) / "clone.safetensors")
    return {
        "seconds": scanned["seconds"] + fitted["seconds"],
        "cpu_seconds": scanned["cpu_seconds"] + fitted["cpu_seconds"],
        "peak_gib": max(scanned["peak_gib"], fitted["peak_gib"]),
        "scan_peak_gib": scanned["peak_gib"],
        "scan_seconds": scanned["seconds"],
        **times,
        "positions": len(found.positions),
        "cuts": len({names[1] for names in found.adapter_errors}),
        "macs_share": made.recipe["macs_share"],
    }


def _shortest(work: Callable[[], object], device: torch.device, n: int = 3) -> float:
    """Seconds of the shortest of some runs; other work on the machine only adds time."""
    laps = []
    for _ in range(n):
        started = time.perf_counter()
        work()
        finish(device)
        laps.append(time.perf_counter() - started)
    return min(laps)


_CELLS: Mapping[str, Callable[[int, Team, torch.device], dict[str, Any]]] = {
    "scan, samples": _scan_samples,
    "scan, cuts": _scan_cuts,
    "scan, 32x32": _scan_samples,
    "clone, streaming": _clone_streaming,
    "clone, processes": _clone_processes,
    LARGE: _clone_resnet50,
    LARGE_HALF: partial(_clone_resnet50, precision="bfloat16"),
}


# ------------------------------------------------------------------------------------------------------------ results


def points(rows: Rows, cell: str) -> list[tuple[float, float]]:
    """Sizes of the job and CPU seconds, for the rows of a cell of `GROWTH`."""
    return [(row[GROWTH[cell]], row["cpu_seconds"]) for row in rows if row["cell"] == cell]


def exponent(rows: Rows, cell: str) -> float:
    """Least-squares slope of the logarithms of `points`."""
    logs = [(math.log(size), math.log(seconds)) for size, seconds in points(rows, cell)]
    mean = [sum(values) / len(logs) for values in zip(*logs, strict=True)]
    slope: float = sum((x - mean[0]) * (y - mean[1]) for x, y in logs) / sum((x - mean[0]) ** 2 for x, _ in logs)
    return slope


def claims(rows: Rows) -> list[Claim]:
    """Required figures, with what was measured."""
    at = {row["cell"]: row for row in rows}
    stream, many = at["clone, streaming"], at["scan, 32x32"]
    found = [
        at_most("scan time over samples, fitted exponent", 1.1, exponent(rows, "scan, samples")),
        at_most("scan time over cuts, fitted exponent", 2, exponent(rows, "scan, cuts")),
        at_most(f"scan of {many['n']} samples of 32x32, GiB", 2, many["peak_gib"]),
        at_most(f"clone of {stream['n']} samples of 32x32 by streaming, GiB", 1.5, stream["peak_gib"]),
    ]
    large = at.get(LARGE)
    if large is None:
        return found
    return [
        *found,
        at_most(f"scan of {large['n']} samples of 224x224, ResNet-50 pair, GiB", 6, large["scan_peak_gib"]),
        at_most(f"clone, ResNet-50 pair, {large['n']} samples of 224x224, seconds", 600, large["seconds"]),
        at_most(f"clone, ResNet-50 pair, {large['n']} samples of 224x224, GiB", 8, large["peak_gib"]),
        at_most("attach to a composite around ResNet-50, seconds", 0.05, large["attach_again_seconds"]),
        at_most("detach from ResNet-50, seconds", 0.05, large["detach_seconds"]),
        at_most("fingerprint of ResNet-50, seconds", 0.3, large["fingerprint_seconds"]),
    ]


def markdown(rows: Rows, threads: int, picture: str | None) -> str:
    """The rows as a table, with explanations."""
    shown = [["" if row[key] is None else row[key] for key in COLUMNS] for row in rows]
    large = next((row for row in rows if row["cell"] == LARGE), None)
    last = "The ResNet-50 pair was not measured."
    if large is not None:
        last = (
            f"ResNet-50: attach {large['attach_seconds']:.3f} s, detach {large['detach_seconds']:.4f} s, fingerprint "
            f"{large['fingerprint_seconds']:.3f} s, thin file {large['file_bytes']:,} bytes."
        )
    drawn = [f"![scan time]({picture})", ""] if picture else []
    return "\n".join(
        [
            "Random weights and images; ResNet-20 pairs on 32x32 with 10 base and 10 new classes; for cuts, ResNet-68 "
            f"of half width and 48 images; {threads} threads, for `clone, processes` one each.",
            "",
            table(COLUMNS, shown),
            "",
            *drawn,
            "`n`: samples, requested cuts, or processes. `seconds`: wall-clock time, which depends on other work on "
            "the machine; `cpu_seconds`: of all threads of the (first) process. `peak_gib`: peak memory in addition to "
            "that of the process with its networks loaded; on a GPU, of the GPU.",
            "",
            last,
        ]
    )
