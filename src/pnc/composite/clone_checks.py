"""Checks that a clone fits a target: its weights, forward pass, the tensors that the clone reads, class names."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from pnc.clones.clone import Clone, check_clones
from pnc.foundation.argument_checks import check_module
from pnc.foundation.class_names import listed
from pnc.foundation.errors import ClassNameError, InputError, MismatchError, PNCWarning
from pnc.foundation.fingerprints import KnownFingerprint, first_difference
from pnc.graph.batch_norm_means import last_norm
from pnc.graph.classifier import find_head
from pnc.graph.cut_points import CutPoint, cut_points
from pnc.graph.forward_prints import ForwardPrint, forward_difference
from pnc.graph.recording import Recording


def check_target(target: nn.Module, clones: Iterable[Clone], known: KnownFingerprint) -> None:
    """Raise a `MismatchError` unless all clones were made for `target` with its present weights."""
    found = known.of(target)
    for clone in clones:
        difference = first_difference(target, clone.target, found)
        if difference is not None:
            raise MismatchError(
                f"clone {clone.name!r} was made for another target: {difference}; attach it to that one, clone again, "
                "or give allow_mismatch=True to accept this"
            )


def check_forward(found: ForwardPrint, clones: Iterable[Clone]) -> None:
    """Raise a `MismatchError` if the target computes something else than the one that a clone was made for.

    Warn if its graph differs but its answers to a test pattern do not.
    """
    for clone in clones:
        difference = None if clone.target_forward is None else forward_difference(found, clone.target_forward)
        if difference is None:
            continue
        if difference.is_other:
            raise MismatchError(
                f"clone {clone.name!r} was made for another target, with the same weights and another forward pass: "
                f"{difference.text}; attach it to that one, clone again, or give allow_mismatch=True to accept this"
            )
        warnings.warn(
            f"target: {difference.text}, compared with the one that clone {clone.name!r} was made for; its answers to "
            "a test pattern are the same",
            PNCWarning,
            stacklevel=3,
        )


def check_names(clone: Clone, base_classes: tuple[str, ...], others: Iterable[Clone]) -> None:
    """Refuse a clone whose name or classes are taken, or that names the target's classes differently.

    Raises:
        InputError: its name is taken.
        ClassNameError: the name of one of its classes is taken, or the base classes have other names.
    """
    others = list(others)
    if any(other.name == clone.name for other in others):
        raise InputError(
            f"clone: one named {clone.name!r} is attached already; detach it, or give this one another name "
            "(in Python, name=...)"
        )
    taken = {*base_classes, *(name for other in others for name in other.classes)}
    clash = [name for name in clone.classes if name in taken]
    if clash:
        raise ClassNameError(
            f"clone {clone.name!r}: the composite has a class {clash[0]!r} already; leave one of the two out, or give "
            "the class another name (in Python, rename={...} or clone.renamed)"
        )
    check_base_names([clone], base_classes)


@dataclass(frozen=True, eq=False)
class Places:
    """The places of a recorded target that clones may read.

    Attributes:
        cuts: Cuts that a clone may start from.
        features: Tensors that its head may read.
        n_classes: Number of the target's classes.
    """

    cuts: tuple[CutPoint, ...]
    features: tuple[CutPoint, ...]
    n_classes: int

    @classmethod
    def of(cls, recording: Recording) -> "Places":
        """Find the places; takes as long as attaching a clone."""
        cuts = *cut_points(recording), find_head(recording).features
        norm = last_norm(recording)
        return cls(cuts, (*cuts, *((norm.cut,) if norm else ())), recording.n_classes)


def check_places(places: Places, clone: Clone) -> None:
    """Raise a `MismatchError` unless a target has the tensors that `clone` reads and its number of classes."""
    for cut, allowed in ((clone.target_cut, places.cuts), (clone.target_features, places.features)):
        if not any(map(cut.is_same_place, allowed)):
            raise MismatchError(
                f"clone {clone.name!r} reads {cut.name!r} with shape {cut.shape}, which this target does not have; "
                "attach it to the one that it was made for, in the same wrapper, such as pnc.Output"
            )
    if places.n_classes != len(clone.base_classes):
        raise MismatchError(
            f"clone {clone.name!r} was made for {len(clone.base_classes)} base classes, this target has "
            f"{places.n_classes}; attach it to the one that it was made for"
        )


@runtime_checkable
class NamedNetwork(Protocol):
    """A network with names of its outputs, as from `load_model`; a protocol, so that production does not load that."""

    @property
    def module(self) -> nn.Module:
        """The network."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of its outputs, in order."""


def network_of(target: nn.Module | NamedNetwork, clones: Sequence[Clone]) -> nn.Module:
    """The network to attach clones to; if it comes with names of its outputs, the clones must use the same."""
    check_clones(clones)
    if not isinstance(target, nn.Module) and isinstance(target, NamedNetwork):
        check_base_names(clones, target.classes)
        return target.module
    check_module(target, "target")
    return target


def check_base_names(clones: Iterable[Clone], names: Sequence[str]) -> None:
    """Raise a `ClassNameError` unless all clones use these names of the target's outputs, in this order."""
    for clone in clones:
        if clone.base_classes != tuple(names):
            raise ClassNameError(
                f"clone {clone.name!r} calls the target's outputs {listed(clone.base_classes)}, here they are "
                f"{listed(names)}; clone with the same base_classes"
            )
