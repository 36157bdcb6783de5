"""Verification on demand: that a network is unchanged, and that base logits equal the target's own bits."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pnc.channels.rule_table import has_hooks
from pnc.clones.clone import Clone
from pnc.foundation import network_state
from pnc.foundation.argument_checks import check_module
from pnc.foundation.class_names import listed
from pnc.foundation.errors import InputError
from pnc.foundation.fingerprints import first_difference
from pnc.foundation.network_state import Snapshot, differences, evaluating, images_for, like_images
from pnc.foundation.plain_text import counted
from pnc.foundation.tensor_bits import same_bits
from pnc.graph.forward_prints import FAR, answers_gap, answers_of, pattern_images
from pnc.graph.logits import pick_logits
from pnc.graph.recorder import is_leaf
from pnc.graph.recording import record

PROBE_SIZES = (1, 3, 4)
"""Batch sizes at which a composite is compared with its target: the choice of kernel may depend on them."""

_BATCH = 64

UNPROVEN = (
    "class names, position and scores come from the file, whose digest detects accidents, not forgeries, and does not "
    "identify the author"
)
"""What comparing with the networks cannot show."""


@dataclass(frozen=True)
class Report:
    """The result of a bit-for-bit comparison.

    Attributes:
        compared: How many items of each kind were compared.
        differences: Descriptions of all differences; empty if everything is equal.
        notes: Remarks that are not differences.
        unproven: What the comparison cannot show.
    """

    compared: Mapping[str, int]
    differences: tuple[str, ...]
    notes: tuple[str, ...] = ()
    unproven: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there are no differences."""
        return not self.differences

    def __str__(self) -> str:
        counts = ", ".join(counted(count, what) for what, count in self.compared.items())
        notes = [f"note: {note}" for note in self.notes] + [f"not proven: {one}" for one in self.unproven]
        if self.ok:
            return "\n- ".join([f"all equal, bit for bit: {counts}", *notes])
        return "\n- ".join(
            [f"{counted(len(self.differences), 'differences')}; compared: {counts}", *self.differences, *notes]
        )


def snapshot(target: nn.Module, images: Tensor | None = None) -> Snapshot:
    """Copy everything of a network that must not change, for a later `verify`; costs one copy of its weights.

    Args:
        target: Any network.
        images: A probe batch in the form that the network takes; its logits in eval mode are stored and compared too.
            None omits them.

    >>> before = pnc.snapshot(target, torch.rand(4, 1, 8, 8))
    >>> pnc.verify(target, before).ok
    True
    """
    check_module(target, "target")
    logits = None if images is None else _logits(target, images)
    kept = None if images is None else images.detach().clone()
    return dataclasses.replace(network_state.take_snapshot(target), images=kept, logits=logits)


def verify(target: nn.Module, before: Snapshot, *, images: Tensor | None = None) -> Report:
    """Compare a network with a snapshot of it: parameters, buffers, gradients, flags, hooks, logits of the probe.

    Args:
        target: The network that `before` was taken of.
        before: From `snapshot`.
        images: Images (N, C, H, W) in the form that the network takes, on which a recording of the network, such as a
            composite runs, is compared with the network itself.
    Returns:
        A report; `report.ok` is True if everything is equal bit for bit.
    Raises:
        InputError: `before` is not a snapshot.

    >>> before = pnc.snapshot(target)
    >>> _ = pnc.attach(target, clone)(torch.rand(5, 1, 8, 8))
    >>> print(pnc.verify(target, before))
    all equal, bit for bit: 28 parameters and buffers, 0 gradients, 21 submodules with their flags, 0 hooks
    """
    if not isinstance(before, Snapshot):
        raise InputError(f"before: expected the result of pnc.snapshot(target), got {type(before).__name__}")
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
    if images is not None:
        check_images(images)
        recording = record(target, images[: max(PROBE_SIZES)])
        compared["logits of the recording"], other = _compared(recording.module, target, images.split(_BATCH))
        found += [f"the recording's logits differ from the target's own on {size} images" for size in other]
    return Report(compared, tuple(found))


def check_images(images: object) -> None:
    """Raise an `InputError` unless these are a batch of images."""
    if not isinstance(images, Tensor) or images.dim() != 4:
        got = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"images: expected a tensor (N, C, H, W); got {got}")


def verify_composite(
    composite: nn.Module,
    target: nn.Module,
    changed: str | None,
    clones: Sequence[Clone],
    images: Tensor | None = None,
    before: Snapshot | None = None,
) -> Report:
    """Compare a composite's base logits with the target's own, and the target with its clones' fingerprints.

    Args:
        composite: Returns the target's logits, then others, (B, K_base + K_new).
        target: Returns (B, K_base).
        changed: Description of what was replaced in the target since it was recorded; None for nothing.
        clones: The attached clones.
        images: Images to compare logits on, in addition to random ones.
        before: From `snapshot(target)`; if given, the target is compared with it too.
    """
    found = [] if changed is None else [f"the target has changed since it was recorded: {changed}"]
    found += [
        f"clone {clone.name!r} was made for another target: {difference}"
        for clone in clones
        if (difference := first_difference(target, clone.target)) is not None
    ]
    n_logits, shape = 0, clones[0].input_shape if clones else None
    if changed is None:  # otherwise the composite refuses every call
        probe = None if shape is None else images_for(target, shape, max(PROBE_SIZES))
        batches = [] if probe is None else [probe[:size] for size in PROBE_SIZES]
        n_logits, other = _compared(composite, target, batches)
        found += [f"base logits differ from the target's own on {size} images" for size in other]
        if images is not None:
            check_images(images)
            n, other = _compared(composite, target, images.to(like_images(target)).split(_BATCH))
            n_logits += n
            found += [f"base logits differ from the target's own on {size} of the given images" for size in other]
        found += _other_forward(target, clones)
    compared = {"base logits": n_logits, "fingerprints": len(clones)}
    if before is not None:
        report = verify(target, before)
        compared |= report.compared
        found += report.differences
    return Report(compared, tuple(found), _notes(target, clones), (UNPROVEN,) if clones else ())


def _compared(composite: nn.Module, target: nn.Module, batches: Iterable[Tensor]) -> tuple[int, list[int]]:
    """Compare base logits with the target's own; returns their number and the sizes of batches that differ."""
    n_logits, other = 0, []
    for batch in batches:
        base = _logits(target, batch)
        n_logits += base.numel()
        if not same_bits(_logits(composite, batch)[:, : base.shape[1]].contiguous(), base):
            other.append(len(batch))
    return n_logits, other


def _other_forward(target: nn.Module, clones: Sequence[Clone]) -> list[str]:
    """Describe where the target's logits of the test pattern differ from those stored in a clone."""
    found = []
    for clone in clones:
        if clone.target_forward is not None:
            pattern = pattern_images(clone.input_shape).to(like_images(target))
            gap = answers_gap(answers_of(_logits(target, pattern)), clone.target_forward.answers)
            if gap > FAR:
                found.append(
                    f"clone {clone.name!r} was made for a target whose answers to a test pattern differ by {gap:.2g}"
                )
    return found


def _notes(target: nn.Module, clones: Sequence[Clone]) -> tuple[str, ...]:
    notes = []
    hooked = [
        name or "the network" for name, module in target.named_modules() if has_hooks(module) and not is_leaf(module)
    ]
    if hooked:
        notes.append(
            f"hooks of {listed(hooked)} ran when the target was recorded: their tensor operations are in the "
            "recording, their other effects do not happen when the composite is called"
        )
    unknown = [clone.name for clone in clones if clone.target_forward is None]
    if unknown:
        notes.append(
            f"the forward pass that {listed(unknown)} was made for is unknown: its file is from an earlier version"
        )
    return tuple(notes)


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    """Logits in eval mode; flags and the global random state are restored."""
    with evaluating(network), torch.random.fork_rng([images.device] if images.is_cuda else []):
        return pick_logits(network(images.clone())).detach().clone()
