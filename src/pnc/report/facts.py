"""The contents of a report as plain values: measured on labelled images and read from the clones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pnc.clones.clone import Clone
from pnc.composite.batched_logits import logits_of
from pnc.composite.composite import Composite
from pnc.composite.evaluation import Answers, EvaluationReport, answers, report_of
from pnc.composite.metrics import calibration_error, leak, shifted
from pnc.graph.nodes import info
from pnc.graph.recording import record

N_BINS = 10
"""Bins of confidence in the picture of calibration."""

SHIFTS = tuple(step / 2 for step in range(-16, 7))
"""Nats added to the new logits, for the curve of leak against accuracy."""

_N_IMAGES = 64
"""Number of images on which the composite without clones is compared with the target."""


@dataclass(frozen=True)
class CostRow:
    """One row of the costs: multiply-accumulates per image, stored values, and bytes of the file, if known."""

    what: str
    n_macs: int
    n_params: int | None
    n_bytes: int | None


@dataclass(frozen=True)
class ClonePicture:
    """One clone and its networks; lengths are multiply-accumulates per image.

    Attributes:
        name: Name of the clone.
        classes: Its classes.
        target_cut: Name of the tensor where it leaves the target.
        source_cut: Name of the tensor where it enters the source.
        target_macs: The whole target.
        target_cut_macs: The target before the cut.
        source_macs: The whole source.
        source_cut_macs: The source before the cut.
        adapter_macs: The adapter from the target's tensor to the source's.
        kept: Share of the source after the cut that the clone computes.
        channels: Layer, kept channels and all channels of that part; empty if all are kept.
        front: (added MACs as a share of the source's, accuracy, whether it was chosen), cheapest first; may be empty.
        recipe: The clone's recipe.
    """

    name: str
    classes: tuple[str, ...]
    target_cut: str
    source_cut: str
    target_macs: int
    target_cut_macs: int
    source_macs: int
    source_cut_macs: int
    adapter_macs: int
    kept: float
    channels: tuple[tuple[str, int, int], ...]
    front: tuple[tuple[float, float, bool], ...]
    recipe: Mapping[str, Any]


@dataclass(frozen=True)
class ClassRow:
    """One class: its number of images, and its accuracy before and after; `before` is None for new classes."""

    name: str
    clone: str | None
    n_images: int
    before: float | None
    after: float


@dataclass(frozen=True)
class Reliability:
    """Accuracy by confidence, in bins of equal width without the empty ones.

    Attributes:
        whose: Whose predictions these are, in words.
        points: Mean confidence and accuracy of each bin.
        error: Expected calibration error.
    """

    whose: str
    points: tuple[tuple[float, float], ...]
    error: float


@dataclass(frozen=True, eq=False)
class Facts:
    """Everything that a report shows.

    Attributes:
        answers: Logits of composite and target on the images.
        evaluation: The report of `pnc.evaluate`.
        clones: The enabled clones.
        class_rows: All classes that have images, in the order of the logits.
        trade: (accuracy on new classes, leak) for each of `SHIFTS`.
        trade_now: The same without a shift.
        reliabilities: Reliability of the target alone and of the composite.
        costs: Costs of the target, of each clone, of the composite, and of all networks side by side.
        verified: Each claim that was checked, and whether it held.
    """

    answers: Answers
    evaluation: EvaluationReport
    clones: tuple[ClonePicture, ...]
    class_rows: tuple[ClassRow, ...]
    trade: tuple[tuple[float, float], ...]
    trade_now: tuple[float, float]
    reliabilities: tuple[Reliability, ...]
    costs: tuple[CostRow, ...]
    verified: tuple[tuple[str, bool], ...]


def collect_facts(net: Composite, data: Any, files: Sequence[str | Path] = (), batch_size: int = 64) -> Facts:
    """Measure a composite and read its clones.

    Args:
        net: With at least one clone enabled.
        data: As for `pnc.evaluate`.
        files: The clones' files, in order, for their sizes; may be empty.
        batch_size: Images per batch.
    Raises:
        InputError, ClassNameError: as `pnc.evaluate`.
    """
    found = answers(net, data, batch_size)
    evaluation = report_of(found)
    clones = [net.clone(name) for name in evaluation.clones]
    target_macs = _macs_of(net)
    pictures = tuple(_picture(clone, target_macs) for clone in clones)
    base = found.labels < found.target_logits.shape[1]
    return Facts(
        answers=found,
        evaluation=evaluation,
        clones=pictures,
        class_rows=_class_rows(found),
        trade=tuple(_trade(found, shift) for shift in SHIFTS),
        trade_now=_trade(found, 0.0),
        reliabilities=(
            _reliability("target alone, base images", found.target_logits[base], found.labels[base]),
            _reliability("with clones, all images", found.logits, found.labels),
        ),
        costs=_costs(net, clones, pictures, files),
        verified=_verified(net, found, evaluation, batch_size),
    )


def _macs_of(net: Composite) -> int:
    parameter = next((p for p in net.target.parameters() if p.is_floating_point()), torch.empty(0))
    example = torch.rand(2, *net.input_shape, generator=torch.Generator().manual_seed(0))
    recording = record(net.target, example.to(parameter.device, parameter.dtype))
    return sum(info(node).n_macs for node in recording.module.graph.nodes)


def _picture(clone: Clone, target_macs: int) -> ClonePicture:
    adapter, share = clone.branch.stitched.adapter, float(clone.recipe["macs_share"])
    part_macs = clone.branch.n_macs - adapter.n_macs
    source_macs = round(clone.branch.n_macs / share) if share else clone.source_cut.n_macs
    behind = source_macs - clone.source_cut.n_macs
    kept = {} if clone.masks is None else clone.masks.kept
    return ClonePicture(
        name=clone.name,
        classes=clone.classes,
        target_cut=clone.target_cut.name,
        source_cut=clone.source_cut.name,
        target_macs=target_macs,
        target_cut_macs=clone.target_cut.n_macs,
        source_macs=source_macs,
        source_cut_macs=clone.source_cut.n_macs,
        adapter_macs=adapter.n_macs,
        kept=min(1.0, part_macs / behind) if behind > 0 else 1.0,
        channels=tuple((name, int(mask.sum()), len(mask)) for name, mask in kept.items()),
        front=_front(clone.recipe),
        recipe=clone.recipe,
    )


def _front(recipe: Mapping[str, Any]) -> tuple[tuple[float, float, bool], ...]:
    """The candidates that the clone was chosen from, if its recipe lists them."""
    listed, points = recipe.get("front"), []
    for one in listed if isinstance(listed, list | tuple) else ():
        if isinstance(one, Mapping) and isinstance(one.get("macs_share"), int | float):
            score = next((one[key] for key in ("score", "accuracy") if isinstance(one.get(key), int | float)), None)
            if score is not None:
                points.append((float(one["macs_share"]), float(score), bool(one.get("chosen"))))
    own = float(recipe["macs_share"]), float(recipe["score"])
    if points and not any(chosen for _, _, chosen in points):
        points = [point for point in points if point[:2] != own] + [(*own, True)]
    return tuple(sorted(points))


def _class_rows(found: Answers) -> tuple[ClassRow, ...]:
    n_base = found.target_logits.shape[1]
    owner = found.plan.owners
    before, after = found.target_logits.argmax(1), found.logits.argmax(1)
    rows = []
    for index, name in enumerate(found.classes):
        own = found.labels == index
        if own.any():
            right = _mean(before[own] == index) if index < n_base else None
            rows.append(ClassRow(name, owner.get(name), int(own.sum()), right, _mean(after[own] == index)))
    return tuple(rows)


def _trade(found: Answers, shift: float) -> tuple[float, float]:
    n_base = found.target_logits.shape[1]
    logits, base = shifted(found.logits, n_base, shift), found.labels < n_base
    return _mean(logits[~base].argmax(1) == found.labels[~base]), leak(logits[base], n_base)


def _reliability(whose: str, logits: Tensor, labels: Tensor) -> Reliability:
    confidence, predicted = logits.double().softmax(1).max(1)
    right = (predicted == labels).double()
    places = (confidence * N_BINS).long().clamp(max=N_BINS - 1)
    points = [
        (float(confidence[places == place].mean()), float(right[places == place].mean()))
        for place in places.unique().tolist()
    ]
    return Reliability(whose, tuple(points), calibration_error(logits, labels))


def _costs(
    net: Composite, clones: Sequence[Clone], pictures: Sequence[ClonePicture], files: Sequence[str | Path]
) -> tuple[CostRow, ...]:
    held = {one.name: one for one in net.status()}
    sizes: Sequence[int | None] = [Path(file).stat().st_size for file in files] or [None] * len(clones)
    n_params = sum(parameter.numel() for parameter in net.target.parameters())
    rows = [CostRow("target alone", pictures[0].target_macs, n_params, None)]
    for clone, n_bytes in zip(clones, sizes, strict=False):
        one = held[clone.name]
        rows.append(CostRow(f"clone {clone.name}", one.n_macs, one.n_params, n_bytes))
    total = sum(row.n_macs for row in rows), n_params + sum(held[clone.name].n_params for clone in clones)
    rows.append(CostRow("target with clones", *total, None))
    sources = {clone.source.weights: picture.source_macs for clone, picture in zip(clones, pictures, strict=True)}
    whole = pictures[0].target_macs + sum(sources.values())
    rows.append(CostRow("target and whole sources", whole, None, None))
    return tuple(rows)


def _verified(
    net: Composite, found: Answers, evaluation: EvaluationReport, batch_size: int
) -> tuple[tuple[str, bool], ...]:
    report = net.verify()
    few = found.images[:_N_IMAGES]
    with net.disabled():
        alone = torch.equal(logits_of(net, few, batch_size), found.target_logits[: len(few)])
    return (
        (
            f"Base logits equal the target's own on {evaluation.n_images:,} images, bit for bit",
            evaluation.base_logits_equal,
        ),
        (f"Without its clones the composite gives the target's logits on {len(few)} images, bit for bit", alone),
        ("The target is the one that the clones were made for, and base logits are equal on random images", report.ok),
    )


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
