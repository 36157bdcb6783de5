"""Entries of a zoo as data: a JSON file that says what a network is, beside its weights."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pnc.data.normalization import Normalization
from pnc.foundation.class_names import check_class_names, is_name
from pnc.foundation.errors import FileFormatError, InputError, PNCError
from pnc.foundation.file_writing import path_text, write_file
from pnc.models.preprocessing import checked_shape, shape_text

FORMAT = "pnc-zoo-entry"
VERSION = 1
MAX_BYTES = 1 << 22
"""Largest entry file that is read: enough for 20,000 class names."""
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"


@dataclass(frozen=True)
class Entry:
    """What is known about a network of a zoo without reading its weights.

    Attributes:
        name: Of the entry: letters, digits, ".", "_" and "-".
        spec: How the network is built, as for `load_model`.
        classes: Names of its outputs, in order.
        input_shape: (C, H, W) of the images that it takes.
        fingerprint: Digest of its structure and weights.
        n_params: Number of its parameters.
        preprocessing: Mean and standard deviation of images in [0, 1], one number or one for each channel; None if the
            network has its own.
        licence: Identifier, such as "mit"; None if unknown.
        test_accuracy: Accuracy on its own test images, as its weights file says; None if unknown.
    """

    name: str
    spec: str
    classes: tuple[str, ...]
    input_shape: tuple[int, int, int]
    fingerprint: str
    n_params: int
    preprocessing: Normalization | None = None
    licence: str | None = None
    test_accuracy: float | None = None

    def __repr__(self) -> str:
        return f"Entry({self.name}: {self.spec}, images {shape_text(self.input_shape)} to {len(self.classes)} classes)"

    @property
    def runs_code(self) -> bool:
        """Whether building the network runs code that the spec names."""
        return self.spec.startswith("py:")

    def facts(self) -> dict[str, Any]:
        """Return the entry as JSON values."""
        own = {key: value for key, value in vars(self).items() if key != "preprocessing"}
        made = None if self.preprocessing is None else vars(self.preprocessing)
        return {"format": FORMAT, "version": VERSION, **own, "preprocessing": made}


def check_entry_name(name: object) -> str:
    """Return the name of an entry, which becomes a file name, after checking it."""
    if not isinstance(name, str) or not re.fullmatch(_NAME, name):
        raise InputError(
            f"name: expected letters, digits, '.', '_' and '-', 100 at most, to name a file; got {name!r:.120}"
        )
    return name


def write_entry(path: Path, entry: Entry) -> None:
    """Write an entry as JSON, completely or not at all."""
    write_file(path, json.dumps(entry.facts(), indent=2) + "\n")


def read_entry(path: Path) -> Entry:
    """Read an entry and check every field.

    Raises:
        FileFormatError: the file is damaged, of another format, or of a newer version.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        facts = json.loads(raw.decode()) if len(raw) <= MAX_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(
            f"zoo: {path_text(path)} cannot be read as JSON ({error}); remove the entry and add it again"
        ) from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise FileFormatError(f"zoo: {path_text(path)} is no entry of a zoo; move it away")
    if facts.get("version") != VERSION:
        raise FileFormatError(
            f"zoo: {path_text(path)} has format version {facts.get('version')!r:.80}, this pnc reads {VERSION}; "
            "use a matching pnc"
        )
    try:
        return _entry(facts, path.stem)
    except (PNCError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"zoo: {path_text(path)} is damaged ({error}); remove the entry and add it again"
        ) from error


def _entry(facts: Mapping[str, Any], name: str) -> Entry:
    if facts["name"] != name:
        raise ValueError(f"it calls itself {facts['name']!r:.120}")
    texts = [facts["spec"], facts["fingerprint"], *([] if facts["licence"] is None else [facts["licence"]])]
    if not all(map(is_name, texts)):
        raise ValueError("spec, fingerprint or licence is not printable text")
    made, accuracy, n_params = facts["preprocessing"], facts["test_accuracy"], facts["n_params"]
    if type(n_params) is not int or not (accuracy is None or (isinstance(accuracy, float) and 0 <= accuracy <= 1)):
        raise ValueError("n_params or test_accuracy is out of range")
    return Entry(
        name=check_entry_name(name),
        spec=facts["spec"],
        classes=check_class_names(facts["classes"], "classes"),
        input_shape=checked_shape(facts["input_shape"]),
        fingerprint=facts["fingerprint"],
        n_params=n_params,
        preprocessing=None if made is None else Normalization(made["mean"], made["std"]),
        licence=facts["licence"],
        test_accuracy=accuracy,
    )
