"""The main job beside its rivals: one pair of networks, one support, one test set, every promise checked."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pnc.baselines import ensemble, finetuning, lda
from pnc.checkpoint import load, save
from pnc.cloning import Clone, fit
from pnc.composite import attach
from pnc.data import ImageSet, Support, images_as_float
from pnc.errors import InputError
from pnc.integrity import differences, evaluating, snapshot
from pnc.metrics import evaluate
from pnc.models import LoadedModel
from pnc.positions import Progress, scan
from pnc.task import prepare_task

RIVALS: Mapping[str, ModuleType] = {
    "direct ensemble": ensemble,
    "LDA on target features": lda,
    "fine-tuning with replay": finetuning,
}
CLONE = "clone"


@dataclass(frozen=True)
class Job:
    """What is compared.

    Attributes:
        source: Knows the new classes.
        target: Shall get them.
        support: Few samples of all its classes.
        test: Images of base and new classes, labelled by place in base + new classes.
        flip: Mirror images may be used: by the clone and by every rival.
        seed: Of every random choice.
        density: As in `pnc.clone`.
    """

    source: LoadedModel
    target: LoadedModel
    support: Support
    test: ImageSet
    flip: bool = False
    seed: int = 0
    density: float = 1.0


def run(job: Job, rivals: Sequence[str], folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run the clone and the rivals on the same samples, then save, load, attach and remove the clone.

    Args:
        job: Networks and samples.
        rivals: Names out of `RIVALS`.
        folder: Where the clone's file goes.
        progress: As in `pnc.clone`.
    Returns:
        `rows` (one for each method), `clone` (its size, place and cost) and `verified` (four promises, true or false),
        all plain values.
    """
    target, source = job.target, job.source
    before = snapshot(target.module)
    images = images_as_float(job.test.images)
    target_logits = predict(target.module, images)
    rows = [_target_row(target_logits, job.test.labels)]

    def row(method: str, logits: Tensor, seconds: float, n_bytes: int | None) -> dict[str, Any]:
        facts = dataclasses.asdict(evaluate(logits, job.test.labels, target_logits))
        return {"method": method, **facts, "seconds": seconds, "bytes": n_bytes}

    for method in rivals:
        start = time.perf_counter()
        task = _task(job)
        try:
            rival = RIVALS[method].fit(task)
        except InputError as error:
            rows.append({"method": method, "not_applicable": str(error)})
            continue
        seconds = time.perf_counter() - start
        rows.append(row(method, predict(rival, images), seconds, _n_bytes(rival)))
    start = time.perf_counter()
    clone, facts = _clone(job, progress)
    seconds = time.perf_counter() - start
    path = folder / f"{clone.name}.safetensors"
    n_bytes = save(clone, path)
    net = attach(target.module, clone)
    logits = predict(net, images)
    rows.append(row(CLONE, logits, seconds, n_bytes))
    reloaded = attach(target.module, load(path, source=source.module))
    verified = {
        "base_logits_equal": torch.equal(logits[:, : target_logits.shape[1]], target_logits),
        "reload_equal": torch.equal(predict(reloaded, images), logits),
    }
    net.detach(clone.name)
    verified["removed_equal"] = torch.equal(predict(net, images), target_logits)
    verified["target_unchanged"] = not differences(target.module, before)
    return {"rows": rows, "clone": {"file_bytes": n_bytes, **facts}, "verified": verified}


def predict(model: nn.Module, images: Tensor, batch_size: int = 250) -> Tensor:
    """Give the logits (N, K) of images (N, C, H, W), in eval mode and batches."""
    with evaluating(model):
        return torch.cat([model(batch) for batch in images.split(batch_size)])


def _task(job: Job) -> Any:
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
    task = _task(job)
    found = scan(task, progress=progress)
    position = found.choose()
    clone = fit(task, found.adapter(position), density=job.density, progress=progress)
    facts = {
        "position": {"target_cut": position.target_cut.name, "source_cut": position.source_cut.name},
        "added_macs_share": position.macs_share,
        "added_params": clone.n_params,
        "held_out_score": position.score,
        "scanned_positions": len(found.positions),
        "scanned_pairs": len(found.adapter_errors),
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


def _n_bytes(rival: nn.Module) -> int:
    """Bytes of everything that would have to be shipped to run the rival, each tensor once."""
    tensors = {tensor.data_ptr(): tensor for tensor in [*rival.parameters(), *rival.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
