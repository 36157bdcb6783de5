"""A clone described on one screen, for `print(clone)` and `pnc inspect`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pnc.graph.cut_points import CutPoint


@dataclass(frozen=True)
class HeldOut:
    """A clone's scores on images of the support that its head was not fitted on.

    Attributes:
        score: Accuracy, with equal weight on base and new images; without base images, among the new classes only. If
            nothing could be held out, on the images that the head was fitted on.
        standard_error: Standard error of `score`.
        base: Accuracy on base images, among all classes; None without base images and in older files.
        new: Accuracy on new images, among all classes; without base images, among the new ones.
        base_drop: Share of base images that the target alone gets right and new classes take away; None if it was not
            measured.
        n_base: Number of base images; 0 for none.
        is_held_out: Whether images could be held out, which takes two of every new class.
    """

    score: float
    standard_error: float
    base: float | None
    new: float | None
    base_drop: float | None
    n_base: int
    is_held_out: bool

    def __str__(self) -> str:
        whole = f"{self.score:.3f} +- {self.standard_error:.3f}"
        if not self.is_held_out:
            whole += ", on the images that it was fitted on: with one image of a class, none can be held out"
        if not self.n_base:
            return f"{whole}, among the new classes only, without base images"
        if self.base is None or self.new is None:
            return whole
        drop = "" if self.base_drop is None else f"; base drop {self.base_drop:.3f} of {self.n_base} base images"
        return f"{whole}: base {self.base:.3f}, new {self.new:.3f}{drop}"


def held_out_of(recipe: Mapping[str, Any]) -> HeldOut:
    """Read the held-out scores from a recipe; older recipes lack some."""
    return HeldOut(
        score=recipe["score"],
        standard_error=recipe["standard_error"],
        base=recipe.get("base_score"),
        new=recipe.get("new_score"),
        base_drop=recipe.get("expected_base_drop"),
        n_base=recipe["n_base_samples"] + recipe.get("n_background_samples", 0),
        is_held_out=recipe.get("n_folds", 2) > 1,
    )


def clone_lines(
    name: str,
    classes: Sequence[str],
    base_classes: Sequence[str],
    cuts: tuple[CutPoint | Mapping[str, Any], CutPoint | Mapping[str, Any]],
    recipe: Mapping[str, Any],
) -> dict[str, str]:
    """Describe a clone as {label: text}.

    Args:
        name: Name of the clone.
        classes: The new classes.
        base_classes: The target's classes.
        cuts: Cuts of target and source, as `CutPoint` or as in a file.
        recipe: The clone's recipe.
    """
    sides = [_cut_text(cut) for cut in cuts]
    lines = {
        "name": name,
        "new classes": ", ".join(classes),
        "base classes": ", ".join(base_classes),
        "leaves the target at": sides[0],
        "enters the source at": sides[1],
        "support": f"{recipe['n_new_samples']} new, {recipe['n_base_samples']} base images"
        + (f", {count} background" if (count := recipe.get("n_background_samples", 0)) else ""),
        "held-out score": str(held_out_of(recipe)),
        "added MACs": f"{recipe['macs_share']:.1%} of the source's",
        "density": f"{recipe['density']:g}",
        "tuned": recipe.get("tune") or "nothing",
    }
    if "max_base_drop" in recipe:
        lines["base images may lose"] = (
            f"{recipe['max_base_drop']:.1%}: new logits lowered by {recipe['base_priority']:.2f}"
        )
    for doubt in recipe.get("doubts", ()):
        lines["doubts"] = f"{lines['doubts']}; {doubt}" if "doubts" in lines else doubt
    return lines


def _cut_text(cut: CutPoint | Mapping[str, Any]) -> str:
    name, shape = (cut.name, cut.shape) if isinstance(cut, CutPoint) else (cut["name"], cut["shape"])
    return f"{name} ({'x'.join(map(str, shape))})"
