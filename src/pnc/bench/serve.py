"""A server of clones under load: throughput beside rivals, answers compared, clones that come and go, bad uploads."""

import base64
import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from pnc.bench.bench import Bench, Rows
from pnc.bench.load_generator import Load, finish_load, start_load
from pnc.bench.result_files import Cells
from pnc.bench.serve_report import (
    ALONE,
    CHUNK_CYCLES,
    CHURN_CONNECTIONS,
    CLONES,
    N_CLONES,
    WHOLE,
    Wanted,
    claims,
    markdown,
)
from pnc.bench.serving_processes import TOKEN, Process, serve_words, served, whole_words
from pnc.bench.setting import Setting
from pnc.bench.upload_attacks import images_as_files, upload
from pnc.clones.clone import Clone
from pnc.clones.clone_file import save
from pnc.composite.composite import Composite, attach
from pnc.data.image_files import decode, required
from pnc.data.image_set import images_as_float
from pnc.method.pipeline import clone
from pnc.method.task import Progress
from pnc.serving.client import Client

KEYS = ("part", "case", "round")
N_IMAGES, CHUNK_UPLOADS = 64, 1000
SAME_BATCHES = (1, 4, 16, 32)
_BATCHES, _IMAGES, _MEMORY = "pnc_batch_images_count", "pnc_batch_images_sum", "process_resident_memory_bytes"
_CPU = "process_cpu_seconds_total"


def bench(setting: Setting, wanted: Wanted) -> Bench:
    """Measure servers of a pair of networks, both given as files.

    Args:
        setting: Networks and images.
        wanted: How much.
    """
    how = {key: value for key, value in asdict(wanted).items() if key not in ("rounds", "cycles", "uploads")}
    settings = {**setting.facts, **how}

    def measure(cells: Cells, progress: Progress | None) -> Rows:
        with TemporaryDirectory() as folder:
            stage = _Stage(setting, wanted, Path(folder))
            for part in (_throughput, _same, _churn, _uploads):
                part(stage, cells, progress)
        return cells.rows

    return Bench("serve", KEYS, settings, measure, claims, lambda rows: markdown(rows, setting, wanted))


class _Stage:
    """Clones, their files and images, made when they are first needed."""

    def __init__(self, setting: Setting, wanted: Wanted, folder: Path) -> None:
        self.setting, self.wanted, self._folder = setting, wanted, folder
        self.target, self.source = str(setting.given["target"]), str(setting.given["source"])

    @cached_property
    def clones(self) -> list[Clone]:
        """Clones of one class each, in closed form."""
        setting, found = self.setting, []
        for name in setting.new_classes[:N_CLONES]:
            support, arguments = setting.draw([name], 0), setting.arguments([name], 0)
            source, target = setting.source.module, setting.target.module
            found.append(clone(source, target, support, **arguments, effort="seconds", max_macs=self.wanted.max_macs))
        return found

    @cached_property
    def files(self) -> list[Path]:
        """Their files."""
        found = [self._folder / f"{number}.safetensors" for number in range(len(self.clones))]
        for path, one in zip(found, self.clones, strict=True):
            save(one, path)
        return found

    @cached_property
    def images(self) -> list[bytes]:
        """Test images as PNG files."""
        pillow, found = required("PIL.Image", "serve"), []
        for one in self.pixels[:N_IMAGES]:
            buffer = io.BytesIO()
            pillow.fromarray(one).save(buffer, "PNG")
            found.append(buffer.getvalue())
        return found

    @cached_property
    def pixels(self) -> list[Any]:
        """Test images as arrays, uint8."""
        images = self.setting.test.images[:: max(1, len(self.setting.test.images) // N_IMAGES)]
        grey = images.shape[1] == 1
        whole = images if images.dtype == torch.uint8 else (images * 255).round().byte()
        return [(one[0] if grey else one.permute(1, 2, 0)).numpy() for one in whole]

    def composite(self, *places: int) -> Composite:
        """The target with some of the clones."""
        return attach(self.setting.target.module, *(self.clones[place] for place in places))

    def words(self, *places: int) -> list[str]:
        """The command that serves the target with some of the clones."""
        return serve_words(self.target, self.source, [self.files[place] for place in places])

    def tensors(self) -> Tensor:
        """The images as the server decodes them."""
        channels, height, width = self.setting.target.input_shape
        return images_as_float(decode(self.images, ["image"] * len(self.images), channels, (width, height)))

    def load(self, port: int, **more: Any) -> Load:
        """A load of all images."""
        return Load(port, images=[base64.b64encode(one).decode() for one in self.images], **more)


# ---------------------------------------------------------------------------------------------------------- throughput
def _throughput(stage: _Stage, cells: Cells, progress: Progress | None) -> None:
    wanted = stage.wanted
    missing = [
        number for number in range(wanted.rounds) if {"part": "throughput", "case": WHOLE, "round": number} not in cells
    ]
    if not missing:
        return
    commands = {
        ALONE: stage.words(),
        CLONES: stage.words(*range(len(stage.clones))),
        WHOLE: whole_words(stage.target, stage.source, len(stage.clones)),
    }
    with ExitStack() as stack:
        servers = {
            case: stack.enter_context(served(words, wanted.wait_ms, wanted.batch)) for case, words in commands.items()
        }
        for number in missing:
            for case, server in servers.items():
                _report(progress, f"throughput, {case}", number, wanted.rounds)
                before = [server.meter(name) for name in (_IMAGES, _BATCHES, _CPU)]
                load = stage.load(
                    server.port, connections=wanted.connections, seconds=wanted.seconds, warm=wanted.seconds / 4
                )
                facts = finish_load(start_load(load))
                images, batches, cpu = (
                    server.meter(name) - value for name, value in zip((_IMAGES, _BATCHES, _CPU), before, strict=True)
                )
                facts |= {"mean_batch": images / max(batches, 1), "cpu_ms": 1000 * cpu / max(images, 1)}
                facts["failed"] = sum(facts["failed"].values())
                row = {key: value for key, value in facts.items() if key not in ("sets", "mixed")}
                cells.add({"part": "throughput", "case": case, "round": number, **row})


def _same(stage: _Stage, cells: Cells, progress: Progress | None) -> None:
    """Compare answers with those of the fused form, image by image, at the same batch."""
    wanted = [{"part": "same", "case": f"batch {batch}", "round": 0} for batch in SAME_BATCHES]
    if all(cell in cells for cell in wanted):
        return
    net, images = stage.composite(*range(len(stage.clones))), stage.tensors()
    fused = net.fused()
    with served(stage.words(*range(len(stage.clones)))) as server:
        for cell, batch in zip(wanted, SAME_BATCHES, strict=True):
            _report(progress, "answers compared", SAME_BATCHES.index(batch), len(SAME_BATCHES))
            different, largest, n_images = 0, 0.0, 0
            for start in range(0, len(images) - batch + 1, batch):
                with torch.inference_mode():
                    expected = fused(images[start : start + batch]).softmax(1)
                for row, found in zip(expected, _asked(server, stage.images[start : start + batch]), strict=True):
                    values = torch.tensor([found[name] for name in net.classes])
                    different += not torch.equal(values, row)
                    largest, n_images = max(largest, float((values - row).abs().max())), n_images + 1
            cells.add({**cell, "n_images": n_images, "different": different, "largest_difference": largest})


def _asked(server: Process, images: Sequence[bytes]) -> list[Mapping[str, float]]:
    """Probabilities that a server gives, for images that it computes together."""
    httpx = required("httpx", "serve")
    files = [("images", one) for one in images]
    facts = httpx.post(f"{server.url}/predict?top=1000", files=files, timeout=60).json()
    assert facts["batch"] == len(images)
    return [{one["class"]: one["probability"] for one in answer["classes"]} for answer in facts["predictions"]]


# --------------------------------------------------------------------------------------------------------------- churn
def _churn(stage: _Stage, cells: Cells, progress: Progress | None) -> None:
    """Attach and detach the second clone over and over, while clients ask the server of the first."""
    total = stage.wanted.cycles // CHUNK_CYCLES
    chunks: list[dict[str, Any]] = [{"part": "churn", "case": "cycles", "round": number} for number in range(total)]
    missing = [cell for cell in chunks if cell not in cells]
    if not missing:
        return
    known, name = _expected(stage), stage.clones[1].name
    process = 1 + max((cells[cell]["process"] for cell in chunks if cell in cells), default=-1)
    with (
        served(stage.words(0), stage.wanted.wait_ms, stage.wanted.batch) as server,
        Client(server.url, TOKEN, patience=60) as client,
    ):
        _cycles(client, name, stage.files[1], 10)
        for cell in missing:
            _report(progress, "clones come and go", cell["round"], total)
            load = stage.load(server.port, connections=CHURN_CONNECTIONS, until_told=True, expected=known, top=1000)
            running = start_load(load)
            _cycles(client, name, stage.files[1], CHUNK_CYCLES)
            facts = finish_load(running)
            row = {
                "process": process,
                "cycles": CHUNK_CYCLES,
                "n_answers": facts["n_answers"],
                "failed": sum(facts["failed"].values()),
                "mixed": facts["mixed"],
                "sets": facts["sets"],
                "p99_ms": facts["p99_ms"],
                "memory": server.meter(_MEMORY),
            }
            cells.add({**cell, **row})


def _cycles(client: Client, name: str, file: Path, number: int) -> None:
    for _ in range(number):
        client.attach(name, file)
        client.detach(name)


def _expected(stage: _Stage) -> dict[str, list[dict[str, float]]]:
    """Probabilities of every image, with the first clone and with the first two."""
    found = {}
    for places in ((0,), (0, 1)):
        net = stage.composite(*places)
        with torch.inference_mode():
            rows = net.fused()(stage.tensors()).softmax(1).tolist()
        found[", ".join(net.clones)] = [dict(zip(net.classes, row, strict=True)) for row in rows]
    return found


# ------------------------------------------------------------------------------------------------------------- uploads
def _uploads(stage: _Stage, cells: Cells, progress: Progress | None) -> None:
    total = -(-stage.wanted.uploads // CHUNK_UPLOADS)
    chunks: list[dict[str, Any]] = [{"part": "uploads", "case": "mutated", "round": number} for number in range(total)]
    missing = [cell for cell in chunks if cell not in cells]
    if not missing:
        return
    images, clones = images_as_files(stage.pixels[:4]), [path.read_bytes() for path in stage.files[1:3]]
    with served(stage.words(0)) as server:
        for cell in missing:
            _report(progress, "mutated uploads", cell["round"], total)
            first = cell["round"] * CHUNK_UPLOADS
            numbers = range(first, min(first + CHUNK_UPLOADS, stage.wanted.uploads))
            cells.add({**cell, "n": len(numbers), **upload(server.url, TOKEN, numbers, images, clones)})


def _report(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)
