"""A clone's file tried on its networks: what `pnc verify` does."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pnc.clones.clone_file import load, read_clone_file
from pnc.composite.composite import attach
from pnc.composite.verification import PROBE_SIZES, Report, snapshot
from pnc.foundation.class_names import listed
from pnc.foundation.fingerprints import first_difference


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


def prove(path: str | Path, target: nn.Module, source: nn.Module | None = None) -> tuple[Check, ...]:
    """Check a clone's file against its networks, attach the clone, compare, detach it, compare again.

    Args:
        path: The file.
        target: The network that the clone shall be attached to; it stays as it is.
        source: The one that the clone was made from; without it nothing can be attached.
    Returns:
        What was checked, up to the first check that failed.
    Raises:
        FileFormatError: the file is damaged, no clone's file, or of a newer version of the format.
        RecordingError: a network cannot be recorded.
    """
    _, manifest = read_clone_file(path)
    n_bytes = Path(path).stat().st_size
    checks = [Check("file", True, f"whole: {manifest.kind}, {n_bytes:,} bytes, with the digest that it names")]
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
    parameter = next(target.parameters(), torch.empty(0))
    images = torch.rand(max(PROBE_SIZES), *manifest.input_shape, generator=torch.Generator().manual_seed(0))
    before = snapshot(target, images.to(parameter.device, parameter.dtype))
    net = attach(target, load(path, source=source))
    checks.append(_compared("attached", net.verify(before)))
    if checks[-1].ok:
        net.detach(manifest.name)
        checks.append(_compared("detached", net.verify(before)))
    return tuple(checks)


def _compared(what: str, report: Report) -> Check:
    return Check(what, report.ok, str(report) if report.ok else listed(report.differences, 3))
