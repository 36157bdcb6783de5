"""The class names of a task: which classes are cloned, and the labels of a support as indices into them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pnc.data.support import StoredSupport
from pnc.foundation.class_names import MAX_TEXT, check_class_names, class_ids, is_name, listed
from pnc.foundation.errors import ClassNameError, InputError


@dataclass(frozen=True)
class TaskClasses:
    """Checked class names of a task, in the order of each network's outputs.

    Attributes:
        source: Names of the source's outputs.
        base: Names of the target's outputs.
        new: Classes to clone.
    """

    source: tuple[str, ...]
    base: tuple[str, ...]
    new: tuple[str, ...]

    @property
    def left_out(self) -> tuple[str, ...]:
        """Classes of the source that the target lacks and that are not cloned."""
        return tuple(name for name in self.source if name not in {*self.base, *self.new})

    @property
    def all(self) -> tuple[str, ...]:
        """Base classes, then new ones, then those left out."""
        return (*self.base, *self.new, *self.left_out)


def task_classes(
    classes: Sequence[str] | None, source_classes: Sequence[str], base_classes: Sequence[str]
) -> TaskClasses:
    """Check the class names of a task; None as `classes` clones all that the target lacks.

    Raises:
        ClassNameError: a class is unknown, given twice, not printable, or already known to the target.
    """
    base = check_class_names(base_classes, "base_classes")
    source = check_class_names(source_classes, "source_classes")
    new = _new_classes(classes, source, base)
    unwritable = next((name for name in (*base, *new) if not is_name(name)), None)
    if unwritable is not None:
        raise ClassNameError(
            f"classes: {unwritable!r:.100} is not printable text of at most {MAX_TEXT} characters; rename it"
        )
    return TaskClasses(source, base, new)


def _new_classes(classes: Sequence[str] | None, source: tuple[str, ...], base: tuple[str, ...]) -> tuple[str, ...]:
    if classes is None:
        new = tuple(name for name in source if name not in base)
        if not new:
            raise ClassNameError("classes: the target already knows every class of the source; there is none to clone")
        return new
    new = check_class_names(classes, "classes")
    class_ids(new, source, "classes")
    clash = [name for name in new if name in base]
    if clash:
        raise ClassNameError(
            f"classes: the target already knows {', '.join(clash)}; rename the class in source_classes or leave it out"
        )
    return new


def support_labels(support: StoredSupport, classes: TaskClasses) -> Tensor:
    """Return the labels of a support as indices into base and new classes, (N,)."""
    names = (*classes.base, *classes.new)
    counts = support.labels.bincount(minlength=len(support.names)).tolist()
    seen = {name: count for name, count in zip(support.names, counts, strict=True) if count}
    dropped = [name for name in classes.left_out if name in seen]
    if dropped:
        raise ClassNameError(
            f"support has samples of {listed(dropped)}, which the source knows but `classes` leaves out: drop these "
            "samples, or clone these classes too"
        )
    foreign = sorted(set(seen) - set(names))
    if foreign:
        raise ClassNameError(
            f"support has samples of {listed(foreign)}, neither base classes nor classes to clone; leave them out, "
            "or add them to source_classes, which must name every output of the source"
        )
    missing = [name for name in classes.new if name not in seen]
    if missing:
        raise InputError(
            f"support has no sample of {listed(missing)}; every class to clone needs at least "
            "one; add images, or name the others in classes="
        )
    place = torch.tensor([names.index(name) if name in names else -1 for name in support.names])
    return place[support.labels]
