"""Clones that were made apart beside one clone made of all their classes at once, before and after calibration."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pnc.bench.result_files import Cells, Claim, at_least, at_most, over_seeds, table
from pnc.clones.branch import Scalars, against_rivals
from pnc.clones.clone import Clone
from pnc.clones.clone_file import load, save
from pnc.composite.composite import Composite, attach
from pnc.composite.metrics import evaluate
from pnc.data.image_set import ImageSet, class_subset, images_as_float, relabel
from pnc.data.support import Support, draw_support
from pnc.foundation.errors import InputError
from pnc.foundation.fingerprints import fingerprint
from pnc.foundation.tensor_bits import value_digests
from pnc.method.calibration import calibrate, collect_log_odds
from pnc.method.pipeline import clone
from pnc.method.task import Progress
from pnc.models.model_specs import LoadedModel

ARRANGEMENTS = ("one", "two", "four")
"""How many clones the new classes are shared out to."""

KEYS = ("seed", "clones")
COLUMNS = ("base_accuracy", "new_accuracy", "average_accuracy", "leak", "conditional_kl")
ALLOWED = 0.02
"""Average accuracy that clones made apart may lose against one made of all classes."""


@dataclass(frozen=True)
class LifecycleSetting:
    """What all arrangements share.

    Attributes:
        sources: Two networks that know the same new classes.
        target: Shall get them.
        train: Images that supports are drawn from.
        test: Images to measure on.
        n_new: Support images per new class.
        n_base: Per base class.
        flip: As in `clone`.
        folder: Where clones are kept as files, so that they are not made twice; None keeps none.
    """

    sources: tuple[LoadedModel, LoadedModel]
    target: LoadedModel
    train: ImageSet
    test: ImageSet
    n_new: int
    n_base: int
    flip: bool
    folder: Path | None

    @property
    def new_classes(self) -> tuple[str, ...]:
        """Classes of the first source that the target lacks."""
        return tuple(name for name in self.sources[0].classes if name not in self.target.classes)


CloneShare = tuple[int, tuple[str, ...]]
"""One clone: which source, which classes."""


def parts(new_classes: Sequence[str], arrangement: str) -> list[CloneShare]:
    """Share the new classes out: the first half to the first source, and one class of each half to a clone of its own.

    Raises:
        InputError: there are fewer than four classes.
    """
    new = tuple(new_classes)
    if len(new) < 4:
        raise InputError(f"source: four clones need four new classes at least; got {len(new)}: {', '.join(new)}")
    half = (len(new) + 1) // 2
    if arrangement == "one":
        return [(0, new)]
    if arrangement == "two":
        return [(0, new[:half]), (1, new[half:])]
    return [(0, new[:1]), (0, new[1:half]), (1, new[half : half + 1]), (1, new[half + 1 :])]


def run(
    setting: LifecycleSetting, seeds: Sequence[int], cells: Cells, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Make and measure every arrangement for each seed, before and after calibration.

    The clones of an arrangement are made apart: each from the support's images of its own and of the base classes.
    Calibration then uses the same support, with all its classes, and nothing else.

    Args:
        setting: Networks and images.
        seeds: Of the support and of the clones.
        cells: Rows that are there already are not made again; keys: `KEYS`.
        progress: Called with what is being done, the rows done, and the rows in all.
    """
    wanted = [(seed, arrangement) for seed in seeds for arrangement in ARRANGEMENTS]
    for done, (seed, arrangement) in enumerate(wanted):
        if progress is not None:
            progress(f"seed {seed}: {arrangement}", done, len(wanted))
        cell = dict(zip(KEYS, (seed, arrangement), strict=True))
        if cell not in cells:
            cells.add({**cell, **_row(setting, seed, arrangement)})
    made = {tuple(row[key] for key in KEYS): row for row in cells.rows}
    return [made[cell] for cell in wanted]


def _row(setting: LifecycleSetting, seed: int, arrangement: str) -> dict[str, Any]:
    target, new = setting.target, setting.new_classes
    generator = torch.Generator().manual_seed(seed)
    support = draw_support(setting.train, new, target.classes, setting.n_new, setting.n_base, generator)
    clones = [_clone(setting, support, part, seed) for part in parts(new, arrangement)]
    net = attach(target.module, *clones)
    test = relabel(class_subset(setting.test, net.classes), net.classes)
    base_logits, log_odds, features = collect_log_odds(net, test.images, 250)
    start = time.perf_counter()
    found = calibrate(net, support)
    seconds = time.perf_counter() - start
    level = base_logits.logsumexp(1, keepdim=True)
    raw = torch.cat([base_logits, *(level + one for one in log_odds.values())], 1)
    moved = [level + _moved(one, features[name], found.scalars[name]) for name, one in log_odds.items()]
    calibrated = torch.cat([base_logits, *moved], 1)
    return {
        "raw": asdict(evaluate(raw, test.labels, base_logits)),
        "calibrated": asdict(evaluate(calibrated, test.labels, base_logits)),
        "off": _difference(net, test, calibrated),
        "calibrate_seconds": seconds,
        "loss_before": found.loss_before,
        "loss_after": found.loss_after,
        "scalars": {
            name: {"scale": one.scale, "offsets": one.offsets, "rivals": len(one.rivals)}
            for name, one in found.scalars.items()
        },
        "positions": [f"{one.target_cut} > {one.source_cut}" for one in net.status()],
        "scores": [one.recipe["score"] for one in clones],
    }


def _moved(log_odds: Tensor, features: Tensor, scalars: Scalars) -> Tensor:
    """The log-odds of a calibrated clone, as the docs have them; (N, K_new), of uncalibrated ones and (N, D_s)."""
    moved = scalars.scale * log_odds + torch.tensor(scalars.offsets, dtype=log_odds.dtype)
    if scalars.rivals:
        against = against_rivals(features, features.new_tensor(scalars.rivals), log_odds.shape[1])
        moved = moved + F.logsigmoid(against)
    return moved


def _clone(setting: LifecycleSetting, support: Support, part: CloneShare, seed: int) -> Clone:
    """Make one clone, or read it where it was made before with the same settings."""
    index, classes = part
    source, target = setting.sources[index], setting.target
    path = None if setting.folder is None else setting.folder / _file_name(setting, support, part, seed)
    if path is not None and path.exists():
        return load(path, source=source.module)
    images = ImageSet(support.images, support.labels, support.names)
    made = clone(
        source.module,
        target.module,
        class_subset(images, (*target.classes, *classes)),
        classes=classes,
        source_classes=source.classes,
        base_classes=target.classes,
        flip=setting.flip,
        effort="seconds",
        seed=seed,
    )
    if path is not None:
        save(made, path)
    return made


def _file_name(setting: LifecycleSetting, support: Support, part: CloneShare, seed: int) -> str:
    """Of a kept clone: whatever it depends on, but for the version of the library, makes the name another one."""
    index, classes = part
    networks = [fingerprint(one.module).weights for one in (setting.sources[index], setting.target)]
    facts = [*value_digests([support.images, support.labels]), support.names, networks, setting.flip, seed]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return f"seed{seed}-source{index + 1}-{'+'.join(classes)}-{digest}.safetensors"


def _difference(net: Composite, test: ImageSet, expected: torch.Tensor, n_images: int = 64) -> float:
    """Largest difference between what the composite gives and what was computed from its log-odds, on some images."""
    like = next(net.parameters())
    with torch.no_grad():
        found = net(images_as_float(test.images[:n_images]).to(like.device, like.dtype))
    return float((found.double().cpu() - expected[:n_images]).abs().max())


def claims(rows: Sequence[Mapping[str, Any]], lives: Mapping[str, Any]) -> list[Claim]:
    """What was asked for, beside what was measured: means over seeds, with half their range.

    Args:
        rows: From `run`.
        lives: From `sequences.run`; `n_sequences` is 0 where none were run.
    """
    found = []
    if lives["n_sequences"]:
        found += [
            at_least("random sequences of attach, detach, disable, only, save, calibrate", 1000, lives["n_sequences"]),
            at_most("broken promises in them", 0, lives["n_problems"]),
        ]
    one = _values(rows, "one", "raw", "average_accuracy")
    for arrangement in ARRANGEMENTS[1:]:
        ours = _values(rows, arrangement, "calibrated", "average_accuracy")
        ahead = [a - b for a, b in zip(ours, one, strict=True)]
        words = f"{arrangement} clones from two sources, calibrated: average accuracy above one clone of all classes"
        found.append(over_seeds(words, ">=", -ALLOWED, ahead))
    kl = [row[stage]["conditional_kl"] for row in rows for stage in ("raw", "calibrated")]
    seconds = [row["calibrate_seconds"] for row in rows]
    return [
        *found,
        over_seeds("conditional KL, before and after", "<=", 0.0, kl),
        over_seeds("seconds of calibrate", "<=", 60.0, seconds),
    ]


def _values(rows: Sequence[Mapping[str, Any]], arrangement: str, stage: str, key: str) -> list[float]:
    return [row[stage][key] for row in rows if row["clones"] == arrangement]


def markdown(
    rows: Sequence[Mapping[str, Any]],
    lives: Mapping[str, Any],
    setting: LifecycleSetting,
    data: str,
    n_test: int | None,
) -> str:
    """The means over seeds as a table, then every row; `data` is the name of the images."""
    flips = ", with mirror images" if setting.flip else ""
    stages = [(arrangement, stage) for arrangement in ARRANGEMENTS for stage in ("raw", "calibrated")]
    means = [[a, stage, *(fmean(_values(rows, a, stage, key)) for key in COLUMNS)] for a, stage in stages]
    shared = {a: "; ".join(f"{', '.join(c)} from source {s + 1}" for s, c in parts(setting.new_classes, a))
              for a in ARRANGEMENTS}  # fmt: skip
    every = [
        [row["seed"], row["clones"], row["raw"]["average_accuracy"], row["calibrated"]["average_accuracy"],
         row["loss_before"], row["loss_after"], row["calibrate_seconds"], row["off"]]
        for row in rows
    ]  # fmt: skip
    tested = "all test images" if n_test is None else f"{n_test} test images per class"
    lines = [
        f"{data}; support of {setting.n_new}/{setting.n_base} images per new/base class{flips}; {tested}; means over "
        f"{len({row['seed'] for row in rows})} seeds. The clones of a row are made apart, each from the images of its "
        "own and of the base classes; calibration then sees the whole support.",
        "",
        *(f"- {a}: {words}" for a, words in shared.items()),
        "",
        table(("clones", "stage", *(key.replace("_", " ") for key in COLUMNS)), means),
        "",
        "Every seed. loss: cross-entropy on the support, nats. off: largest difference of the composite's own logits "
        "from those measured here, which are computed from one pass of log-odds.",
        "",
        table(("seed", "clones", "average, raw", "calibrated", "loss, raw", "calibrated", "calibrate s", "off"), every),
    ]
    if lives["n_sequences"]:
        steps = ", ".join(f"{count:,} {action}" for action, count in lives["steps"].items())
        lines += [
            "",
            f"Random lives of a composite of four clones of tiny networks: {lives['n_sequences']:,} sequences "
            f"({steps}); after each step base logits, each clone's logits and class names are compared bit for bit, at "
            f"the end the target with its snapshot. Broken promises: {lives['n_problems']}.",
        ]
    return "\n".join(lines)
