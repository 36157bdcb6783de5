"""A ranking as data: what was found out about each source, and the accuracy predicted from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pnc.foundation.class_names import listed
from pnc.foundation.errors import InputError
from pnc.zoo.quick_look import Look

LEAST_FITTED = 4
"""With fewer sources, held-out accuracies are not smoothed."""


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
        rows = [{**one.look.facts(), "predicted": one.predicted} for one in self.ranked]
        own = {key: value for key, value in vars(self).items() if key not in ("ranked", "left_out")}
        return {**own, "classes": list(self.classes), "ranked": rows, "left_out": dict(self.left_out)}


def predicted(looks: Sequence[Look]) -> list[float]:
    """Predict the accuracy of a clone from each source.

    Counts of right and wrong answers on a few dozen images are noisy: .05 and more. The mean probability of the right
    class orders sources more reliably, but is no accuracy. So the accuracies of all sources are regressed on it, and
    each source gets the mean of its own accuracy and of the value of the line.

    Args:
        looks: At the same images.
    """
    own = [one.accuracy for one in looks]
    if len(looks) < LEAST_FITTED:
        return own
    xs = [one.probability for one in looks]
    x_mean, y_mean = fmean(xs), fmean(own)
    spread = sum((x - x_mean) ** 2 for x in xs)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, own, strict=True)) / max(spread, 1e-12)
    line = (min(1.0, max(0.0, y_mean + max(0.0, slope) * (x - x_mean))) for x in xs)
    return [(a + b) / 2 for a, b in zip(own, line, strict=True)]
