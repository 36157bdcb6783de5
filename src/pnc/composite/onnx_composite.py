"""A composite in onnxruntime, without PyTorch: runs a split export, to which clones are attached and detached."""

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pnc.foundation.errors import FileFormatError, InputError, MismatchError

METADATA_KEY = "pnc"
"""Key of the ONNX metadata that holds the JSON facts."""

FORMAT = "pnc-export"
"""Identifies these facts."""

VERSION = 1
"""Version of the format; files with a newer one are refused."""

IMAGES, LOGITS = "images", "logits"
"""Names of the input and of the logits of whole networks and trunks."""

Array = NDArray[Any]

_KEYS = {
    "trunk": ("base_classes", "input_shape", "target", "base_priority"),
    "clone": ("base_classes", "target", "name", "classes"),
}
"""The facts that are read from each kind of file."""


@dataclass(frozen=True, eq=False)
class _Part:
    """One file: its session and its facts."""

    session: Any
    facts: Mapping[str, Any]


class OnnxComposite:
    """A target and its clones from the files of `export_split`; needs numpy and onnxruntime, not PyTorch.

    A call returns the logits of the exported composite, up to rounding: the target's, then each clone's in the order of
    attachment. Each call reads one set of clones, so other threads may call while one attaches or detaches.

    Args:
        trunk: The file `trunk.onnx`, or its bytes.
        clones: Clone files to attach, or their bytes.
        providers: Execution providers of onnxruntime, in order of preference.
        options: An `onnxruntime.SessionOptions` for all sessions, for example to set the number of threads.
    Raises:
        InputError: onnxruntime is not installed or lacks a provider, or a clone or class is attached already.
        FileFormatError: a file is missing or not such a part of a split export.
        MismatchError: a clone was exported for another target.

    >>> onnx_net = pnc.OnnxComposite("parts/trunk.onnx", "parts/cat_dog.onnx")  # doctest: +SKIP
    >>> onnx_net.classes  # doctest: +SKIP
    ('ant', 'bee', 'cat', 'dog')
    """

    def __init__(
        self,
        trunk: str | Path | bytes,
        *clones: str | Path | bytes,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        options: Any = None,
    ) -> None:
        self._providers, self._options = providers, options
        self._trunk = self._open(trunk, "trunk")
        self._outputs = [output.name for output in self._trunk.session.get_outputs()]
        self._parts: tuple[
            _Part, ...
        ] = ()  # replaced, never changed in place, as a call in another thread may be reading it
        self.base_priority = self._trunk.facts["base_priority"]
        for clone in clones:
            self.attach(clone)

    @property
    def base_priority(self) -> float:
        """Nats subtracted from all new logits; initially that of the exported composite."""
        return self._base_priority

    @base_priority.setter
    def base_priority(self, nats: float) -> None:
        is_number = isinstance(nats, int | float) and not isinstance(nats, bool)
        if not is_number or not abs(nats) <= float(np.finfo(np.float32).max):
            raise InputError(f"base_priority: expected a finite number; got {nats!r:.100}")
        self._base_priority = float(nats)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the logits that a call returns now, in order."""
        return *self.base_classes, *(name for part in self._parts for name in part.facts["classes"])

    @property
    def base_classes(self) -> tuple[str, ...]:
        """Names of the target's own logits."""
        return tuple(self._trunk.facts["base_classes"])

    @property
    def clones(self) -> tuple[str, ...]:
        """Names of the attached clones, in the order of their logits."""
        return tuple(part.facts["name"] for part in self._parts)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one image, (C, H, W)."""
        channels, height, width = self._trunk.facts["input_shape"]
        return channels, height, width

    def attach(self, clone: str | Path | bytes) -> str:
        """Attach another clone.

        Args:
            clone: A file of `export_split`, or its bytes.
        Returns:
            Its name.
        Raises:
            FileFormatError, MismatchError, InputError: as for the class; nothing has changed then.
        """
        part = self._open(clone, "clone")
        facts, name = part.facts, part.facts["name"]
        if (facts["target"], facts["base_classes"]) != (self._trunk.facts["target"], self._trunk.facts["base_classes"]):
            raise MismatchError(f"clone {name!r} was exported for another target; export it with this one's trunk")
        lacking = [one.name for one in part.session.get_inputs() if one.name not in (IMAGES, *self._outputs)]
        if lacking:
            raise MismatchError(
                f"clone {name!r} reads {lacking[0]!r}, which this trunk does not output; export all clones together "
                "and use that trunk"
            )
        if name in self.clones:
            raise InputError(f"clone: one named {name!r} is attached already; detach it first")
        clash = [one for one in facts["classes"] if one in self.classes]
        if clash:
            raise InputError(
                f"clone {name!r}: class {clash[0]!r} is attached already; rename it and export the clone again"
            )
        self._parts = (*self._parts, part)
        return str(name)

    def detach(self, name: str) -> None:
        """Detach a clone; the logits of the others do not change.

        Raises:
            InputError: no clone of that name is attached.
        """
        if name not in self.clones:
            raise InputError(f"name: there is no clone {name!r}; attached: {', '.join(self.clones) or 'none'}")
        self._parts = tuple(part for part in self._parts if part.facts["name"] != name)

    def __call__(self, images: Array) -> Array:
        """Compute logits (B, K_base + K_new), float32, for images (B, C, H, W), float32.

        Raises:
            InputError: the images have another shape or dtype.
        """
        if not isinstance(images, np.ndarray) or images.dtype != np.float32 or images.shape[1:] != self.input_shape:
            came = f"{images.shape} {images.dtype}" if isinstance(images, np.ndarray) else type(images).__name__
            raise InputError(f"images: expected float32, (B, {', '.join(map(str, self.input_shape))}); got {came}")
        parts = self._parts
        seen = dict(zip(self._outputs, self._trunk.session.run(self._outputs, {IMAGES: images}), strict=True))
        tensors = {**seen, IMAGES: images}
        new = [
            part.session.run(None, {one.name: tensors[one.name] for one in part.session.get_inputs()})[0]
            for part in parts
        ]
        return np.concatenate([seen[LOGITS], *(one - np.float32(self.base_priority) for one in new)], 1)

    def _open(self, file: str | Path | bytes, kind: str) -> _Part:
        """Open a file and check that it is of that kind."""
        if not isinstance(file, bytes) and not Path(file).is_file():
            raise FileFormatError(f"{kind}: there is no file {file}")
        session = open_session(file, self._providers, self._options)
        return _Part(session, _facts_of(session, file, kind))


def open_session(file: str | Path | bytes, providers: Sequence[str], options: Any = None) -> Any:
    """Open an onnxruntime session for a file or its bytes.

    Raises:
        InputError: onnxruntime is not installed or lacks a provider, or these are no options of it.
        FileFormatError: onnxruntime cannot read it.
    """
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise InputError('the package onnxruntime is needed for this; pip install "pnc[export]"') from error
    known = runtime.get_available_providers()
    for one in [providers] if isinstance(providers, str) else providers:
        if isinstance(providers, str) or one not in known:
            raise InputError(f"providers: expected a list of some of {', '.join(known)}; got {providers!r:.100}")
    if not isinstance(options, runtime.SessionOptions | None):
        raise InputError(f"options: expected an onnxruntime.SessionOptions; got {type(options).__name__}")
    if options is None:
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors only; it warns of every constant that it folds
    try:
        return runtime.InferenceSession(file if isinstance(file, bytes) else str(file), options, list(providers))
    except Exception as error:  # noqa: BLE001 - onnxruntime's errors have no common base class
        raise FileFormatError(f"onnxruntime cannot read {_name(file)}: {str(error).splitlines()[0]}") from error


def clone_in(file: Path) -> str | None:
    """Name of the clone in a file of a split export; None if it is something else."""
    try:
        return str(_facts_of(open_session(file, ("CPUExecutionProvider",)), file, "clone")["name"])
    except FileFormatError:
        return None


def _facts_of(session: Any, file: str | Path | bytes, kind: str) -> dict[str, Any]:
    """The facts in a file, checked to be of that kind and complete."""
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        raise FileFormatError(f"{kind}: {_name(file)} was not written by pnc.export_split")
    damaged = FileFormatError(f"{kind}: {_name(file)}: its metadata is damaged; export it again")
    try:
        facts = json.loads(text)
        version, found = int(facts["version"]), facts.get("kind")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged from error
    if version > VERSION:
        raise FileFormatError(
            f"{kind}: {_name(file)} has version {version} of its format; this pnc reads up to {VERSION}"
        )
    if found != kind:
        raise FileFormatError(f"{kind}: expected a {kind} of pnc.export_split; {_name(file)} is a {found}")
    if any(key not in facts for key in _KEYS[kind]):
        raise damaged
    return {key: facts[key] for key in _KEYS[kind]}


def _name(file: str | Path | bytes) -> str:
    return f"the given {len(file)} bytes" if isinstance(file, bytes) else str(file)
