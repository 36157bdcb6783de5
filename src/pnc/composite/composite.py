"""A target with clones attached: an ordinary module whose base logits equal the target's, bit for bit."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from pnc.clones.branch import Branch, Scalars
from pnc.clones.clone import Clone, check_clones
from pnc.composite.clone_checks import NamedNetwork, check_forward, check_names, check_target, network_of
from pnc.composite.forward_plan import Block, CloneStatus, Plan, WantedClones, status_of
from pnc.composite.fused_composite import FusedComposite
from pnc.composite.recorded_target import RecordedTarget
from pnc.composite.verification import Report, verify_composite
from pnc.data.image_range import check_values
from pnc.foundation.argument_checks import came, check_finite, check_flag
from pnc.foundation.class_names import unknown_name
from pnc.foundation.errors import InputError
from pnc.foundation.fingerprints import KnownFingerprint
from pnc.foundation.network_state import Snapshot, undisturbed
from pnc.foundation.plain_text import few_names
from pnc.foundation.process_lock import ProcessLock

_LOCK = ProcessLock()  # serialises changes of composites; calls need no lock, as each reads one plan
_RECORDED = "_plan", "_recorded"
"""Attributes that recording the target creates."""


class Composite(nn.Module):
    """A target and its clones, as returned by `attach`.

    Takes images (B, C, H, W) of the size and dtype that its clones were made with, and returns logits (B, K_base +
    K_new): the target's, then each clone's in the order of attachment; `classes` names them. The target is neither
    copied nor changed: the composite runs the target's recorded forward pass on the target's own weights, always in
    eval mode, and reads the tensors that the clones need. Moving or casting the composite moves or casts the target
    too, as with any submodule; do not move the target by itself.

    Other threads may call it while one attaches, detaches or calibrates: each call uses either the old set of clones or
    the new one. Moving, casting and loading weights are not thread-safe, as with any module.

    >>> net.classes
    ('ant', 'bee', 'cat', 'dog')
    >>> with net.disabled():
    ...     net.classes
    ('ant', 'bee')
    """

    _plan: Plan
    _recorded: RecordedTarget

    def __init__(
        self, target: nn.Module, base_classes: tuple[str, ...], input_shape: tuple[int, ...], known: KnownFingerprint
    ) -> None:
        super().__init__()
        self.target = target
        self.branches = nn.ModuleList()
        self._known = known
        self._base_classes = base_classes
        self.input_shape = input_shape
        self._clones: dict[str, Clone] = {}  # replaced, never changed in place: readers need no lock
        self._blocks: tuple[Block, ...] = ()
        self._base_priority = 0.0
        self.branches.training = self.training = False
        self.register_load_state_dict_post_hook(_follow_weights)  # type: ignore[no-untyped-call]
        self._record()

    # -------------------------------------------------------------------------------------------------- contents
    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the logits that a call returns now, in order."""
        return self._plan.classes

    @property
    def clones(self) -> tuple[str, ...]:
        """Names of the attached clones, enabled or not, in the order of their logits."""
        return tuple(self._clones)

    @property
    def base_classes(self) -> tuple[str, ...]:
        """Names of the target's own logits."""
        return self._base_classes

    @property
    def base_priority(self) -> float:
        """Nats subtracted from all new logits; 0 by default, a higher value favours the base classes.

        It trades leak against accuracy on new classes, and needs no data. Like `training` it is copied and pickled with
        the composite, but is not in its state dict.
        """
        return self._base_priority

    @base_priority.setter
    def base_priority(self, nats: float) -> None:
        check_finite(nats, "base_priority")
        with _LOCK:
            self._base_priority = float(nats)
            self._update_plan()

    def status(self) -> tuple[CloneStatus, ...]:
        """List the attached clones in the order of their logits, with their positions and costs."""
        with _LOCK:
            return tuple(status_of(clone, branch, clone.name in self._plan.names) for clone, branch in self._pairs())

    def clone(self, name: str) -> Clone:
        """Return a copy of an attached clone, with its present weights and calibration, for saving.

        The copy is float32 on the CPU, whatever the composite was cast to.

        Raises:
            InputError: no clone of that name is attached.
        """
        with _LOCK:
            self._check_names([name])
            found, branch = next(pair for pair in self._pairs() if pair[0].name == name)
        return replace(found, branch=copy.deepcopy(branch).cpu().float())

    # -------------------------------------------------------------------------------------------------- changes
    def attach(
        self,
        clone: Clone,
        *,
        name: str | None = None,
        rename: Mapping[str, str] | None = None,
        allow_mismatch: bool = False,
    ) -> Self:
        """Attach another clone; its weights are copied.

        Args:
            clone: Made for this target.
            name: Name to use instead of the clone's own, for example if that is taken.
            rename: New names for some of its classes, {old: new}, for example if they are taken.
            allow_mismatch: As in `pnc.attach`.
        Raises:
            MismatchError: the clone was made for another target.
            ClassNameError: the composite already has one of its classes, or `rename` has a class that it lacks.
            InputError: a clone with that name is attached already.
        """
        check_clones([clone])
        check_flag(allow_mismatch, "allow_mismatch")
        clone = clone.renamed(name, rename)
        with _LOCK, torch.inference_mode(False):
            check_names(clone, self._base_classes, self._clones.values())
            self._recorded.check([clone], allow_mismatch)
            branch = copy.deepcopy(clone.branch).to(self._recorded.probe.device)
            self._replace([*self._pairs(), (clone, branch)])
        return self

    def detach(self, name: str) -> Clone:
        """Detach a clone, in any order; the other clones and the target do not change.

        Returns:
            The clone as it was given to `attach`. For its calibrated form call `clone(name)` first.
        Raises:
            InputError: no clone of that name is attached.
        """
        with _LOCK:
            self._check_names([name])
            found = self._clones[name]
            self._replace([pair for pair in self._pairs() if pair[0].name != name])
        return found

    def rescale(self, scalars: Mapping[str, Scalars], *, found_on: Plan | None = None) -> Self:
        """Set the calibration scalars of some clones at once; `Scalars()` removes the calibration.

        Args:
            scalars: By name of the clone.
            found_on: The plan that they were fitted on, from `now`; None skips the check that its clones are still
                attached and unchanged.
        Raises:
            InputError: no clone of that name is attached, it has another number of classes, or it was replaced.
        """
        with _LOCK, torch.inference_mode(False):
            if found_on is not None:
                found_on.check_there([branch for _, branch in self._pairs()])
            self._check_names(scalars)
            self._replace(
                [
                    (clone, branch.rescaled(scalars[clone.name]) if clone.name in scalars else branch)
                    for clone, branch in self._pairs()
                ]
            )
        return self

    @contextmanager
    def disabled(self) -> Iterator[Self]:
        """Within the block, in every thread, the composite returns the base logits only."""
        with self._block(Block(())):
            yield self

    @contextmanager
    def only(self, *names: str) -> Iterator[Self]:
        """Within the block, in every thread, only these clones are enabled; order of attachment is kept.

        If blocks are nested, only the innermost counts.

        Raises:
            InputError: no clone of that name is attached, or no name is given.
        """
        if not names:
            raise InputError("names: give at least one clone, or use disabled() for the target alone")
        self._check_names(names)
        with self._block(Block(names)):
            yield self

    # -------------------------------------------------------------------------------------------------- as a module
    def forward(self, images: Tensor, only: WantedClones | None = None) -> Tensor:
        """Compute logits (B, K_base + K_new) for images (B, C, H, W).

        Args:
            images: Of shape `input_shape` each, in the target's dtype. The target runs once on all of them.
            only: The clones to run, image by image: a name, a collection of names (which may be empty), or None for all
                enabled clones. A clone runs only on the images that list it; elsewhere its logits are -inf, a
                probability of 0.
        Raises:
            InputError: the images have another size or dtype, or are outside the target's `image_range`; `only` does
                not have one entry per image, or names a clone that is not enabled.
        """
        return self.logits(self._plan, images, only)

    def logits(self, plan: Plan, images: Tensor, only: WantedClones | None = None) -> Tensor:
        """Compute logits as a call does, but with the clones of a plan from `now`: one set for several calls."""
        check_values(images, self.target, "the target")
        return plan.logits(images, only)

    def fused(self) -> FusedComposite:
        """Return an inference form of the clones enabled now: the same logits from fewer operations.

        Base logits are equal bit for bit, new ones up to rounding. Later changes of the composite do not affect it.

        Raises:
            PNCError: on a batch of random images it differs by more than rounding.
        """
        with undisturbed():
            return FusedComposite(self._plan)

    def now(self) -> Plan:
        """Return the plan that a call would run now: one set of clones."""
        return self._plan

    def train(self, mode: bool = True) -> Self:
        """Set the composite's own flag only: the target and the clones stay in eval mode."""
        self.training = mode
        return self

    def verify(self, before: Snapshot | None = None, *, images: Tensor | None = None) -> Report:
        """Compare the composite's base logits with the target's own, and the target with the clones' fingerprints.

        Args:
            before: From `pnc.snapshot(target)`; if given, the target is compared with it too.
            images: Images to compare logits on, (N, C, H, W), in addition to random ones.

        >>> net.verify().ok
        True
        """
        changed, clones = self._recorded.watch.difference(), list(self._clones.values())
        return verify_composite(self, self.target, changed, clones, images, before)

    def refresh(self, *, allow_mismatch: bool = False) -> Self:
        """Record the target again, after its layers, hooks, parameters or settings were replaced on purpose.

        Args:
            allow_mismatch: Keep the clones even if the target now differs from the one that they were made for.
        Raises:
            MismatchError: the target differs from the one that the clones were made for; the composite still refuses
                calls.
            RecordingError: the target cannot be recorded.
        """
        check_flag(allow_mismatch, "allow_mismatch")
        with _LOCK, torch.inference_mode(False):
            recorded = RecordedTarget(self.target, self.input_shape, self._known)
            recorded.check(self._clones.values(), allow_mismatch)
            self._recorded = recorded
            self.branches.to(recorded.probe)
            self._update_plan()
        return self

    def __repr__(self) -> str:
        clones = [f"{clone.name}: {few_names(clone.classes)}" for clone in self._clones.values()]
        return (
            f"Composite({type(self.target).__name__}: {few_names(self._base_classes)}; {'; '.join(clones) or 'alone'})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # Copying the recording would duplicate the target's weights; a copied block would never end.
        kept = {name: value for name, value in self.__dict__.items() if name not in _RECORDED}
        return {**kept, "_blocks": (), "_modules": dict(self._modules)}  # so that a shallow copy has its own modules

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._record()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._record()  # the target's tensors were replaced, and a recording holds devices as constants
        return self

    def _replicate_for_data_parallel(self) -> Self:
        raise InputError(
            "a composite cannot be spread over several devices by DataParallel; give DataParallel one device, or use "
            "DistributedDataParallel with one process for each"
        )

    # -------------------------------------------------------------------------------------------------- internals
    def _pairs(self) -> list[tuple[Clone, Branch]]:
        return [(clone, cast(Branch, b)) for clone, b in zip(self._clones.values(), self.branches, strict=True)]

    def _replace(self, pairs: list[tuple[Clone, Branch]]) -> None:
        branches = nn.ModuleList(branch for _, branch in pairs)
        branches.training = False
        self.branches, self._clones = branches, {clone.name: clone for clone, _ in pairs}
        self._update_plan()

    def _check_names(self, names: Iterable[str]) -> None:
        for name in names:
            if not isinstance(name, str):
                raise InputError(f"name: expected the name of a clone; got {came(name)}")
            if name not in self._clones:
                raise InputError(f"name: {unknown_name(name, self.clones, 'clone')}")

    @contextmanager
    def _block(self, block: Block) -> Iterator[None]:
        """Enter a block; blocks of several threads may end in any order."""
        with _LOCK:
            self._blocks = (*self._blocks, block)
            self._update_plan()
        try:
            yield
        finally:
            with _LOCK:
                self._blocks = tuple(other for other in self._blocks if other is not block)
                self._update_plan()

    def _record(self) -> None:
        with _LOCK:
            self._recorded = RecordedTarget(self.target, self.input_shape, self._known)
            self._update_plan()

    def _update_plan(self) -> None:
        pairs = self._pairs()
        if self._blocks:
            pairs = [(clone, branch) for clone, branch in pairs if clone.name in self._blocks[-1].names]
        # Not through Module.__setattr__: registering the trunk would list the target's weights twice.
        self.__dict__["_plan"] = self._recorded.plan(self._base_classes, pairs, self._base_priority)


def attach(target: nn.Module | NamedNetwork, *clones: Clone, allow_mismatch: bool = False) -> Composite:
    """Attach clones to a target. Returns a new module around the target; the target does not change, bit for bit.

    The target's forward pass is recorded, and the recording compared with it, bit for bit, on random images at batch
    sizes 1 and 4. The target is compared with the one that each clone was made for: names, dtypes, shapes and values of
    all tensors, a digest of the recorded graph, and the logits of a fixed pattern. To compare logits on your own
    images, call `net.verify(images=...)`.

    Args:
        target: The network that the clones were made for, or the result of `load_model`, whose class names are compared
            too.
        clones: One or more. If two share a name or a class, rename one with `Clone.renamed`.
        allow_mismatch: Attach to a different target as well, such as a fine-tuned one, if shapes fit; check the result.
    Raises:
        InputError: no clone is given, two have the same name, or the target is a composite.
        MismatchError: a clone was made for another target; with `allow_mismatch`, it does not fit this one.
        ClassNameError: two classes have the same name, or two clones name the target's outputs differently.
        RecordingError: the target cannot be recorded.

    >>> net = pnc.attach(target, clone)
    >>> net(torch.rand(5, 1, 8, 8)).shape
    torch.Size([5, 4])
    >>> net.detach(clone.name)
    Clone('cat+dog': cat, dog; input > input)
    """
    target = network_of(target, clones)
    check_flag(allow_mismatch, "allow_mismatch")
    if isinstance(target, Composite):
        raise InputError("target is a composite already; use its method attach, composite.attach(clone)")
    known = KnownFingerprint()
    if not allow_mismatch:
        check_target(target, clones, known)
    composite = Composite(target, clones[0].base_classes, clones[0].input_shape, known)
    for clone in clones:
        composite.attach(clone, allow_mismatch=True)  # the weights, the slow part, were compared above for all clones
    if not allow_mismatch:
        check_forward(composite._recorded.forward_print, clones)
    return composite


def check_composite(net: object) -> None:
    """Raise an `InputError` unless `net` is a composite."""
    if not isinstance(net, Composite):
        raise InputError(f"net: expected a composite, as returned by pnc.attach; got {type(net).__name__}")


def _follow_weights(composite: nn.Module, incompatible_keys: object) -> None:
    """Record the target again after weights were loaded: `assign=True` replaces its tensors."""
    assert isinstance(composite, Composite)
    composite._record()
