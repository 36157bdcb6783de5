"""Which outputs of a source stand for the requested classes: by name, by the user's map, or by its answers."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pnc.foundation.class_names import listed
from pnc.foundation.errors import InputError

Names = Mapping[str, Sequence[str]]
"""For a requested class, what sources call it: {"cat": ["tabby", "domestic cat"]}."""


def check_names(names: Mapping[str, str | Sequence[str]], classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the user's map with tuples as values, after checking it.

    Raises:
        InputError: it is no mapping, names a class that is not requested, or says one thing of two classes.
    """
    if not isinstance(names, Mapping):
        raise InputError(f"names: expected a mapping from requested classes to sources' names; got {names!r:.100}")
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise InputError(f"names: {listed(unknown)} not among the requested classes, which are {listed(classes)}")
    found = {name: (value,) if isinstance(value, str) else tuple(value) for name, value in names.items()}
    given = [one for values in found.values() for one in values]
    twice = [one for one in given if not isinstance(one, str) or given.count(one) > 1]
    if twice:
        raise InputError(f"names: {twice[0]!r:.100} is no name, or stands for two classes; give each name once")
    return found


def outputs_by_name(classes: Sequence[str], names: Names, outputs: Sequence[str]) -> list[int | None]:
    """Return the output of a source for each requested class: by the user's map or by the very same name."""
    place = {name: index for index, name in enumerate(outputs)}
    taken = {one for values in names.values() for one in values}
    return [
        next((place[one] for one in names.get(name, ()) if one in place), None)
        if names.get(name)
        else (place.get(name) if name not in taken else None)
        for name in classes
    ]


def stand_ins(found: Sequence[int | None], log_probs: Tensor, labels: Tensor) -> list[int] | None:
    """Fill in an output for each class that the source does not name: the one that answers most to its images.

    A clone needs an output of the source for each class; its head learns how far to trust it. Classes and outputs are
    paired greedily, the surest pair first.

    Args:
        found: Output of each of K_new classes; None where the source does not name it.
        log_probs: The source's log-probabilities for images of these classes, (N, K_source).
        labels: The class of each image, (N,), in [0, K_new).
    Returns:
        An output for each class, all different; None if the source has fewer outputs than that.
    """
    outputs = list(found)
    lacking = [index for index, output in enumerate(outputs) if output is None]
    free = [output for output in range(log_probs.shape[1]) if output not in outputs]
    if len(free) < len(lacking):
        return None
    if lacking:
        means = torch.stack([log_probs[labels == index].mean(0) for index in lacking])
        for _ in lacking:
            row, column = divmod(int(means[:, free].argmax()), len(free))
            outputs[lacking[row]] = free.pop(column)
            means[row] = -torch.inf
    return [output for output in outputs if output is not None]


def renamed(outputs: Sequence[str], chosen: Iterable[int], classes: Sequence[str]) -> tuple[str, ...]:
    """Return names of all outputs such that the chosen ones have the requested names, for `source_classes` of `clone`.

    >>> renamed(["tabby", "cat", "dog"], [0, 2], ["cat", "wolf"])
    ('cat', 'cat (source)', 'wolf')
    """
    place = dict(zip(chosen, classes, strict=True))
    names = [place.get(index) or name for index, name in enumerate(outputs)]
    return tuple(
        f"{name} (source)" if index not in place and name in classes else name for index, name in enumerate(names)
    )
