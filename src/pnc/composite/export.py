"""Composites written for where they run: as ONNX or `.pt2`, whole or in parts, each tried before it is written."""

import importlib.metadata
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pnc.channels.compaction import own_copy
from pnc.clones.branch import Branch
from pnc.clones.clone import Clone
from pnc.clones.position_grids import pool
from pnc.composite.composite import Composite
from pnc.composite.forward_plan import Plan
from pnc.composite.fused_composite import FusedComposite
from pnc.composite.onnx_composite import FORMAT, IMAGES, LOGITS, VERSION, OnnxComposite, open_session
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
from pnc.foundation.file_writing import write_file
from pnc.foundation.fingerprints import Fingerprint, fingerprint
from pnc.foundation.network_state import undisturbed
from pnc.foundation.tensor_bits import dtype_name
from pnc.graph.cut_points import INPUT

TRUNK = "trunk.onnx"
"""Name of the target's file in the folder of a split export."""

_TORCHSCRIPT = (".pt", ".pth", ".ts", ".torchscript")
_CPU = ("CPUExecutionProvider",)
_EXAMPLE_SIZE = 3


@dataclass(frozen=True)
class Exported:
    """What an export has written, and how well it was kept.

    Attributes:
        files: The files; of a split export the trunk first, then the clones in the order of their logits.
        difference: Largest difference of a logit from the composite's, relative to the largest logit or to 1, over all
            batches that were tried.
    """

    files: tuple[Path, ...]
    difference: float

    @property
    def n_bytes(self) -> int:
        """Of all files together."""
        return sum(path.stat().st_size for path in self.files)


def export(net: Composite, path: str | Path) -> Exported:
    """Write a composite with its enabled clones as one file that takes any number of images.

    What is written is the fused form, made of copies: the composite stays as it is. The example that the exporter runs
    is noise. The file is run on 1, 2 and 5 images of noise, and refused unless it gives the composite's logits.

    Args:
        net: On the CPU, in float32.
        path: A file `.onnx`, with input `images` and output `logits`, for onnxruntime and others; or `.pt2`, for
            `torch.export.load`. A file that is there is replaced, whole or not at all.
    Returns:
        What was written. Names of classes and clones and the networks' fingerprints lie in the file, as JSON: in ONNX
        under the metadata key `pnc`, in `.pt2` as the extra file `pnc.json`.
    Raises:
        InputError: `net` is no such composite, the path ends otherwise or cannot be written, or a package is missing.
        ExportError: it cannot be exported, or the exported form gives other logits; nothing is written then.
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
        difference = largest_difference(run, plan.logits, _noise(plan, max(BATCH_SIZES), 1))
    write_file(path, data)
    return Exported((path,), difference)


def export_split(net: Composite, folder: str | Path) -> Exported:
    """Write a composite in parts, so that clones come and go where there is no PyTorch: `OnnxComposite` runs them.

    The target becomes `trunk.onnx`, with the tensors that the enabled clones read as outputs beside its logits; each
    clone becomes a file named after it. The parts are put together, run and compared as `export` does it.

    Args:
        net: On the CPU, in float32.
        folder: Made if it is not there. Files of the same names are replaced; others, such as clones that were exported
            before, are left alone, and go on working as long as the trunk gives what they read.
    Returns:
        What was written.
    Raises:
        InputError, ExportError: as for `export`.
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
            parts[_file_name(clone.name, parts)] = onnx_bytes(program, names, ["new_logits"], facts)
        together = OnnxComposite(*parts.values())
        difference = largest_difference(
            lambda images: torch.from_numpy(together(images.numpy())),
            plan.logits,
            _noise(plan, max(BATCH_SIZES), 1),
        )
    return Exported(_write_all(folder, parts), difference)


# ------------------------------------------------------------------------------------------------------- at the door


def check_export_path(path: str | Path) -> Path:
    """Check where and as what `export` shall write, before any work.

    Raises:
        InputError: another ending, no folder, or a package is missing.
    """
    path = Path(path)
    if path.suffix in _TORCHSCRIPT:
        raise InputError(
            f"path: {path} asks for TorchScript, which is not written: torch has deprecated it; take .pt2 or .onnx"
        )
    if path.suffix not in (".onnx", ".pt2"):
        raise InputError(f"path: expected a file that ends in .onnx or .pt2, got {path}")
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "lies in no folder that exists"
        raise InputError(f"path: {path} {what}; give the path of a file in an existing folder")
    if path.suffix == ".onnx":
        check_packages()
    return path


def check_export_folder(folder: str | Path) -> Path:
    """Check where `export_split` shall write, before any work.

    Raises:
        InputError: a file is there, no folder to make it in, or a package is missing.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"folder: {folder} is a file; a split export writes several, so give a folder")
    if folder.suffix in (".onnx", ".pt2") and not folder.exists():
        raise InputError(f"folder: {folder} looks like a file; a split export writes several, so give a folder")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"folder: {folder.parent} does not exist; make it first")
    check_packages()
    return folder


def _plan_of(net: Composite) -> Plan:
    """What the composite runs now, if it can be exported as it is."""
    if not isinstance(net, Composite):
        raise InputError(f"net: expected a composite, what pnc.attach gives; got {type(net).__name__}")
    plan = net._plan
    if plan.probe.dtype != torch.float32 or plan.probe.device.type != "cpu":
        raise InputError(
            f"net: expected a composite in float32 on the CPU, got {dtype_name(plan.probe.dtype)} on "
            f"{plan.probe.device}; export copy.deepcopy(net).cpu().float()"
        )
    return replace(plan, trunk=own_copy(plan.trunk))


# ------------------------------------------------------------------------------------------- what is given to exporters


class _Whole(nn.Module):
    """The fused form with the trunk's tensors among its own, so that they become weights of the program, each once."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.fused, self.trunk = FusedComposite(plan), plan.trunk

    def forward(self, images: Tensor) -> Tensor:
        """Give logits (B, K_base + K_new) for images (B, C, H, W)."""
        logits: Tensor = self.fused(images)
        return logits


class _Trunk(nn.Module):
    """The target, up to what clones read of it.

    Attributes:
        names: Of what it gives: its logits, the tensors that clones start from, the pooled features that heads read.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.trunk, self._features = plan.trunk, plan.features
        cuts = list(dict.fromkeys(clone.target_cut.name for clone in plan.clones))
        self._taps = [place for place, name in enumerate(cuts) if name != INPUT]  # images come as they are
        taps = [_tap(cuts[place]) for place in self._taps]
        self.names = [LOGITS, *taps, *(_view(cut.name) for cut in plan.features)]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Give what `names` says for images (B, C, H, W)."""
        made = self.trunk(images)
        *tensors, logits = (made,) if isinstance(made, Tensor) else made
        first = len(tensors) - len(self._features)
        pooled = [pool(tensor, cut) for tensor, cut in zip(tensors[first:], self._features, strict=True)]
        return logits, *(tensors[place] for place in self._taps), *pooled


class _Part(nn.Module):
    """One clone: from what it reads of the target to its logits."""

    def __init__(self, branch: Branch, is_calibrated: bool) -> None:
        super().__init__()
        self.branch, self._is_calibrated = branch, is_calibrated

    def forward(self, tensor: Tensor, target_features: Tensor, base_logits: Tensor) -> Tensor:
        """Give logits (B, K_new); arguments as of the branch."""
        run = self.branch if self._is_calibrated else self.branch.head_logits
        logits: Tensor = run(tensor, target_features, base_logits)
        return logits


def _tap(name: str) -> str:
    return IMAGES if name == INPUT else f"tap.{name}"


def _view(name: str) -> str:
    return f"features.{name}"


def _noise(plan: Plan, size: int, seed: int) -> Tensor:
    """Images that nobody has taken."""
    return torch.rand(size, *plan.probe.shape[1:], generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------- what is said


def _facts(kind: Literal["whole", "trunk", "clone"], plan: Plan, target: Fingerprint) -> dict[str, Any]:
    """What every file says of itself."""
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
    """What is said of one clone."""
    return {"name": clone.name, "classes": clone.classes, "source": _named(clone.source)}


def _named(one: Fingerprint) -> dict[str, str]:
    return {"structure": one.structure, "weights": one.weights}


# -------------------------------------------------------------------------------------------------------------- files


def _file_name(clone: str, taken: Mapping[str, object]) -> str:
    """A name for a clone's file that every file system takes and no other file has, whatever the case."""
    stem = re.sub(r"[^\w.-]+", "_", clone).strip("._")[:100] or "clone"
    names = [f"{stem}.onnx", *(f"{stem}_{number}.onnx" for number in range(2, len(taken) + 2))]
    return next(name for name in names if name.lower() not in {one.lower() for one in taken})


def _write_all(folder: Path, parts: Mapping[str, bytes]) -> tuple[Path, ...]:
    """Write files beside the folder, then put them into it: none is there before all are whole."""
    try:
        with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}.pnc-") as name:
            for part, data in parts.items():
                write_file(Path(name) / part, data)
            folder.mkdir(exist_ok=True)
            for part in parts:
                (Path(name) / part).replace(folder / part)
    except OSError as error:
        raise InputError(
            f"cannot write {folder}: {error.strerror or error}; choose a folder that is writable"
        ) from error
    return tuple(folder / part for part in parts)
