"""A ranking as data: what was found out about each source, and the accuracy predicted from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from pnc.foundation.class_names import listed
from pnc.foundation.errors import InputError
from pnc.zoo.quick_look import Look

LEAST_FITTED = 4
"""With fewer sources there is nothing to compare, and predictions are held-out accuracies."""


@dataclass(frozen=True)
class Ranked:
    """One source in a ranking.

    Attributes:
        look: What was found out about it, in a full scan or in a quick look.
        predicted: Average accuracy expected of a clone from it, in [0, 1]: the mean over base and new images; among the
            new classes only, if the support has no base images.
    """

    look: Look
    predicted: float

    @property
    def name(self) -> str:
        """Of its entry."""
        return self.look.name

    @property
    def source_classes(self) -> tuple[str, ...]:
        """Names of its outputs for `pnc.clone`, in which every requested class has an output."""
        return self.look.source_classes

    @property
    def is_scanned(self) -> bool:
        """Whether positions were scanned: cost and accuracy are then those of the chosen one."""
        return self.look.position is not None


@dataclass(frozen=True)
class Ranking:
    """The sources of a zoo, best first.

    Attributes:
        ranked: The sources; those that were scanned first.
        left_out: Sources that cannot be cloned from, each with the reason.
        classes: The requested classes.
        target_macs: Multiply-accumulates of the target for an image, to compare costs with.
        n_images: Images of the support.
        seconds: Time that it took.
    """

    ranked: tuple[Ranked, ...]
    left_out: Mapping[str, str]
    classes: tuple[str, ...]
    target_macs: int
    n_images: int
    seconds: float

    @property
    def best(self) -> Ranked:
        """The source to clone from.

        Raises:
            InputError: there is none.
        """
        if not self.ranked:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(self.left_out.items())[:3])
            raise InputError(f"zoo: no source can be used for {listed(self.classes)} ({why or 'it is empty'})")
        return self.ranked[0]

    def __len__(self) -> int:
        return len(self.ranked)

    def __str__(self) -> str:
        width = max((len(one.name) for one in self.ranked), default=0)
        lines = [f"Ranking of {len(self)} sources for {listed(self.classes, 5)}, by predicted average accuracy"]
        for one in self.ranked:
            cost = one.look.n_macs / max(self.target_macs, 1)
            lines.append(
                f"{'*' if one.is_scanned else ' '} {one.name:{width}}  {one.predicted:.3f} +- "
                f"{one.look.standard_error:.3f}, names {one.look.named}, adds {cost:.2f} of the target's MACs"
            )
        lines += [f"  {name}: left out, {reason}" for name, reason in self.left_out.items()]
        return "\n".join([*lines, "*: scanned; the others were looked at only"])

    def facts(self) -> dict[str, Any]:
        """Return the ranking as JSON values."""
        rows = [{**one.look.summary(), "predicted": one.predicted} for one in self.ranked]
        own = {key: value for key, value in vars(self).items() if key not in ("ranked", "left_out")}
        return {**own, "classes": list(self.classes), "ranked": rows, "left_out": dict(self.left_out)}


def predicted(looks: Sequence[Look]) -> list[float]:
    """Predict the accuracy of a clone from each source.

    A few dozen images say little about one source: counts of right answers are off by .05 and more. But the same images
    were shown to all sources, and some of these know the classes. What they have in common is found as the first
    principal component of the probabilities of the right class, sources by images: the images on which knowledge shows
    count more, the others less. How far a source lies along it is its knowledge. Held-out accuracies are regressed on
    it, over all sources, and each gets the value of the line.

    Args:
        looks: At the same images.
    """
    own = [one.accuracy for one in looks]
    if len(looks) < LEAST_FITTED:
        return own
    xs = _knowledge(looks)
    x_mean, y_mean = fmean(xs), fmean(own)
    spread = sum((x - x_mean) ** 2 for x in xs)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, own, strict=True)) / max(spread, 1e-12)
    return [min(1.0, max(0.0, y_mean + max(0.0, slope) * (x - x_mean))) for x in xs]


def _knowledge(looks: Sequence[Look]) -> list[float]:
    """Each source's share of what distinguishes them most, see `predicted`; the mean over sources is zero.

    Square roots of probabilities, since their noise is about the same everywhere. Base and new images have equal
    weight, as in the average accuracy.
    """
    kinds = [torch.tensor(kind, dtype=torch.float64) for kind in zip(*map(_probabilities, looks), strict=True)]
    weights = torch.cat([torch.full((kind.shape[1],), 1 / max(kind.shape[1], 1)) for kind in kinds]).double()
    rows = torch.cat(kinds, 1).sqrt()
    rows = (rows - rows.mean(0)) * weights.sqrt()
    left, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    found: list[float] = (left[:, 0] * sizes[0] * (right[0] @ weights.sqrt())).tolist()
    return found


def _probabilities(look: Look) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return look.base_probabilities, look.new_probabilities
