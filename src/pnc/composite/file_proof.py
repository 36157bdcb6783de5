"""Verification of a clone file with its networks: what `pnc verify` does."""

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
    """The result of one check.

    Attributes:
        what: Its subject, in a word or two.
        ok: Whether it passed.
        found: The finding, in a sentence.
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
    """Check a clone file against its networks, attach the clone, compare, detach it, compare again.

    Args:
        path: The file.
        target: The network to attach the clone to; it does not change.
        source: The network that the clone was made from; without it only a file that needs no source is attached.
        base_classes: Names of the target's outputs, if its own file has them; the clone file must use the same.
    Returns:
        The checks, up to the first that failed.
    Raises:
        FileFormatError: the file is damaged, not a clone file, or of a newer format version.
        RecordingError: a network cannot be recorded.
    """
    _, manifest = read_clone_file(path)
    n_bytes = Path(path).stat().st_size
    checks = [Check("file", True, f"intact: {manifest.kind}, {n_bytes:,} bytes, digest matches")]
    if base_classes is not None:
        agree, own = tuple(base_classes) == manifest.base_classes, listed(base_classes)
        difference = f"the file calls the target's outputs {listed(manifest.base_classes)}, here they are {own}"
        checks.append(Check("names", agree, f"of the target's outputs: {own}" if agree else difference))
        if not agree:
            return tuple(checks)
    is_full = manifest.kind == "full"
    for role, network, fingerprint in (("target", target, manifest.target), ("source", source, manifest.source)):
        if network is None and manifest.part is not None:
            checks.append(Check(role, True, "not needed: the file holds the structure and the weights of its part"))
            continue
        if network is None:
            return (*checks, Check(role, True, "not given, so the clone was not attached"))
        other = first_difference(network, fingerprint, structure_only=role == "source" and is_full)
        same = f"matches the file's fingerprint, {len(fingerprint.tensors)} tensors"
        checks.append(Check(role, other is None, same if other is None else f"another network: {other}"))
        if other is not None:
            return tuple(checks)
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
