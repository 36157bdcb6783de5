"""The metadata of a clone file as data, with every field checked.

The rules are those of docs/file-format.md and its JSON schema in plain code: keys, types, lengths of texts, bounds of
numbers, and fields that must agree.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, Literal, Never, cast, get_args

from pnc.clones.cut_facts import cut_facts, read_cut
from pnc.clones.heads import DiscriminantHead, SourceHead, StackedHead
from pnc.clones.metadata_object import Fail, MetadataObject
from pnc.clones.part_structure import PART_KEYS, PartStructure, read_structure
from pnc.data.image_store import MAX_IMAGE
from pnc.foundation.class_names import is_name
from pnc.foundation.errors import FileFormatError, InputError
from pnc.foundation.fingerprints import Fingerprint
from pnc.graph.cut_points import CutPoint
from pnc.graph.forward_prints import N_ANSWERS, N_IMAGES, ForwardPrint

FORMAT = "pnc-clone"
VERSION = 3
"""Latest version; earlier ones can be read."""
PART_VERSION = 3
"""Version of files that hold the structure of the source's part; all others are written as the version before."""
FileKind = Literal["thin", "full"]

_MAX_COUNT = 1 << 62
_HEADS = (StackedHead.kind, SourceHead.kind, DiscriminantHead.kind)
_KEYS = (
    "base_classes",
    "classes",
    "format",
    "head",
    "kind",
    "name",
    "position",
    "recipe",
    "source",
    "target",
    "version",
)
_RECIPE_DEPTH = 4
_ENTRY, _HEX_DIGITS = 16, frozenset("0123456789abcdef")
_OPERATION, _MAX_ANSWER = re.compile(r"\w{1,100}:[0-9a-f]{4}", re.ASCII), 1e39


@dataclass(frozen=True)
class Manifest:
    """Everything in a clone file except its tensors; the fields are those of `pnc.Clone`."""

    kind: FileKind
    name: str
    classes: tuple[str, ...]
    base_classes: tuple[str, ...]
    target_cut: CutPoint
    source_cut: CutPoint
    target_features: CutPoint
    rectify: bool
    head: str
    source: Fingerprint
    target: Fingerprint
    input_shape: tuple[int, ...]
    recipe: Mapping[str, Any]
    source_forward: ForwardPrint | None = None
    target_forward: ForwardPrint | None = None
    part: PartStructure | None = None
    version: int = PART_VERSION - 1

    def facts(self) -> dict[str, Any]:
        """Return the metadata as JSON values.

        Raises:
            InputError: no reader would accept a field, such as a class name with a line break.
        """
        facts = {
            "format": FORMAT,
            "version": self.version,
            "kind": self.kind,
            "name": self.name,
            "classes": list(self.classes),
            "base_classes": list(self.base_classes),
            "position": {
                "target": cut_facts(self.target_cut),
                "source": cut_facts(self.source_cut),
                "target_features": cut_facts(self.target_features),
                "rectify": self.rectify,
            },
            "head": self.head,
            "source": _network_facts(self.source, self.input_shape, self.source_forward),
            "target": _network_facts(self.target, self.input_shape, self.target_forward),
            "recipe": dict(self.recipe),
        }
        if self.part is not None:
            facts["part"] = self.part.facts()
        _parsed(facts, _cannot_be_saved)
        return facts


def read_manifest(path: str | Path, facts: Mapping[str, Any]) -> Manifest:
    """Check the metadata of a clone file.

    Args:
        path: Path of the file, for messages.
        facts: Its metadata.
    Raises:
        FileFormatError: the file is not a clone file or has a newer version of the format; or a field is missing,
            unknown or out of bounds.
    """
    if facts.get("format") != FORMAT:
        raise FileFormatError(
            f"{path} is not a clone file: its format is {shortened(facts.get('format'))}, expected {FORMAT!r}"
        )
    version = facts.get("version")
    if type(version) is int and version > VERSION:
        raise FileFormatError(
            f"{path} has format version {shortened(version)}; this pnc reads up to {VERSION}: install a newer one"
        )

    def damaged(reason: str) -> Never:
        raise FileFormatError(f"the metadata of {path} is damaged: {reason}")

    return _parsed(facts, damaged)


def _cannot_be_saved(reason: str) -> Never:
    raise InputError(f"clone: {reason}, so it cannot be saved; make the clone with other names")


def _network_facts(found: Fingerprint, input_shape: Sequence[int], forward: ForwardPrint | None) -> dict[str, Any]:
    facts = {**dataclasses.asdict(found), "tensors": "".join(found.tensors), "input_shape": list(input_shape)}
    if forward is not None:
        operations = " ".join(forward.operations)
        facts["forward"] = {"answers": list(forward.answers), "digest": forward.digest, "operations": operations}
    return facts


def _parsed(facts: Any, fail: Fail) -> Manifest:
    whole = MetadataObject(facts, "", _KEYS, fail, optional="part")
    version = whole.number("version", 1, VERSION, whole=True)
    kind = cast(FileKind, whole.choice("kind", get_args(FileKind)))
    if ("part" in whole.values) != (version == PART_VERSION):
        fail(f"part is {'unknown' if 'part' in whole.values else 'missing'} in version {version}")
    if version == PART_VERSION and kind != "full":
        fail(f"kind: expected full, as in all files of version {version}, got {kind}")
    classes, base_classes = whole.names("classes"), whole.names("base_classes")
    if len({*classes, *base_classes}) < len(classes) + len(base_classes):
        fail("classes, base_classes: a name occurs twice")
    position = whole.object("position", ("rectify", "source", "target", "target_features"))
    keys = "input_shape", "structure", "tensors", "weights"
    source, target = (whole.object(key, keys, optional="forward") for key in _NETWORKS)
    shape = target.sizes("input_shape", 3)
    if source.sizes("input_shape", 3) != shape or math.prod(shape) > MAX_IMAGE:
        fail(f"input_shape: source and target must take the same images, of {MAX_IMAGE} values at most")
    return Manifest(
        kind=kind,
        name=whole.text("name"),
        classes=classes,
        base_classes=base_classes,
        target_cut=read_cut(position, "target"),
        source_cut=read_cut(position, "source"),
        target_features=read_cut(position, "target_features"),
        rectify=position.flag("rectify"),
        head=whole.choice("head", _HEADS),
        source=_fingerprint(source),
        target=_fingerprint(target),
        input_shape=shape,
        recipe=_recipe(whole, fail),
        version=version,
        part=read_structure(whole.object("part", PART_KEYS), fail) if "part" in whole.values else None,
        source_forward=_forward(source),
        target_forward=_forward(target),
    )


_NETWORKS = ("source", "target")


def _fingerprint(facts: MetadataObject) -> Fingerprint:
    structure, weights, entries = (facts.get(key, str, "a text") for key in ("structure", "weights", "tensors"))
    for key, value, n_digits in (("structure", structure, 32), ("weights", weights, 32), ("tensors", entries, None)):
        if (len(value) % _ENTRY if n_digits is None else len(value) != n_digits) or not set(value) <= _HEX_DIGITS:
            facts.refuse(key, f"{n_digits or f'a multiple of {_ENTRY}'} hex digits", value)
    return Fingerprint(structure, weights, tuple(entries[i : i + _ENTRY] for i in range(0, len(entries), _ENTRY)))


def _forward(network: MetadataObject) -> ForwardPrint | None:
    """Read a network's forward print; files of earlier versions of pnc have none."""
    if "forward" not in network.values:
        return None
    facts = network.object("forward", ("answers", "digest", "operations"))
    digest, operations = (facts.get(key, str, "a text") for key in ("digest", "operations"))
    if len(digest) != 32 or not set(digest) <= _HEX_DIGITS:
        facts.refuse("digest", "32 hex digits", digest)
    if operations and not all(map(_OPERATION.fullmatch, operations.split(" "))):
        facts.refuse("operations", "names with four hex digits each, such as relu:0a1b", operations)
    answers = facts.get("answers", list, "a list of numbers")
    if not 1 <= len(answers) <= N_IMAGES * N_ANSWERS or not all(
        type(one) in (int, float) and abs(one) <= _MAX_ANSWER for one in answers
    ):
        facts.refuse("answers", f"1 to {N_IMAGES * N_ANSWERS} finite numbers", answers)
    return ForwardPrint(tuple(operations.split(" ")) if operations else (), digest, tuple(map(float, answers)))


def _recipe(whole: MetadataObject, fail: Fail) -> dict[str, Any]:
    """Read the recipe: what `pnc inspect` shows is required; other plain values are allowed."""
    facts = whole.object("recipe", None)
    for key, low, high in (("score", 0, 1), ("standard_error", 0, 1), ("macs_share", 0, 1e9), ("density", 0, 1)):
        facts.number(key, low, high)
    for key in ("n_new_samples", "n_base_samples"):
        facts.number(key, 0, _MAX_COUNT, whole=True)
    for key in ("base_score", "new_score", "expected_base_drop"):
        if facts.values.get(key) is not None:
            facts.number(key, 0, 1)
    for key in ("n_background_samples", "n_folds"):
        if key in facts.values:
            facts.number(key, 0, _MAX_COUNT, whole=True)
    if "max_base_drop" in facts.values:
        facts.number("max_base_drop", 0, 1)
        facts.number("base_priority", -1e9, 1e9)
    doubts = facts.values.get("doubts", [])
    if not isinstance(doubts, list | tuple) or not all(map(is_name, doubts)):
        facts.refuse("doubts", "a list of texts", doubts)
    for key, value in facts.values.items():
        if not _is_plain(key, 0) or not _is_plain(value, _RECIPE_DEPTH):
            fail(f"recipe: {shortened(key)} has the value {shortened(value)}")
    return dict(facts.values)


def _is_plain(value: Any, depth: int) -> bool:
    """Whether a value is a finite number, a short printable text, or a shallow collection of these."""
    if isinstance(value, str):
        return value == "" or is_name(value)
    if isinstance(value, list | tuple):
        return depth > 0 and all(_is_plain(part, depth - 1) for part in value)
    if isinstance(value, Mapping):
        return depth > 0 and all(_is_plain(k, 0) and _is_plain(v, depth - 1) for k, v in value.items())
    return value is None or (
        isinstance(value, int | float) and abs(value) <= (_MAX_COUNT if isinstance(value, float) else 2**63)
    )
