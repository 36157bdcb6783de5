"""The main job compared with rivals: one pair of networks, one support, one test set, every promise checked."""

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pnc.bench.rivals import ensemble, finetuning, lda
from pnc.bench.rivals.rival import Budget, Rival
from pnc.clones.clone import Clone
from pnc.clones.clone_file import load, save
from pnc.composite.batched_logits import logits_of
from pnc.composite.composite import attach
from pnc.composite.metrics import measure_logits
from pnc.data.image_set import ImageSet
from pnc.data.support import Support
from pnc.foundation.errors import InputError
from pnc.foundation.network_state import differences, take_snapshot
from pnc.method.pipeline import clone as make_clone
from pnc.method.settings import Effort
from pnc.method.task import CloneTask, Progress, prepare_task
from pnc.models.model_specs import LoadedModel

RIVALS: Mapping[str, Rival] = {rival.name: rival for rival in (ensemble.RIVAL, lda.ON_TARGET, finetuning.WITH_REPLAY)}
BUDGET = Budget()
CLONE = "clone"


@dataclass(frozen=True)
class Job:
    """What is compared.

    Attributes:
        source: Knows the new classes.
        target: Receives them.
        support: A few samples of all classes.
        test: Images of base and new classes, labelled by index in base + new classes.
        flip: Mirror images may be used, by the clone and by every rival.
        seed: Of every random choice.
        effort: As in `pnc.clone`.
    """

    source: LoadedModel
    target: LoadedModel
    support: Support
    test: ImageSet
    flip: bool = False
    seed: int = 0
    effort: Effort = "seconds"


def run(job: Job, rivals: Sequence[str], folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run the clone and the rivals on the same samples, then save, load, attach and detach the clone.

    Args:
        job: Networks and samples.
        rivals: Names out of `RIVALS`.
        folder: Where the clone's file goes.
        progress: Called with what is being done, the steps done, and the steps in all.
    Returns:
        `rows` (one for each method), `clone` (its size, position and cost) and `verified` (four promises, true or
        false), all plain values. In a row, `seconds` is the time from two loaded networks and the support to the
        method's network, and `bytes` the size of what must be sent to someone who has both networks. The row of a rival
        that cannot use the support has the reason, `not_applicable`, instead of figures.
    """
    target, source = job.target, job.source
    before = take_snapshot(target.module)
    images = job.test.images
    target_logits = logits_of(target.module, images)
    rows = [_target_row(target_logits, job.test.labels)]

    def row(method: str, logits: Tensor, seconds: float, n_bytes: int) -> dict[str, Any]:
        facts = dataclasses.asdict(measure_logits(logits, job.test.labels, target_logits))
        return {"method": method, **facts, "seconds": seconds, "bytes": n_bytes}

    start = time.perf_counter()
    clone, facts = _clone(job, progress)
    clone_seconds = time.perf_counter() - start
    for done, method in enumerate(rivals):
        if progress is not None:
            progress(f"rival: {method}", done, len(rivals))
        start = time.perf_counter()
        task = _task(job)
        try:
            rival = RIVALS[method].fit(task, BUDGET).module
        except InputError as error:
            rows.append({"method": method, "not_applicable": str(error)})
            continue
        seconds = time.perf_counter() - start
        rows.append(row(method, logits_of(rival, images), seconds, new_bytes(rival, target.module, source.module)))
    path = folder / "clone.safetensors"
    n_bytes = save(clone, path)
    net = attach(target.module, clone)
    logits = logits_of(net, images)
    rows.append(row(CLONE, logits, clone_seconds, n_bytes))
    reloaded = attach(target.module, load(path, source=source.module))
    verified = {
        "base_logits_equal": torch.equal(logits[:, : target_logits.shape[1]], target_logits),
        "reload_equal": torch.equal(logits_of(reloaded, images), logits),
    }
    net.detach(clone.name)
    verified["removed_equal"] = torch.equal(logits_of(net, images), target_logits)
    verified["target_unchanged"] = not differences(target.module, before)
    return {"rows": rows, "clone": {"file_bytes": n_bytes, **facts}, "verified": verified}


def _task(job: Job) -> CloneTask:
    return prepare_task(
        job.source.module,
        job.target.module,
        job.support,
        classes=job.test.classes[len(job.target.classes) :],
        source_classes=job.source.classes,
        base_classes=job.target.classes,
        flip=job.flip,
        seed=job.seed,
    )


def _clone(job: Job, progress: Progress | None) -> tuple[Clone, dict[str, Any]]:
    clone = make_clone(
        job.source.module,
        job.target.module,
        job.support,
        classes=job.test.classes[len(job.target.classes) :],
        source_classes=job.source.classes,
        base_classes=job.target.classes,
        effort=job.effort,
        flip=job.flip,
        seed=job.seed,
        progress=progress,
    )
    facts = {
        "position": {"target_cut": clone.target_cut.name, "source_cut": clone.source_cut.name},
        "added_macs_share": clone.recipe["macs_share"],
        "added_params": clone.n_params,
        "held_out_score": clone.recipe["score"],
        "density": clone.recipe["density"],
        "tuned": clone.recipe.get("tune"),
    }
    return clone, facts


def _target_row(target_logits: Tensor, labels: Tensor) -> dict[str, Any]:
    base = labels < target_logits.shape[1]
    accuracy = float((target_logits[base].argmax(1) == labels[base]).double().mean())
    return {
        "method": "target alone",
        "base_accuracy": accuracy,
        "new_accuracy": 0.0,
        "average_accuracy": accuracy / 2,
        "conditional_kl": 0.0,
        "leak": 0.0,
        "locality_kl": 0.0,
        "base_drop": 0.0,
        "seconds": 0.0,
        "bytes": 0,
    }


def new_bytes(rival: nn.Module, *known: nn.Module) -> int:
    """Bytes of the tensors of `rival`, equal ones counted once, except those found bit for bit in `known` networks."""
    there = {_identity(tensor) for network in known for tensor in [*network.parameters(), *network.buffers()]}
    tensors = {_identity(tensor): tensor for tensor in [*rival.parameters(), *rival.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for name, tensor in tensors.items() if name not in there)


def _identity(tensor: Tensor) -> tuple[torch.Size, bytes]:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tensor.shape, hashlib.sha256(raw).digest()
