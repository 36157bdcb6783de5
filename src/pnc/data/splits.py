"""How data calls its splits: the words for training and test, in any case, as folders and as names of files."""

from collections.abc import Mapping, Sequence
from typing import Literal

from pnc.foundation.errors import InputError

Split = Literal["train", "test"]

WORDS: Mapping[Split, Sequence[str]] = {
    "train": ("train", "training"),
    "test": ("test", "testing", "validation", "valid", "val"),
}
"""Of each split, best first."""


def other(split: Split) -> Split:
    """The split that is not this one."""
    return "test" if split == "train" else "train"


def words_of(split: Split, options: Mapping[str, str]) -> Sequence[str]:
    """How a split may be called: as the option of its name says, else by the common words."""
    return (options[split],) if split in options else WORDS[split]


def find(split: Split, options: Mapping[str, str], there: Sequence[str], where: str) -> str | None:
    """Return what a split is called among some names, in any case; None where none is it.

    Raises:
        InputError: several names differ by case alone.
    """
    for word in words_of(split, options):
        if split in options and word in there:
            return word
        found = [name for name in there if name.casefold() == word.casefold()]
        if len(found) > 1:
            raise InputError(
                f"spec: {where} has {' and '.join(sorted(found))}; say which is meant as {split}=NAME, or rename one"
            )
        if found:
            return found[0]
    return None
