"""A clone's file tried on its networks: what `pnc verify` does."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from pnc.clones.clone_file import load, read_clone_file
from pnc.composite.composite import attach
from pnc.composite.verification import PROBE_SIZES, Report, snapshot
from pnc.foundation.class_names import listed
from pnc.foundation.errors import MismatchError
from pnc.foundation.fingerprints import first_difference
from pnc.foundation.network_state import images_for


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        what: In a word or two.
        ok: Whether it is as it should be.
        found: In a sentence.
    """

    what: str
    ok: bool
    found: str


def prove(
    path: str | Path,
    target: nn.Module,
    source: nn.Module | None = None,
    *,
    base_classes: Sequence[str] | None = None,
) -> tuple[Check, ...]:
    """Check a clone's file against its networks, attach the clone, compare, detach it, compare again.

    Args:
        path: The file.
        target: The network that the clone shall be attached to; it stays as it is.
        source: The one that the clone was made from; without it nothing can be attached.
        base_classes: What the target's own file calls its outputs, where it does: the clone's file must call them so.
    Returns:
        What was checked, up to the first check that failed.
    Raises:
        FileFormatError: the file is damaged, no clone's file, or of a newer version of the format.
        RecordingError: a network cannot be recorded.
    """
    _, manifest = read_clone_file(path)
    n_bytes = Path(path).stat().st_size
    checks = [Check("file", True, f"whole: {manifest.kind}, {n_bytes:,} bytes, with the digest that it names")]
    if base_classes is not None:
        alike, there = tuple(base_classes) == manifest.base_classes, listed(base_classes)
        other = f"the file calls the target's outputs {listed(manifest.base_classes)}, here they are {there}"
        checks.append(Check("names", alike, f"of the target's outputs: {there}" if alike else other))
        if not alike:
            return tuple(checks)
    expected, only = {"target": (target, manifest.target), "source": (source, manifest.source)}, manifest.kind == "full"
    for role, (network, fingerprint) in expected.items():
        if network is None:
            return (*checks, Check(role, True, "not given, so the clone was not attached"))
        difference = first_difference(network, fingerprint, structure_only=role == "source" and only)
        same = f"the one that the file names, {len(fingerprint.tensors)} tensors"
        checks.append(Check(role, difference is None, same if difference is None else f"another one: {difference}"))
        if difference is not None:
            return tuple(checks)
    assert source is not None
    before = snapshot(target, images_for(target, manifest.input_shape, max(PROBE_SIZES)))
    try:
        net = attach(target, load(path, source=source))
    except MismatchError as error:
        return (*checks, Check("forward pass", False, str(error)))
    checks.append(_compared("attached", net.verify(before)))
    if checks[-1].ok:
        net.detach(manifest.name)
        checks.append(_compared("detached", net.verify(before)))
    return tuple(checks)


def _compared(what: str, report: Report) -> Check:
    found = str(replace(report, unproven=())).replace("\n- ", "; ") if report.ok else listed(report.differences, 3)
    return Check(what, report.ok, found)
