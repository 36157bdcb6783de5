"""Proof on demand: is a network still what it was, and are a composite's base logits the target's own bits."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pnc.foundation import network_state
from pnc.foundation.argument_checks import check_module
from pnc.foundation.errors import InputError
from pnc.foundation.fingerprints import Fingerprint, first_difference
from pnc.foundation.network_state import Snapshot, differences, evaluating
from pnc.foundation.tensor_bits import same_bits
from pnc.graph.recording import pick_logits

PROBE_SIZES = (1, 3, 4)
"""Sizes of the batches on which a composite is compared with its target: kernels may depend on them."""


@dataclass(frozen=True)
class Report:
    """What was compared, bit for bit, and what was found.

    Attributes:
        compared: How many of what.
        differences: In words; empty where all is equal.
    """

    compared: Mapping[str, int]
    differences: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {what}" for what, count in self.compared.items())
        if self.ok:
            return f"all equal, bit for bit: {counts}"
        return "\n- ".join([f"{len(self.differences)} differences; compared were {counts}", *self.differences])


def snapshot(target: nn.Module, images: Tensor | None = None) -> Snapshot:
    """Copy everything of a network that must not change, for `verify` later: costs one copy of its weights.

    Args:
        target: Any network.
        images: A probe batch, as the network takes it: its logits, in eval mode, are kept and compared too. None leaves
            them out.
    """
    check_module(target, "target")
    logits = None if images is None else _logits(target, images)
    kept = None if images is None else images.detach().clone()
    return dataclasses.replace(network_state.take_snapshot(target), images=kept, logits=logits)


def verify(target: nn.Module, before: Snapshot) -> Report:
    """Compare a network with what it was: parameters, buffers, gradients, flags, hooks, and the logits of the probe.

    Args:
        target: The network that `before` was taken of.
        before: From `snapshot`.
    Returns:
        A report; `report.ok` says whether all is equal to the last bit.
    Raises:
        InputError: `before` is no snapshot.
    """
    if not isinstance(before, Snapshot):
        raise InputError(f"before: expected what pnc.snapshot(target) gave, got {type(before).__name__}")
    found = differences(target, before)
    compared = {
        "parameters and buffers": len(before.tensors),
        "gradients": sum(gradient is not None for gradient in before.gradients.values()),
        "submodules with their flags": len(before.submodules),
        "hooks": sum(map(len, before.hooks.values())),
    }
    if before.images is not None and before.logits is not None:
        compared["logits"] = before.logits.numel()
        if not same_bits(_logits(target, before.images), before.logits):
            found.append("logits of the probe batch changed")
    return Report(compared, tuple(found))


def verify_composite(
    composite: nn.Module,
    target: nn.Module,
    expected: Mapping[str, Fingerprint],
    images: Tensor,
    before: Snapshot | None = None,
) -> Report:
    """Compare a composite's base logits with the target's, and the target with what its clones were made for.

    Args:
        composite: Gives the target's logits, then others, (B, K_base + K_new).
        target: Gives (B, K_base).
        expected: By name of a clone, the fingerprint of the target that it was made for.
        images: At least `max(BATCH_SIZES)` images.
        before: From `snapshot(target)`: compare the target with that too.
    """
    found = [
        f"clone {name!r} was made for another target: {difference}"
        for name, fingerprint in expected.items()
        if (difference := first_difference(target, fingerprint)) is not None
    ]
    n_logits = 0
    for size in PROBE_SIZES:
        base = _logits(target, images[:size])
        n_logits += base.numel()
        if not same_bits(_logits(composite, images[:size])[:, : base.shape[1]].contiguous(), base):
            found.append(f"base logits differ from the target's own on {size} images")
    compared = {"base logits": n_logits, "fingerprints": len(expected)}
    if before is not None:
        report = verify(target, before)
        compared |= report.compared
        found += report.differences
    return Report(compared, tuple(found))


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    """The network's answer in eval mode; flags and the global random state stay as they were."""
    with evaluating(network), torch.random.fork_rng([images.device] if images.is_cuda else []):
        return pick_logits(network(images.clone())).detach().clone()
