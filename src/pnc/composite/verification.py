"""Proof on demand: is a network still what it was, and are a composite's base logits the target's own bits."""

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
from pnc.foundation.tensor_bits import same_bits
from pnc.graph.forward_prints import FAR, answers_gap, answers_of, pattern_images
from pnc.graph.logits import pick_logits
from pnc.graph.recorder import is_leaf
from pnc.graph.recording import record

PROBE_SIZES = (1, 3, 4)
"""Sizes of the batches on which a composite is compared with its target: kernels may depend on them."""

_BATCH = 64


UNPROVEN = (
    "names of classes, position and scores are what the file says: its digest finds accidents, not forgeries, and says "
    "nothing of who wrote it"
)
"""What no comparison with the networks shows."""


@dataclass(frozen=True)
class Report:
    """What was compared, bit for bit, and what was found.

    Attributes:
        compared: How many of what.
        differences: In words; empty where all is equal.
        notes: What is no difference but good to know.
        unproven: What a comparison cannot show, in words.
    """

    compared: Mapping[str, int]
    differences: tuple[str, ...]
    notes: tuple[str, ...] = ()
    unproven: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {what}" for what, count in self.compared.items())
        notes = [f"note: {note}" for note in self.notes] + [f"not proven: {one}" for one in self.unproven]
        if self.ok:
            return "\n- ".join([f"all equal, bit for bit: {counts}", *notes])
        return "\n- ".join([f"{len(self.differences)} differences; compared were {counts}", *self.differences, *notes])


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


def verify(target: nn.Module, before: Snapshot, *, images: Tensor | None = None) -> Report:
    """Compare a network with what it was: parameters, buffers, gradients, flags, hooks, and the logits of the probe.

    Args:
        target: The network that `before` was taken of.
        before: From `snapshot`.
        images: Your own, as the network takes them, (N, C, H, W): its own forward and a recording of it are compared on
            them too, as a composite runs the recording.
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
    if images is not None:
        recording = record(target, images[: max(PROBE_SIZES)])
        compared["logits of the recording"], other = _compared(recording.module, target, images.split(_BATCH))
        found += [f"the recording's logits differ from the target's own on {size} images" for size in other]
    return Report(compared, tuple(found))


def verify_composite(
    composite: nn.Module,
    target: nn.Module,
    changed: str | None,
    clones: Sequence[Clone],
    images: Tensor | None = None,
    before: Snapshot | None = None,
) -> Report:
    """Compare a composite's base logits with the target's own, and the target with what its clones were made for.

    Args:
        composite: Gives the target's logits, then others, (B, K_base + K_new).
        target: Gives (B, K_base).
        changed: What of the target was replaced since it was recorded, in words.
        clones: What is attached.
        images: Compared too, besides random ones.
        before: From `snapshot(target)`: compare the target with that too.
    """
    found = [] if changed is None else [f"the target has changed since it was recorded: {changed}"]
    found += [
        f"clone {clone.name!r} was made for another target: {difference}"
        for clone in clones
        if (difference := first_difference(target, clone.target)) is not None
    ]
    n_logits, shape = 0, clones[0].input_shape if clones else None
    if changed is None:  # or else the composite refuses every call
        probe = None if shape is None else images_for(target, shape, max(PROBE_SIZES))
        batches = [] if probe is None else [probe[:size] for size in PROBE_SIZES]
        n_logits, other = _compared(composite, target, batches)
        found += [f"base logits differ from the target's own on {size} images" for size in other]
        if images is not None:
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
    """Compare first logits with the target's own: how many were compared, and sizes of the batches that differ."""
    n_logits, other = 0, []
    for batch in batches:
        base = _logits(target, batch)
        n_logits += base.numel()
        if not same_bits(_logits(composite, batch)[:, : base.shape[1]].contiguous(), base):
            other.append(len(batch))
    return n_logits, other


def _other_forward(target: nn.Module, clones: Sequence[Clone]) -> list[str]:
    """Where the target's own answers to the test pattern are not those that clones were made for, in words."""
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
            f"hooks of {listed(hooked)} ran when the target was recorded: what they compute with tensors is in the "
            "recording, what else they do is not done when the composite is called"
        )
    unknown = [clone.name for clone in clones if clone.target_forward is None]
    if unknown:
        notes.append(
            f"the forward pass that {listed(unknown)} was made for is unknown, as its file is of an earlier version"
        )
    return tuple(notes)


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    """The network's answer in eval mode; flags and the global random state stay as they were."""
    with evaluating(network), torch.random.fork_rng([images.device] if images.is_cuda else []):
        return pick_logits(network(images.clone())).detach().clone()
