"""Names of splits in folders and file names: the common words for training and test, in any case."""

from collections.abc import Mapping, Sequence
from typing import Literal

from pnc.foundation.errors import InputError

Split = Literal["train", "test"]

WORDS: Mapping[Split, Sequence[str]] = {
    "train": ("train", "training"),
    "test": ("test", "testing", "validation", "valid", "val"),
}
"""The words for each split, the preferred one first."""


def other(split: Split) -> Split:
    """The other of the two splits."""
    return "test" if split == "train" else "train"


def words_of(split: Split, options: Mapping[str, str]) -> Sequence[str]:
    """The possible names of a split: the one given in its option, else the common words."""
    return (options[split],) if split in options else WORDS[split]


def find(split: Split, options: Mapping[str, str], names: Sequence[str], where: str) -> str | None:
    """Return the name in `names` that means a split, in any case; None if there is none.

    Raises:
        InputError: several such names differ only in case.
    """
    for word in words_of(split, options):
        if split in options and word in names:
            return word
        found = [name for name in names if name.casefold() == word.casefold()]
        if len(found) > 1:
            raise InputError(
                f"spec: {where} has {' and '.join(sorted(found))}; choose with {split}=NAME, or rename one"
            )
        if found:
            return found[0]
    return None
