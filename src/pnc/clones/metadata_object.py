"""An object of a file's metadata, read key by key: each value has the requested type, or one error gives the reason."""

from collections.abc import Callable, Mapping, Sequence
from reprlib import repr as shortened
from typing import Any, Never, cast

from pnc.foundation.class_names import MAX_TEXT, is_name

Fail = Callable[[str], Never]
"""Raises the error for a reason."""

MAX_SIZE, MAX_COUNT = 1 << 20, 1 << 62
"""Largest size of a dim of images and cuts, and largest number of anything."""


class MetadataObject:
    """An object of the metadata, read key by key: each value has the requested type, or `fail` raises the reason.

    Args:
        values: The value that should be an object.
        label: Its own key, for messages; empty for the top level.
        keys: The keys that it must have, and no others; None allows any.
        fail: Raises the error.
        optional: One more key that it may have.
    """

    def __init__(
        self, values: Any, label: str, keys: Sequence[str] | None, fail: Fail, optional: str | None = None
    ) -> None:
        self.values, self._label, self._fail = values, label, fail
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            fail(f"{label or 'all'}: expected an object, got {shortened(values)}")
        for key in sorted(set(keys) ^ (values.keys() - {optional}) if keys is not None else ()):
            fail(f"{self._full(key)[:MAX_TEXT]} is {'unknown' if key in values else 'missing'}")

    def refuse(self, key: str, expected: str, got: Any) -> Never:
        """Raise the error for a key: what was expected, what came."""
        self._fail(f"{self._full(key)}: expected {expected}, got {shortened(got)}")

    def fail(self, reason: str) -> Never:
        """Raise the error for the whole object."""
        self._fail(f"{self._label}: {reason}")

    def _full(self, key: str) -> str:
        return f"{self._label}.{key}" if self._label else key

    def get(self, key: str, wanted: type, words: str) -> Any:
        """Return the value at a key, which must have exactly this type; `words` name the type in the message."""
        if type(self.values.get(key)) is not wanted:
            self.refuse(key, words, self.values.get(key))
        return self.values[key]

    def object(self, key: str, keys: Sequence[str] | None, optional: str | None = None) -> "MetadataObject":
        """Return an object with exactly these keys, or any with None, and perhaps an optional one."""
        return MetadataObject(self.values.get(key), self._full(key), keys, self._fail, optional)

    def flag(self, key: str) -> bool:
        """Return true or false."""
        return bool(self.get(key, bool, "true or false"))

    def text(self, key: str, least: int = 1) -> str:
        """Return a printable text of `least` to `MAX_TEXT` characters."""
        value = str(self.get(key, str, "a text"))
        if not (is_name(value) or (value == "" and least == 0)):
            self.refuse(key, f"a printable text of {least} to {MAX_TEXT} characters", value)
        return value

    def names(self, key: str) -> tuple[str, ...]:
        """Return at least one printable name, without duplicates."""
        values = self.get(key, list, "a list of names")
        wrong = [value for value in values if not is_name(value)]
        if wrong:
            self.refuse(key, f"printable names of 1 to {MAX_TEXT} characters", wrong[0])
        if not values or len(set(values)) < len(values):
            self.refuse(key, "at least one name, and no duplicates", values)
        return tuple(values)

    def choice(self, key: str, options: Sequence[str]) -> str:
        """Return one of the options."""
        value = self.values.get(key)
        if not isinstance(value, str) or value not in options:
            self.refuse(key, f"one of {', '.join(options)}", value)
        return value

    def number(self, key: str, low: float, high: float, whole: bool = False) -> Any:
        """Return a number from `low` to `high`, both included."""
        value = self.values.get(key)
        if type(value) not in ((int,) if whole else (int, float)) or not low <= cast(float, value) <= high:
            self.refuse(key, f"a {'whole ' if whole else ''}number from {low:g} to {high:g}", value)
        return value

    def sizes(self, key: str, length: int) -> tuple[int, ...]:
        """Return a list of `length` sizes."""
        values = self.get(key, list, "a list")
        if len(values) != length or not all(type(size) is int and 1 <= size <= MAX_SIZE for size in values):
            self.refuse(key, f"{length} whole numbers from 1 to {MAX_SIZE}", values)
        return tuple(values)
