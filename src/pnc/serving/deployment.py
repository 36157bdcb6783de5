"""A target with clones that come and go: the composite behind a server, and the fused form that it serves.

Changes run one at a time, off the event loop. Each makes a new fused form from the composite and then replaces the
served set at once, so that a batch uses the old set or the new one. If anything fails, the old set stays.
"""

import gc
import linecache
import logging
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from pnc.clones.clone import Clone, check_name
from pnc.clones.clone_file import inspect
from pnc.composite.composite import Composite
from pnc.data.image_files import PIL_MODES
from pnc.data.normalization import Normalization
from pnc.foundation.errors import InputError
from pnc.foundation.fingerprints import KnownFingerprint
from pnc.foundation.network_state import like_images
from pnc.serving.clone_sources import CloneSources
from pnc.serving.refusals import CONFLICT, UNKNOWN, Refusal
from pnc.serving.served_set import ServedSet
from pnc.serving.state_folder import StateFolder

Owner = Literal["http", "folder", "command"]
"""Where a clone came from: a request, a file of the watched folder, or the command line."""

_LOG = logging.getLogger(__name__)
_WHERE = {"folder": "remove its file from the watched folder", "command": "leave it out of the command"}


@dataclass(frozen=True, eq=False)
class Target:
    """The network that is served.

    Attributes:
        module: The network.
        classes: Names of its outputs.
        input_shape: (C, H, W), with 1 or 3 channels.
        normalization: What its own loader does to images in [0, 1]; None for nothing.
    """

    module: nn.Module
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    normalization: Normalization | None = None


class Deployment:
    """What a server serves.

    Args:
        target: The network, which is not changed.
        sources: Networks that clones were made from, with what messages call them.
        state: Folder that keeps the clones which come over HTTP; None keeps them in memory only.
    Raises:
        RecordingError: the target cannot be recorded.
        PNCError: a clone of the state folder cannot be attached.
    """

    def __init__(
        self, target: Target, sources: Sequence[tuple[str, nn.Module]] = (), state: Path | None = None
    ) -> None:
        if target.input_shape[0] not in PIL_MODES:
            raise InputError(f"target: images have 1 or 3 channels, this network takes {target.input_shape[0]}")
        self.target = target
        self._sources = CloneSources(sources)
        self._net = Composite(target.module, target.classes, target.input_shape, KnownFingerprint())
        self._owners: dict[str, Owner] = {}
        self._lock = threading.Lock()
        self._state = None if state is None else StateFolder(state)
        for name, file in ({} if self._state is None else self._state.files).items():
            self._net.attach(self._sources.load(file, name, target.input_shape))
            self._owners[name] = "http"
        self.current = self._made(0)
        """The set to serve now; replaced, never changed."""

    @property
    def device(self) -> torch.device:
        """Where the target is."""
        return like_images(self.target.module).device

    @property
    def owners(self) -> Mapping[str, Owner]:
        """Where each clone came from."""
        return self._owners

    def attach(self, name: str, content: bytes, owner: Owner = "http") -> bool:
        """Attach a clone, or replace the one of that name.

        Args:
            name: Its name here.
            content: Its file.
            owner: Who may replace or detach it: a clone of the watched folder follows its file.
        Returns:
            Whether the name is new.
        Raises:
            Refusal: a clone of that name came from somewhere else.
            PNCError: the file is damaged, needs another source, is for another target, or clashes with another clone.
        """
        check_name(name)
        with self._lock:
            old_owner = self._owners.get(name)
            self._check_owner(name, owner)
            with tempfile.TemporaryDirectory(prefix="pnc-serve-") as folder:
                file = Path(folder) / "clone.safetensors"
                file.write_bytes(content)
                clone = self._sources.load(file, name, self.target.input_shape)
            old = self._net.detach(name) if old_owner is not None else None
            try:
                self._net.attach(clone)
                served = self._made(self.current.generation + 1)
                if owner == "http" and self._state is not None:
                    self._state.put(name, content)
            except BaseException:
                self._restore(name, old)
                raise
            self._owners = {**self._owners, name: owner}
            self._serve(served)
        return old_owner is None

    def attach_from(self, path: Path) -> None:
        """Attach a clone of the command line under its own name, unless the state folder has one of that name.

        Raises:
            PNCError: as `attach`.
        """
        name = inspect(path)["name"]
        if name not in self._owners:
            self.attach(name, path.read_bytes(), "command")

    def detach(self, name: str, owner: Owner = "http") -> None:
        """Detach a clone.

        Raises:
            Refusal: 404 if there is none of that name, 409 if it came from somewhere else.
        """
        with self._lock:
            if name not in self._owners:
                raise Refusal(UNKNOWN, f"no clone {name!r:.200} is attached")
            self._check_owner(name, owner)
            old = self._net.detach(name)
            try:
                served = self._made(self.current.generation + 1)
                if self._owners[name] == "http" and self._state is not None:
                    self._state.remove(name)
            except BaseException:
                self._restore(name, old)
                raise
            self._owners = {other: kept for other, kept in self._owners.items() if other != name}
            self._serve(served)

    def close(self) -> None:
        """Let another server use the state folder."""
        with self._lock:
            if self._state is not None:
                self._state.close()

    def _check_owner(self, name: str, owner: Owner) -> None:
        found = self._owners.get(name, owner)
        if found != owner and not (owner == "http" and found == "command"):
            way_out = _WHERE.get(found, "detach it over HTTP")
            raise Refusal(CONFLICT, f"clone {name!r:.200} came from another place ({found}); {way_out}")

    def _restore(self, name: str, old: Clone | None) -> None:
        """Undo a failed change of the composite; what is served has not changed yet."""
        if name in self._net.clones:
            self._net.detach(name)
        if old is not None:
            self._net.attach(old, allow_mismatch=True)  # it was attached a moment ago

    def _made(self, generation: int) -> ServedSet:
        """The fused form of the composite as it is now, tried on one image."""
        net = self._net.fused()
        with torch.inference_mode():
            net(torch.zeros(1, *self.target.input_shape).to(like_images(self.target.module)))
        return ServedSet(generation, net, net.classes, self._net.status())

    def _serve(self, served: ServedSet) -> None:
        self.current = served
        _LOG.info("serving %s", ", ".join(served.names) or "the target alone")
        _forget_generated_code()


def _forget_generated_code() -> None:
    """Free what torch.fx keeps of every graph for tracebacks: else each change of the clones would cost memory."""
    loader = getattr(torch.fx.graph_module, "_loader", None)
    if loader is not None:
        loader.eval_cache.clear()
    for key in [key for key in linecache.cache if key.startswith("<eval_with_key>")]:
        linecache.cache.pop(key, None)
    gc.collect()  # graphs refer to themselves
