"""Random sequences of operations on a composite: attach, detach, disable, save, load, calibrate; all promises checked.

The networks are tiny and untrained: nothing here depends on what they have learned.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pnc.bench.bench import Measure, Rows, one_by_one
from pnc.clones.branch import Scalars
from pnc.clones.clone import Clone
from pnc.clones.clone_file import load, save
from pnc.composite.composite import attach
from pnc.data.support import Support
from pnc.foundation.network_state import differences, take_snapshot
from pnc.foundation.tensor_bits import same_bits
from pnc.method.calibration import calibrate
from pnc.method.pipeline import fit
from pnc.method.positions import scan
from pnc.method.task import prepare_task
from pnc.models.model_specs import build_model

Action = Literal["attach", "detach", "disable", "only", "save", "calibrate"]
ACTIONS: tuple[Action, ...] = get_args(Action)
Step = tuple[Action, int]
"""The action, and a number that selects the clone."""

MAX_STEPS = 10
CHUNK = 50
SHAPE = (1, 8, 8)
BASE = ("ant", "bee", "cat")
GROUPS = (("dog",), ("elk", "fox"), ("gnu",), ("hen", "ibis"))
CUTS = ("input", "block1_2", "block2_2", "block2_2")
"""Target cuts of the clones of these groups: from the input to a late cut, and two at the same."""
SOURCES = ("zoo:cnn?width=0.25", "zoo:resnet20?width=0.25")
"""The first two groups come from the first source, the others from the second."""


@dataclass(frozen=True, eq=False)
class Stage:
    """A target, four clones from two sources, and images: made once, and not changed by any sequence.

    Attributes:
        target: Takes all clones.
        clones: The clones.
        sources: The source of each clone.
        images: For the checks.
        support: Of all classes.
        alone: The logits of each clone when it is attached alone.
        base: The target's own logits.
    """

    target: nn.Module
    clones: tuple[Clone, ...]
    sources: tuple[nn.Module, ...]
    images: Tensor
    support: Support
    alone: tuple[Tensor, ...]
    base: Tensor


def make_stage(seed: int = 0) -> Stage:
    """Make the networks and clones; takes seconds."""
    new = tuple(name for group in GROUPS for name in group)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(BASE) + len(new)).repeat(6)
    support = Support(torch.rand(len(labels), *SHAPE, generator=generator), labels, (*BASE, *new))
    target = build_model(SOURCES[0], BASE, SHAPE, seed=seed + 1).module.eval()
    networks = [build_model(spec, new, SHAPE, seed=seed + 2 + i).module for i, spec in enumerate(SOURCES)]
    sources = tuple(networks[index // 2] for index in range(len(GROUPS)))
    clones = []
    for index, (source, group) in enumerate(zip(sources, GROUPS, strict=True)):
        samples = _of_classes(support, (*BASE, *group))
        names: Any = {"classes": group, "source_classes": new, "base_classes": BASE}
        task = prepare_task(source, target, samples, **names, seed=seed)
        found = scan(task)
        here = [position for position in found.positions if position.target_cut.name == CUTS[index]]
        clones.append(fit(task, found.adapter(max(here, key=lambda position: position.n_macs))))
    images = torch.rand(5, *SHAPE, generator=generator)
    with torch.no_grad():
        alone = tuple(attach(target, one)(images)[:, len(BASE) :] for one in clones)
        return Stage(target, tuple(clones), sources, images, support, alone, target(images))


def _of_classes(support: Support, names: Sequence[str]) -> Support:
    wanted = torch.tensor([name in names for name in support.names])
    rows = wanted[support.labels]
    place = torch.tensor([names.index(name) if name in names else -1 for name in support.names])
    return Support(support.images[rows], place[support.labels[rows]], tuple(names))


@dataclass
class Life:
    """One composite on a stage, from its first clone to its last.

    Attributes:
        stage: Networks, clones and images.
        folder: For clone files.
        problems: Broken promises, in words.
        done: How often each action did something.
    """

    stage: Stage
    folder: Path
    problems: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._before = take_snapshot(self.stage.target)
        self._net = attach(self.stage.target, self.stage.clones[0])
        self._attached = [0]
        self._scalars: dict[int, Scalars] = {0: Scalars()}
        self._moved: dict[tuple[int, Scalars], Tensor] = {}
        self._check("the first clone")

    def step(self, action: Action, index: int) -> None:
        """Apply an action to one of the clones that it fits, if there is any, and check everything."""
        missing = [one for one in range(len(GROUPS)) if one not in self._attached]
        fit = missing if action == "attach" else self._attached
        if fit or action == "disable":
            getattr(self, f"_{action}")(fit[index % len(fit)] if fit else 0)
            self.done[action] += 1
        self._check(action)

    def end(self) -> None:
        """Detach the remaining clones, and check that the target has not changed in any respect."""
        for index in list(self._attached):
            self._detach(index)
        self._check("the end")
        self.problems += differences(self.stage.target, self._before)

    def _attach(self, index: int) -> None:
        self._net.attach(self.stage.clones[index])
        self._attached.append(index)
        self._scalars[index] = Scalars()

    def _detach(self, index: int) -> None:
        self._net.detach(self.stage.clones[index].name)
        self._attached.remove(index)
        del self._scalars[index]

    def _disable(self, _: int) -> None:
        with torch.no_grad(), self._net.disabled():
            self._expect("disabled", self._net(self.stage.images), self.stage.base)
            self._expect_classes("disabled", ())

    def _only(self, index: int) -> None:
        with torch.no_grad(), self._net.only(self.stage.clones[index].name):
            found = self._net(self.stage.images)
            self._expect_classes("only", (index,))
        self._expect("only, base", found[:, : len(BASE)], self.stage.base)
        self._expect("only, new", found[:, len(BASE) :], self._logits(index))

    def _save(self, index: int) -> None:
        """Save a clone in its current state, load it, and attach the loaded one instead, at the end."""
        path = self.folder / "clone.safetensors"
        save(self._net.clone(self.stage.clones[index].name), path, "full" if self.done["save"] % 2 else "thin")
        loaded = load(path, source=self.stage.sources[index])
        self._net.detach(loaded.name)
        self._net.attach(loaded)
        self._attached.remove(index)
        self._attached.append(index)

    def _calibrate(self, _: int) -> None:
        found = calibrate(self._net, _of_classes(self.stage.support, self._net.classes))
        for one in self._attached:
            self._scalars[one] = found.scalars[self.stage.clones[one].name]

    def _logits(self, index: int) -> Tensor:
        """Expected logits of a clone: those that it gives alone, with its current scalars."""
        scalars, original = self._scalars[index], self.stage.clones[index]
        if scalars.is_identity:
            return self.stage.alone[index]
        if (index, scalars) not in self._moved:
            moved = replace(original, branch=original.branch.rescaled(scalars))
            with torch.no_grad():
                self._moved[index, scalars] = attach(self.stage.target, moved)(self.stage.images)[:, len(BASE) :]
        return self._moved[index, scalars]

    def _check(self, after: str) -> None:
        with torch.no_grad():
            found = self._net(self.stage.images)
        parts = found.split([len(BASE), *(len(GROUPS[index]) for index in self._attached)], 1)
        self._expect(f"after {after}: base", parts[0], self.stage.base)
        for index, logits in zip(self._attached, parts[1:], strict=True):
            self._expect(f"after {after}: clone {index}", logits, self._logits(index))
        self._expect_classes(f"after {after}", self._attached)

    def _expect(self, what: str, found: Tensor, expected: Tensor) -> None:
        if not same_bits(found, expected):
            self.problems.append(f"{what}: other logits")

    def _expect_classes(self, what: str, indices: Sequence[int]) -> None:
        if self._net.classes != (*BASE, *(name for index in indices for name in GROUPS[index])):
            self.problems.append(f"{what}: classes are {self._net.classes}")


def measure(n_sequences: int) -> Measure:
    """Run `n_sequences` random sequences on one stage; cells have the keys of `lifecycle`, and share its file."""
    stage = lru_cache(maxsize=1)(lambda: make_stage())  # made only if a chunk is missing
    chunks = [range(first, min(first + CHUNK, n_sequences)) for first in range(0, n_sequences, CHUNK)]
    by_name = {f"lives up to {numbers.stop}": numbers for numbers in chunks}
    return one_by_one(
        [{"seed": numbers.start, "clones": name} for name, numbers in by_name.items()],
        lambda cell: _lives(stage(), by_name[cell["clones"]]),
    )


def summary(rows: Rows, n_sequences: int) -> dict[str, Any]:
    """Count sequences, effective steps by action, and problems; list the first problems."""
    problems = [problem for row in rows for problem in row["problems"]]
    return {
        "n_sequences": n_sequences,
        "steps": {action: sum(row["steps"][action] for row in rows) for action in ACTIONS},
        "n_problems": len(problems),
        "problems": problems[:20],
    }


def _lives(stage: Stage, numbers: range) -> dict[str, Any]:
    """Steps and problems of some sequences, whose numbers are their seeds."""
    done: Counter[str] = Counter()
    problems: list[str] = []
    with TemporaryDirectory() as folder:
        for number in numbers:
            generator = random.Random(number)
            life = Life(stage, Path(folder))
            for _ in range(generator.randint(1, MAX_STEPS)):
                life.step(generator.choice(ACTIONS), generator.randrange(len(GROUPS)))
            life.end()
            done += life.done
            problems += [f"sequence {number}, {problem}" for problem in life.problems]
    return {"steps": {action: done[action] for action in ACTIONS}, "problems": problems}
