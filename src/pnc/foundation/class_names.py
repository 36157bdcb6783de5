"""Class names: checked, looked up, read from a command line, and listed in messages."""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from reprlib import repr as shortened
from typing import Any

from pnc.foundation.errors import ClassNameError

MAX_TEXT = 1000
"""Maximum length, in characters, of a name or other text in a file."""


def is_name(value: object) -> bool:
    """Whether a file can hold `value` as a name: printable text, not empty, at most `MAX_TEXT` characters."""
    return isinstance(value, str) and 1 <= len(value) <= MAX_TEXT and value.isprintable()


def check_class_names(names: Iterable[str] | Mapping[Any, Any], argument: str) -> tuple[str, ...]:
    """Return the names as a tuple, after checking that there is at least one and all are different non-empty strings.

    A mapping is sorted by its ids: {id: name}, like `id2label` of transformers (ids may be text, as in JSON), or
    {name: id}, like `class_to_idx` of torchvision. A Series of pandas is
    such a mapping, from its index to its values.

    Raises:
        ClassNameError: a check fails, or `names` is a set (which has no order) or a mapping whose ids are not
            0, 1, 2, ...; the message names `argument`.
    """
    if hasattr(names, "to_dict") and not callable(getattr(names, "index", len)):
        names = names.to_dict()  # a Series of pandas, whose index says what its values belong to
    if isinstance(names, Mapping):
        names = _by_id(names, argument)
    if isinstance(names, str):
        raise ClassNameError(
            f"{argument}: expected a sequence of class names, got the one string {names!r}; put it in a list"
        )
    if isinstance(names, set | frozenset):
        raise ClassNameError(f"{argument}: a set has no order; give a list of the class names in order of their ids")
    if not isinstance(names, Iterable):
        hint = "; give its .names" if hasattr(names, "names") else "; give a list"
        raise ClassNameError(f"{argument}: expected a sequence of class names, got {type(names).__name__}{hint}")
    names = tuple(names)
    wrong = [name for name in names if not isinstance(name, str) or not name]
    if wrong:
        raise ClassNameError(
            f"{argument}: class names are non-empty strings, got {wrong[0]!r:.80}; pass names, not ids"
        )
    if not names:
        raise ClassNameError(f"{argument}: expected at least one class name, got none")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ClassNameError(f"{argument}: {listed(twice)} given twice; every class needs a name of its own")
    return tuple(map(str, names))  # numpy's strings as plain ones


def _by_id(mapping: Mapping[Any, Any], argument: str) -> list[Any]:
    """The names of {id: name} or {name: id} in the order of the ids."""
    if mapping and all(_is_id(value) for value in mapping.values()):
        pairs = [(int(number), name) for name, number in mapping.items()]
    elif all(_is_id(key) or (isinstance(key, str) and key.isdecimal() and len(key) < 10) for key in mapping):
        pairs = [(int(key), name) for key, name in mapping.items()]
    else:
        raise ClassNameError(
            f"{argument}: a mapping must be {{id: name}} or {{name: id}}, got {shortened(dict(mapping))}; "
            "or give a list of the names in order"
        )
    found = sorted(number for number, _ in pairs)
    if found != list(range(len(pairs))):
        twice = [number for number, count in Counter(found).items() if count > 1]
        missing = [number for number in range(len(pairs)) if number not in set(found)]
        reason = f"{twice[0]} appears twice" if twice else f"{missing[0]} is missing"
        raise ClassNameError(f"{argument}: the ids of {len(pairs)} classes are 0 to {len(pairs) - 1}; {reason}")
    return [name for _, name in sorted(pairs, key=lambda pair: pair[0])]


def _is_id(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def class_ids(names: Iterable[str], known: Sequence[str], argument: str = "classes") -> list[int]:
    """Return the index of each name in `known`, in the order of `names`.

    Raises:
        ClassNameError: a name is given twice or is unknown; the message lists the known ones.
    """
    place = {name: index for index, name in enumerate(known)}
    names = check_class_names(names, argument)
    for name in names:
        if name not in place:
            raise ClassNameError(f"{argument}: {unknown_name(name, known)}")
    return [place[name] for name in names]


def parse_classes(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Parse a list of classes from the command line.

    Items are separated by commas. An item is a name in `known`, which may itself contain commas, or else an index or a
    range of indices into `known`, both ends included. If any name is a whole number, numbers and ranges mean names,
    never indices: among the classes 5 to 9, "4" is unknown, not the last class.

    Raises:
        ClassNameError: an item is neither, a class is given twice, or the list is empty; the message lists the classes.

    >>> parse_classes("0-1,dog", ["cat", "cow", "dog"])
    ('cat', 'cow', 'dog')
    """
    parts, names = text.split(","), set(known)
    reach = 1 + max((name.count(",") for name in known), default=0)
    found: list[str] = []
    while parts:
        sizes = range(min(reach, len(parts)), 0, -1)
        size = next((size for size in sizes if ",".join(parts[:size]).strip() in names), 1)
        item = ",".join(parts[:size]).strip()
        del parts[:size]
        if item in names:
            found.append(item)
        elif span := re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", item):
            found.extend(_span(item, int(span[1]), int(span[2] or span[1]), known))
        elif item:
            raise ClassNameError(f"classes: {unknown_name(item, known)}")
    return check_class_names(found, "classes")


def _span(item: str, first: int, last: int, known: Sequence[str]) -> Sequence[str]:
    """Return the classes from number `first` to number `last`; `item` is the text that they were parsed from."""
    if any(name.isdecimal() for name in known):
        wanted = [str(number) for number in range(first, min(last, first + len(known)) + 1)] or [item]
        missing = [name for name in wanted if name not in known]
        if missing:
            raise ClassNameError(f"classes: {unknown_name(missing[0], known)}")
        return wanted
    if not first <= last < len(known):
        raise ClassNameError(
            f"classes: {item!r} is not a range within 0-{len(known) - 1}; the classes are {listed(known)}"
        )
    return known[first : last + 1]


def unknown_name(name: str, known: Sequence[str], what: str = "class") -> str:
    """The message for an unknown name: the most similar name, and all known ones."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"there is no {what} {name!r}{hint}; there are {listed(known)}"


def listed(names: Sequence[str], limit: int = 20) -> str:
    """Join names for a message; if there are more than `limit`, only the first ones and the total number."""
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "none"
