"""Export of composites as ONNX or `.pt2`, whole or in parts, each tested before it is written."""

import copy
import importlib.metadata
import itertools
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pnc.channels.compaction import own_copy
from pnc.clones.branch import Branch
from pnc.clones.clone import Clone
from pnc.clones.position_grids import pool
from pnc.composite.composite import Composite, check_composite
from pnc.composite.forward_plan import Plan
from pnc.composite.fused_composite import FusedComposite
from pnc.composite.onnx_composite import FORMAT, IMAGES, LOGITS, VERSION, OnnxComposite, clone_in, open_session
from pnc.composite.program_files import (
    BATCH_SIZES,
    as_program,
    check_packages,
    largest_difference,
    onnx_bytes,
    pt2_bytes,
    pt2_runner,
)
from pnc.foundation.errors import InputError
from pnc.foundation.file_writing import check_place, checked_path, write_file
from pnc.foundation.fingerprints import Fingerprint, fingerprint
from pnc.foundation.network_state import undisturbed
from pnc.foundation.tensor_bits import dtype_name
from pnc.graph.cut_points import INPUT

TRUNK = "trunk.onnx"
"""Name of the target's file in the folder of a split export."""

_TORCHSCRIPT = (".pt", ".pth", ".ts", ".torchscript")
_CPU = ("CPUExecutionProvider",)
_EXAMPLE_SIZE = 3
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10))}
"""Names that no file can have on Windows."""


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        files: The files written; for a split export the trunk, then the clones in the order of their logits.
        difference: Largest difference of a logit from the composite's over all tested batches, relative to the largest
            logit or to 1, whichever is larger.
    """

    files: tuple[Path, ...]
    difference: float

    @property
    def n_bytes(self) -> int:
        """Total size of the files."""
        return sum(path.stat().st_size for path in self.files)


def export(net: Composite, path: str | Path) -> Exported:
    """Write a composite with its enabled clones to one file, for any batch size.

    Exports a copy in fused form; the composite does not change. The exporter traces noise. The result is run on 1, 2
    and 5 images of noise, and refused unless its logits are the composite's.

    Args:
        net: On the CPU, in float32.
        path: A file `.onnx`, with input `images` and output `logits`, for onnxruntime and others; or `.pt2`, for
            `torch.export.load`. An existing file is replaced atomically.
    Returns:
        The file and its largest difference. The file also holds class names, clone names and the networks' fingerprints
        as JSON: in ONNX under the metadata key `pnc`, in `.pt2` as the extra file `pnc.json`.
    Raises:
        InputError: `net` is not such a composite, the path has another suffix or cannot be written, or a package is
            missing.
        ExportError: it cannot be exported, or the exported form gives other logits; nothing is written.

    >>> made = pnc.export(net, "net.pt2")  # doctest: +SKIP
    >>> made.difference < 1e-4  # doctest: +SKIP
    True
    """
    path = check_export_path(path)
    plan = _plan_of(net)
    facts = _facts("whole", plan, fingerprint(net.target))
    facts |= {"classes": plan.classes, "clones": [_facts_of(clone) for clone in plan.clones]}
    with undisturbed():
        program = as_program(_Whole(plan), (_noise(plan, _EXAMPLE_SIZE, 0),))
        if path.suffix == ".onnx":
            data = onnx_bytes(program, [IMAGES], [LOGITS], facts)
            session = open_session(data, _CPU)
            run = lambda images: torch.from_numpy(session.run([LOGITS], {IMAGES: images.numpy()})[0])  # noqa: E731
        else:
            data = pt2_bytes(program, facts)
            run = pt2_runner(data)
        difference = largest_difference(run, plan.logits, _exact(net, plan), _noise(plan, max(BATCH_SIZES), 1))
    write_file(path, data)
    return Exported((path,), difference)


def export_split(net: Composite, folder: str | Path) -> Exported:
    """Write a composite in parts, so that clones can be attached and detached without PyTorch, by `OnnxComposite`.

    The target becomes `trunk.onnx`, whose outputs are its logits and the tensors that the enabled clones read; each
    clone becomes a file named after it. The assembled parts are run and compared as in `export`.

    Args:
        net: On the CPU, in float32.
        folder: Created if missing. The trunk and files of the same clones are replaced. Others, such as clones exported
            before, are kept and still work if the new trunk has the tensors that they read.
    Returns:
        The files and their largest difference.
    Raises:
        InputError, ExportError: as for `export`.

    >>> [path.name for path in pnc.export_split(net, "parts").files]  # doctest: +SKIP
    ['trunk.onnx', 'cat_dog.onnx']
    """
    folder = check_export_folder(folder)
    plan = _plan_of(net)
    target = fingerprint(net.target)
    with undisturbed():
        trunk = _Trunk(plan)
        example = _noise(plan, _EXAMPLE_SIZE, 0)
        with torch.no_grad():
            tensors = {IMAGES: example, **dict(zip(trunk.names, trunk(example), strict=True))}
        facts = {**_facts("trunk", plan, target), "base_priority": plan.base_priority}
        parts = {TRUNK: onnx_bytes(as_program(trunk, (example,)), [IMAGES], trunk.names, facts)}
        for place, clone in enumerate(plan.clones):
            names = [_tap(clone.target_cut.name), _view(clone.target_features.name), LOGITS]
            run = _Part(plan.branches[place], plan.calibrated[place])
            program = as_program(run, tuple(tensors[name].clone() for name in names))
            facts = {**_facts("clone", plan, target), **_facts_of(clone)}
            parts[_file_name(clone.name, parts, folder)] = onnx_bytes(program, names, ["new_logits"], facts)
        together = OnnxComposite(*parts.values())
        difference = largest_difference(
            lambda images: torch.from_numpy(together(images.numpy())),
            plan.logits,
            _exact(net, plan),
            _noise(plan, max(BATCH_SIZES), 1),
        )
    return Exported(_write_all(folder, parts), difference)


# ------------------------------------------------------------------------------------------------------------- checks


def check_export_path(path: str | Path, name: str = "path") -> Path:
    """Check the path of `export` before any work; `name` is that of the argument, for errors.

    Raises:
        InputError: the suffix is another, the folder does not exist, or a package is missing.
    """
    path = checked_path(path, name)
    if path.suffix in _TORCHSCRIPT:
        raise InputError(f"{name}: {path} asks for TorchScript, which torch has deprecated; use .pt2 or .onnx")
    if path.suffix not in (".onnx", ".pt2"):
        raise InputError(f"{name}: expected a file that ends in .onnx or .pt2, got {path}")
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "is not in an existing folder"
        raise InputError(f"{name}: {path} {what}; give the path of a file in an existing folder")
    if path.suffix == ".onnx":
        check_packages()
    return path


def check_export_folder(folder: str | Path, name: str = "folder") -> Path:
    """Check the folder of `export_split` before any work; `name` is that of the argument, for errors.

    Raises:
        InputError: it is a file, its parent folder does not exist, or a package is missing.
    """
    folder = checked_path(folder, name)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{name}: {folder} is a file; a split export writes several, so give a folder")
    if folder.suffix in (".onnx", ".pt2") and not folder.exists():
        raise InputError(f"{name}: {folder} looks like a file; a split export writes several, so give a folder")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"{name}: {folder.parent} does not exist; create it first")
    check_packages()
    return folder


def _plan_of(net: Composite) -> Plan:
    """The plan to export, on a copy of the trunk."""
    check_composite(net)
    plan = net.now()
    if plan.probe.dtype != torch.float32 or plan.probe.device.type != "cpu":
        raise InputError(
            f"net: expected a composite in float32 on the CPU, got {dtype_name(plan.probe.dtype)} on "
            f"{plan.probe.device}; export copy.deepcopy(net).cpu().float()"
        )
    return replace(plan, trunk=own_copy(plan.trunk))


def _exact(net: Composite, plan: Plan) -> Callable[[Tensor], Tensor]:
    """The logits of a plan of the composite in float64, on a copy of both that is made by the first call."""

    @cache
    def copied() -> Plan:
        exact = copy.deepcopy(net).double()
        for name in set(exact.clones) - set(plan.names):
            exact.detach(name)
        return exact.now()

    return lambda images: copied().logits(images.double())


# ------------------------------------------------------------------------------------------------------------ modules


class _Whole(nn.Module):
    """The fused form with the trunk registered, so that its tensors become weights of the program, each once."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.fused, self.trunk = FusedComposite(plan), plan.trunk

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (B, K_base + K_new) for images (B, C, H, W)."""
        logits: Tensor = self.fused(images)
        return logits


class _Trunk(nn.Module):
    """The target, with the tensors that clones read as further outputs.

    Attributes:
        names: Names of the outputs: logits, tensors that clones start from, pooled features that heads read.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.trunk, self._features = plan.trunk, plan.features
        cuts = list(dict.fromkeys(clone.target_cut.name for clone in plan.clones))
        self._taps = [place for place, name in enumerate(cuts) if name != INPUT]  # the images are an input of the clone
        taps = [_tap(cuts[place]) for place in self._taps]
        self.names = [LOGITS, *taps, *(_view(cut.name) for cut in plan.features)]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the tensors of `names` for images (B, C, H, W)."""
        made = self.trunk(images)
        *tensors, logits = (made,) if isinstance(made, Tensor) else made
        first = len(tensors) - len(self._features)
        pooled = [pool(tensor, cut) for tensor, cut in zip(tensors[first:], self._features, strict=True)]
        return logits, *(tensors[place] for place in self._taps), *pooled


class _Part(nn.Module):
    """One clone: from the target's tensors that it reads to its logits."""

    def __init__(self, branch: Branch, is_calibrated: bool) -> None:
        super().__init__()
        self.branch, self._is_calibrated = branch, is_calibrated

    def forward(self, tensor: Tensor, target_features: Tensor, base_logits: Tensor) -> Tensor:
        """Compute logits (B, K_new); arguments as for the branch."""
        run = self.branch if self._is_calibrated else self.branch.head_logits
        logits: Tensor = run(tensor, target_features, base_logits)
        return logits


def _tap(name: str) -> str:
    return IMAGES if name == INPUT else f"tap.{name}"


def _view(name: str) -> str:
    return f"features.{name}"


def _noise(plan: Plan, size: int, seed: int) -> Tensor:
    """Random images, so that no real one gets into a file."""
    return torch.rand(size, *plan.probe.shape[1:], generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------- metadata


def _facts(kind: Literal["whole", "trunk", "clone"], plan: Plan, target: Fingerprint) -> dict[str, Any]:
    """Metadata of every file."""
    n_new = sum(len(clone.classes) for clone in plan.clones)
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "made_by": f"pnc {importlib.metadata.version('pnc')}",
        "base_classes": plan.classes[: len(plan.classes) - n_new],
        "input_shape": list(plan.probe.shape[1:]),
        "target": _named(target),
    }


def _facts_of(clone: Clone) -> dict[str, Any]:
    """Metadata of one clone."""
    return {"name": clone.name, "classes": clone.classes, "source": _named(clone.source)}


def _named(one: Fingerprint) -> dict[str, str]:
    return {"structure": one.structure, "weights": one.weights}


# -------------------------------------------------------------------------------------------------------------- files


def _file_name(clone: str, parts: Mapping[str, object], folder: Path) -> str:
    """A file name for a clone that is valid on every file system, and that no other clone has, regardless of case."""
    stem = re.sub(r"[^\w.-]+", "_", clone).strip("._").encode()[:100].decode(errors="ignore") or "clone"
    stem = f"{stem}_" if stem.partition(".")[0].upper() in _DEVICES else stem
    there = {file.name.lower(): file for file in folder.iterdir()} if folder.is_dir() else {}
    taken = {name.lower() for name in parts}
    taken |= {name for name, file in there.items() if name.startswith(stem.lower()) and clone_in(file) != clone}
    return next(name for name in _names(stem) if name.lower() not in taken)


def _names(stem: str) -> Iterator[str]:
    yield f"{stem}.onnx"
    for number in itertools.count(2):
        yield f"{stem}_{number}.onnx"


def _write_all(folder: Path, parts: Mapping[str, bytes]) -> tuple[Path, ...]:
    """Write all files beside the folder first, then move them in."""
    for part in parts:
        check_place(folder / part, "folder")
    try:
        with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}.pnc-") as name:
            for part, data in parts.items():
                write_file(Path(name) / part, data)
            folder.mkdir(exist_ok=True)
            for part in parts:
                (Path(name) / part).replace(folder / part)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}; choose a writable folder") from error
    return tuple(folder / part for part in parts)
