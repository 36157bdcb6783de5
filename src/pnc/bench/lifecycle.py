"""Clones made separately, compared with one clone of all their classes, before and after calibration."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pnc.bench import random_lives
from pnc.bench.bench import Bench, Row, Rows, one_by_one
from pnc.bench.result_files import Cells, Claim, at_least, at_most, over_seeds, table
from pnc.bench.setting import Setting
from pnc.clones.branch import Scalars, against_rivals
from pnc.clones.clone import Clone
from pnc.clones.clone_file import load, save
from pnc.composite.composite import Composite, attach
from pnc.composite.metrics import measure_logits
from pnc.data.image_set import ImageSet, class_subset, images_as_float, relabel
from pnc.data.support import Support
from pnc.foundation.errors import InputError
from pnc.foundation.fingerprints import fingerprint
from pnc.foundation.tensor_bits import value_digests
from pnc.method.calibration import calibrate, collect_log_odds
from pnc.method.pipeline import clone
from pnc.method.task import Progress
from pnc.models.model_specs import LoadedModel

ARRANGEMENTS = ("one", "two", "four")
"""Number of clones that the new classes are divided among."""

KEYS = ("seed", "clones")
COLUMNS = ("base_accuracy", "new_accuracy", "average_accuracy", "leak", "conditional_kl")
ALLOWED = 0.02
"""Average accuracy that separate clones may lose compared with one of all classes."""


CloneShare = tuple[int, tuple[str, ...]]
"""One clone: the number of its source, and its classes."""


def shares(new_classes: Sequence[str], arrangement: str) -> list[CloneShare]:
    """Divide the new classes: the first half comes from the first source; with four clones, one class of each is alone.

    Raises:
        InputError: there are fewer than four classes.
    """
    new = tuple(new_classes)
    if len(new) < 4:
        raise InputError(f"source: four clones need at least four new classes; got {len(new)}: {', '.join(new)}")
    half = (len(new) + 1) // 2
    if arrangement == "one":
        return [(0, new)]
    if arrangement == "two":
        return [(0, new[:half]), (1, new[half:])]
    return [(0, new[:1]), (0, new[1:half]), (1, new[half : half + 1]), (1, new[half + 1 :])]


@dataclass(frozen=True)
class CloneMaker:
    """Makes the clones of all arrangements.

    Attributes:
        setting: Target, first source and images.
        second: Another source, which knows the same new classes.
        folder: Keeps clones as files, so that they are not made twice; None keeps none.
    """

    setting: Setting
    second: LoadedModel
    folder: Path | None = None

    def clone(self, support: Support, share: CloneShare, seed: int) -> Clone:
        """Make one clone, or read it if it was made before with the same settings."""
        index, classes = share
        source, target = self.source(index), self.setting.target
        path = None if self.folder is None else self.folder / self.file_name(support, share, seed)
        if path is not None and path.exists():
            return load(path, source=source.module)
        images = class_subset(ImageSet(support.images, support.labels, support.names), (*target.classes, *classes))
        made = clone(source.module, target.module, images, effort="seconds", **self.setting.arguments(classes, seed))
        if path is not None:
            save(made, path)
        return made

    def file_name(self, support: Support, share: CloneShare, seed: int) -> str:
        """Name of a kept clone: differs with all that the clone depends on, except the version of the library."""
        index, classes = share
        networks = [fingerprint(one.module).weights for one in (self.source(index), self.setting.target)]
        facts = [*value_digests([support.images, support.labels]), support.names, networks, self.setting.flip, seed]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
        return f"seed{seed}-source{index + 1}-{'+'.join(classes)}-{digest}.safetensors"

    def source(self, index: int) -> LoadedModel:
        """The first source for 0, the second for 1."""
        return self.second if index else self.setting.source


def bench(maker: CloneMaker, seeds: Sequence[int], n_sequences: int) -> Bench:
    """Make and measure every arrangement for each seed, before and after calibration; and run random sequences.

    The clones of an arrangement are made separately, each from the support's images of its own and the base classes.
    Calibration then uses the same support, with all its classes, and nothing else.

    Raises:
        InputError: there are fewer than four new classes.
    """
    setting = maker.setting
    shares(setting.new_classes, "four")
    settings = {**setting.facts, "n_test": setting.n_test}
    wanted = [dict(zip(KEYS, (seed, clones), strict=True)) for seed in seeds for clones in ARRANGEMENTS]
    lives, arrangements = random_lives.measure(n_sequences), one_by_one(wanted, lambda cell: _row(maker, **cell))

    def split(rows: Rows) -> tuple[Rows, Row]:
        of_lives = [row for row in rows if "problems" in row]
        return [row for row in rows if row not in of_lives], random_lives.summary(of_lives, n_sequences)

    def facts(rows: Rows) -> Row:
        measured, counted = split(rows)
        return {**settings, "lives": counted, "rows": measured}

    def measure(cells: Cells, progress: Progress | None) -> Rows:
        return [*lives(cells, progress), *arrangements(cells, progress)]

    found, text = (lambda rows: claims(*split(rows))), (lambda rows: markdown(*split(rows), setting))
    return Bench("lifecycle", KEYS, settings, measure, found, text, facts)


def _row(maker: CloneMaker, seed: int, clones: str) -> dict[str, Any]:
    setting, new = maker.setting, maker.setting.new_classes
    support = setting.draw(new, seed)
    made = [maker.clone(support, share, seed) for share in shares(new, clones)]
    net = attach(setting.target.module, *made)
    test = relabel(class_subset(setting.test, net.classes), net.classes)
    base_logits, log_odds, features = collect_log_odds(net.now(), test.images, 250)
    start = time.perf_counter()
    found = calibrate(net, support)
    seconds = time.perf_counter() - start
    level = base_logits.logsumexp(1, keepdim=True)
    raw = torch.cat([base_logits, *(level + one for one in log_odds.values())], 1)
    moved = [level + _moved(one, features[name], found.scalars[name]) for name, one in log_odds.items()]
    calibrated = torch.cat([base_logits, *moved], 1)
    return {
        "raw": asdict(measure_logits(raw, test.labels, base_logits)),
        "calibrated": asdict(measure_logits(calibrated, test.labels, base_logits)),
        "off": _difference(net, test, calibrated),
        "calibrate_seconds": seconds,
        "loss_before": found.loss_before,
        "loss_after": found.loss_after,
        "scalars": {
            name: {"scale": one.scale, "offsets": one.offsets, "rivals": len(one.rivals)}
            for name, one in found.scalars.items()
        },
        "positions": [f"{one.target_cut} > {one.source_cut}" for one in net.status()],
        "scores": [one.recipe["score"] for one in made],
    }


def _moved(log_odds: Tensor, features: Tensor, scalars: Scalars) -> Tensor:
    """Calibrated log-odds, as in the docs, (N, K_new), from uncalibrated ones and source features (N, D_s)."""
    moved = scalars.scale * log_odds + torch.tensor(scalars.offsets, dtype=log_odds.dtype)
    if scalars.rivals:
        against = against_rivals(features, features.new_tensor(scalars.rivals), log_odds.shape[1])
        moved = moved + F.logsigmoid(against)
    return moved


def _difference(net: Composite, test: ImageSet, expected: torch.Tensor, n_images: int = 64) -> float:
    """Largest difference between the composite's logits and those computed from its log-odds, on some images."""
    like = next(net.parameters())
    with torch.no_grad():
        found = net(images_as_float(test.images[:n_images]).to(like.device, like.dtype))
    return float((found.double().cpu() - expected[:n_images]).abs().max())


def claims(rows: Rows, lives: Row) -> list[Claim]:
    """Required figures, with what was measured: means over seeds, with half their range.

    Args:
        rows: One for each seed and arrangement.
        lives: From `random_lives.summary`; `n_sequences` is 0 if none were run.
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


def _values(rows: Rows, arrangement: str, stage: str, key: str) -> list[float]:
    return [row[stage][key] for row in rows if row["clones"] == arrangement]


def markdown(rows: Rows, lives: Row, setting: Setting) -> str:
    """The means over seeds as a table, then every row."""
    stages = [(arrangement, stage) for arrangement in ARRANGEMENTS for stage in ("raw", "calibrated")]
    means = [[a, stage, *(fmean(_values(rows, a, stage, key)) for key in COLUMNS)] for a, stage in stages]
    shared = {a: "; ".join(f"{', '.join(c)} from source {s + 1}" for s, c in shares(setting.new_classes, a))
              for a in ARRANGEMENTS}  # fmt: skip
    every = [
        [row["seed"], row["clones"], row["raw"]["average_accuracy"], row["calibrated"]["average_accuracy"],
         row["loss_before"], row["loss_after"], row["calibrate_seconds"], row["off"]]
        for row in rows
    ]  # fmt: skip
    tested = "all test images" if setting.n_test is None else f"{setting.n_test} test images per class"
    lines = [
        f"{setting.words}; {tested}; means over {len({row['seed'] for row in rows})} seeds. "
        "The clones of a row are made separately, each from the images of its own and the base classes; calibration "
        "then uses the whole support.",
        "",
        *(f"- {a}: {words}" for a, words in shared.items()),
        "",
        table(("clones", "stage", *(key.replace("_", " ") for key in COLUMNS)), means),
        "",
        "Every seed. loss: cross-entropy on the support, nats. off: largest difference between the composite's logits "
        "and those measured here, which are computed from one pass of log-odds.",
        "",
        table(("seed", "clones", "average, raw", "calibrated", "loss, raw", "calibrated", "calibrate s", "off"), every),
    ]
    if lives["n_sequences"]:
        steps = ", ".join(f"{count:,} {action}" for action, count in lives["steps"].items())
        lines += [
            "",
            f"Random sequences of operations on a composite of four clones of tiny networks: {lives['n_sequences']:,} "
            f"({steps}); after each step base logits, each clone's logits and class names are compared bit for bit, at "
            f"the end the target with its snapshot. Broken promises: {lives['n_problems']}.",
        ]
    return "\n".join(lines)
