"""Whether a clone can be useful at all: both networks are tried on the support before any work."""

import math
import warnings
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pnc.foundation.class_names import listed
from pnc.foundation.errors import InputError, PNCWarning
from pnc.method.task import CloneTask, Network

N_IMAGES = 1000
"""At most this many images of the support are tried."""
SURPRISE = 0.05
"""Probability below which a number of correct answers is not considered chance."""
N_TOGETHER, MIXED = 8, 0.01
"""Number of images that are run together, one of them also alone; a difference above this share of the largest logit is
not rounding."""
HARDLY = 1e-3
"""Logits with a smaller standard deviation say nothing; a share of their size if that is above 1."""


@dataclass(frozen=True)
class Usefulness:
    """How well both networks do on the support.

    Attributes:
        source_score: The source's accuracy on the new samples: among the new classes or, for a single one, among all of
            its classes; None if it has only one.
        doubts: Signs of a mistake, in words and figures; empty if there are none.
    """

    source_score: float | None
    doubts: tuple[str, ...]


_KNOWN: WeakKeyDictionary[CloneTask, Usefulness] = WeakKeyDictionary()
"""Each task is checked once and warned about once."""


def check_enough(task: CloneTask, density: float | str, strategy: str) -> None:
    """Refuse a single image where channels are chosen, which takes statistics over several.

    Raises:
        InputError: there is one image in all, and `density` is not 1 or the strategy chooses channels anyway.
    """
    if len(task.samples.labels) == 1 and (density != 1 or strategy == "sequential"):
        way_out = "give more" if strategy == "sequential" else "give more, or set density=1"
        raise InputError(f"support: it has one image in all, and choosing channels needs at least two; {way_out}")


def usefulness(task: CloneTask) -> Usefulness:
    """Check how well both networks do on the support; the first call for a task warns of doubts.

    Called by a public function, so that the warning names the line of its caller.
    """
    if task not in _KNOWN:
        _KNOWN[task] = found = _checked(task)
        if found.doubts and task.team.is_main:
            warnings.warn("; ".join(found.doubts), PNCWarning, stacklevel=4)
    return _KNOWN[task]


def _checked(task: CloneTask) -> Usefulness:
    """Run the source on the new samples and the target on the base ones, and look for signs of a mistake.

    A network is doubted if it is correct no more often than by chance, and so rarely that a useful network would hardly
    be. With very few samples this cannot be told, and nothing is doubted.
    """
    part = task.reduced(N_IMAGES).without_copies
    labels = part.samples.labels
    is_base = (labels < task.n_base) & ~part.background
    new, base = labels[labels >= task.n_base] - task.n_base, labels[is_base]
    wanted = task.source_ids
    logits = _logits(part, task.source, labels >= task.n_base)
    several = len(wanted) > 1
    answers = logits[:, wanted].argmax(1) if several else logits.argmax(1)
    truth = new if several else torch.full_like(new, wanted[0])
    n_choices = len(wanted) if several else len(task.source.classes)
    score = float((answers == truth).double().mean()) if n_choices > 1 else None
    doubts = []
    tried = []
    if n_choices > 1:
        tried.append(("source", answers == truth, "new", n_choices, "source_classes"))
    if len(base) and task.n_base > 1:
        right = _logits(part, task.target, is_base).argmax(1) == base
        tried.append(("target", right, "base", task.n_base, "base_classes"))
    swapped = len(tried) == 2 and all(_is_poor(right, 1 / n) for _, right, _, n, _ in tried)
    doubts += [_at_chance(*one) for one in tried if swapped or _fails(one[1], 1 / one[3])]
    if swapped:
        doubts.append("are source and target swapped?")
    spread, size = float(logits[:, wanted].std(0, correction=0).max()), float(logits[:, wanted].abs().max())
    if spread < HARDLY * max(1.0, size) and len(new) > 1:
        names = listed(task.new_classes, 3)
        doubts.append(
            f"the source's logits of {names} hardly vary over your {len(new)} new samples (standard deviation "
            f"{spread:.2g}): weights? preprocessing?"
        )
    doubts += [*_mixing(part, "source", part.source), *_mixing(part, "target", part.target)]
    return Usefulness(score, tuple(doubts))


def _mixing(task: CloneTask, role: str, network: Network) -> list[str]:
    """The doubt that a network's answers to an image depend on the others in its batch, if they do."""
    rows = torch.zeros(len(task.samples.labels), dtype=torch.bool)
    rows[:N_TOGETHER] = True
    together = _logits(task, network, rows)
    rows[1:] = False
    gap = float((together[0] - _logits(task, network, rows)[0]).abs().max() / together.abs().max().clamp_min(1e-6))
    doubt = (
        f"the {role}'s answers to an image depend on the other images of its batch, by {gap:.0%} of the largest logit: "
        "BatchNorm layers without running statistics?"
    )
    return [doubt] if gap > MIXED else []


def _logits(task: CloneTask, network: Network, rows: Tensor) -> Tensor:
    """Return a network's logits for some samples, (n, K), float32 on the CPU."""
    images, model, like = task.samples.images.select(rows), network.recording.module, network.recording.probe
    with torch.no_grad():
        batches = (images[part] for part in torch.arange(len(images)).split(task.batch_size))
        return torch.cat([model(batch.to(like.device, like.dtype)).float().cpu() for batch in batches])


def _at_chance(role: str, right: Tensor, kind: str, n_choices: int, argument: str) -> str:
    return (
        f"the {role} is right on {float(right.double().mean()):.0%} of your {len(right)} {kind} samples; chance is "
        f"{1 / n_choices:.0%}: order of {argument}? preprocessing? weights?"
    )


def _fails(right: Tensor, chance: float) -> bool:
    """Whether so few correct answers are likely by chance, and unlikely for a useful network."""
    n, hits = len(right), int(right.sum())
    no_better = 1 - _at_most(hits - 1, n, chance) > SURPRISE
    return no_better and _at_most(hits, n, (1 + chance) / 2) < SURPRISE


def _is_poor(right: Tensor, chance: float) -> bool:
    """Whether so few correct answers are unlikely for a network that is a third of the way from chance to perfect."""
    return _at_most(int(right.sum()), len(right), (1 + 2 * chance) / 3) < SURPRISE


def _at_most(hits: int, n: int, probability: float) -> float:
    """Probability of at most `hits` hits among n."""
    logs = partial(_log_binomial, n=n, probability=probability)
    return math.fsum(math.exp(logs(k)) for k in range(hits + 1))


def _log_binomial(k: int, n: int, probability: float) -> float:
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return ways + k * math.log(probability) + (n - k) * math.log1p(-probability)
