"""A target with clones attached: one ordinary module whose base logits are the target's own, bit for bit."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
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
from pnc.foundation.argument_checks import check_flag
from pnc.foundation.class_names import unknown_name
from pnc.foundation.errors import InputError
from pnc.foundation.fingerprints import KnownFingerprint
from pnc.foundation.network_state import Snapshot, undisturbed
from pnc.foundation.plain_text import few_names
from pnc.foundation.process_lock import ProcessLock

_LOCK = ProcessLock()  # changes of composites, one at a time; calls need no lock, as they read one plan
_RECORDED = "_plan", "_recorded"
"""Attributes that come of recording the target."""


class Composite(nn.Module):
    """A target and its clones. Made by `attach`.

    It takes images (B, C, H, W) of the size and type that its clones were made with, and gives logits (B, K_base +
    K_new): the target's, then each clone's in the order of attachment; `classes` names them. The target is neither
    copied nor changed: the composite runs the target's recorded forward pass over the target's own weights, always
    in eval mode, and reads the tensors that the clones need. Moving or casting the composite moves or casts the
    target with it, as with any module inside another; move the composite, not the target behind its back.

    Threads may call it while another one attaches, detaches or calibrates: a call sees all of the old set or all of
    the new one. Moving, casting and loading weights are for one thread alone, as with any module.
    """

    _plan: Plan
    _recorded: RecordedTarget

    def __init__(self, target: nn.Module, clone: Clone, known: KnownFingerprint) -> None:
        super().__init__()
        self.target = target
        self.branches = nn.ModuleList()
        self._known = known
        self._base_classes = clone.base_classes
        self.input_shape = clone.input_shape
        self._clones: dict[str, Clone] = {}  # never changed in place, like the list of branches: readers need no lock
        self._blocks: tuple[Block, ...] = ()
        self._base_priority = 0.0
        self.branches.training = self.training = False
        self.register_load_state_dict_post_hook(_follow_weights)  # type: ignore[no-untyped-call]
        self._record()

    # -------------------------------------------------------------------------------------------------- what is there
    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the logits that a call gives now, in order."""
        return self._plan.classes

    @property
    def clones(self) -> tuple[str, ...]:
        """Names of the attached clones, in the order of their logits, whether enabled or not."""
        return tuple(self._clones)

    @property
    def base_classes(self) -> tuple[str, ...]:
        """Names of the target's own logits."""
        return self._base_classes

    @property
    def base_priority(self) -> float:
        """Nats that are taken off all new logits: 0 by default; more keeps more images with the base classes.

        It trades leak against accuracy on new classes, after the fact and without any data. It is a setting like
        `training`: copied and pickled with the composite, but no part of its state dict.
        """
        return self._base_priority

    @base_priority.setter
    def base_priority(self, nats: float) -> None:
        if isinstance(nats, bool) or not isinstance(nats, int | float) or not math.isfinite(nats):
            raise InputError(f"base_priority must be a finite number of nats, 0 for none; got {nats!r}")
        with _LOCK:
            self._base_priority = float(nats)
            self._update_plan()

    def status(self) -> tuple[CloneStatus, ...]:
        """Say what is attached where and what it costs, clone by clone in the order of the logits."""
        with _LOCK:
            return tuple(status_of(clone, branch, clone.name in self._plan.names) for clone, branch in self._pairs())

    def clone(self, name: str) -> Clone:
        """Give an attached clone as it is here, calibration and weights included, as a value of its own: to be saved.

        It is float32, on the CPU, whatever the composite was cast to.

        Raises:
            InputError: no clone of that name is attached.
        """
        with _LOCK:
            self._check_names([name])
            found, branch = next(pair for pair in self._pairs() if pair[0].name == name)
        return replace(found, branch=copy.deepcopy(branch).cpu().float())

    # -------------------------------------------------------------------------------------------------- come and go
    def attach(
        self,
        clone: Clone,
        *,
        name: str | None = None,
        rename: Mapping[str, str] | None = None,
        allow_mismatch: bool = False,
    ) -> Self:
        """Attach one more clone; its weights are copied.

        Args:
            clone: Made for this target.
            name: Another name for it, for when its own is taken.
            rename: Other names for some of its classes, {old: new}, for when they are taken.
            allow_mismatch: As in `pnc.attach`.
        Raises:
            MismatchError: the clone was made for another target.
            ClassNameError: it has a class that is there already, or none of a name in `rename`.
            InputError: a clone of that name is attached already.
        """
        check_clones([clone])
        clone = clone.renamed(name, rename)
        with _LOCK, torch.inference_mode(False):
            check_names(clone, self._base_classes, self._clones.values())
            self._recorded.check([clone], allow_mismatch)
            branch = copy.deepcopy(clone.branch).to(self._recorded.probe.device)
            self._replace([*self._pairs(), (clone, branch)])
        return self

    def detach(self, name: str) -> Clone:
        """Take a clone out, in any order; the others and the target stay as they are.

        Returns:
            The clone as it was attached; `clone(name)` before gives it as `calibrate` has changed it.
        Raises:
            InputError: no clone of that name is attached.
        """
        with _LOCK:
            self._check_names([name])
            found = self._clones[name]
            self._replace([pair for pair in self._pairs() if pair[0].name != name])
        return found

    def rescale(self, scalars: Mapping[str, Scalars], *, found_on: Plan | None = None) -> Self:
        """Set the scalars of some clones, all at once: `calibrate` finds good ones; `Scalars()` is none.

        Args:
            scalars: By name of the clone.
            found_on: The set of clones that they were found for, from `now`: refuse them if one is another by now.
        Raises:
            InputError: no clone of such a name is attached, it has another number of classes, or it was replaced.
        """
        with _LOCK, torch.inference_mode(False):
            if found_on is not None:
                found_on.check_there([branch for _, branch in self._pairs()])
            self._check_names(list(scalars))
            self._replace(
                [
                    (clone, branch.rescaled(scalars[clone.name]) if clone.name in scalars else branch)
                    for clone, branch in self._pairs()
                ]
            )
        return self

    @contextmanager
    def disabled(self) -> Iterator[Self]:
        """Within the block the composite is the target alone: it gives the base logits only, in every thread."""
        with self._block(Block(())):
            yield self

    @contextmanager
    def only(self, *names: str) -> Iterator[Self]:
        """Within the block only these clones give logits, in the order of attachment, in every thread.

        Of blocks within each other the innermost counts alone.

        Raises:
            InputError: no clone of such a name is attached, or no name is given.
        """
        if not names:
            raise InputError("names: give at least one clone, or use disabled() for the target alone")
        self._check_names(names)
        with self._block(Block(names)):
            yield self

    # -------------------------------------------------------------------------------------------------- as a module
    def forward(self, images: Tensor, only: WantedClones | None = None) -> Tensor:
        """Give logits (B, K_base + K_new) for images (B, C, H, W).

        Args:
            images: Of the clones' `input_shape`, in the target's dtype; all of them go through the target, once.
            only: For each image the clones that are wanted: a name, several or none of them, or None for all that are
                enabled. A clone runs on those images alone that want it; for the others its logits are -inf, which is
                a probability of 0.
        Raises:
            InputError: the images are of another size or dtype, or outside of the target's `image_range`; `only` has
                not one entry for each image, or names a clone that is not enabled.
        """
        check_values(images, self.target, "the target")
        return self._plan.logits(images, only)

    def fused(self) -> FusedComposite:
        """Give the inference form of the clones that are enabled now: fewer operations for the same logits.

        Base logits keep their bits, new ones differ by rounding. What is attached, calibrated or loaded afterwards does
        not reach it.

        Raises:
            PNCError: on a batch of random images it differs by more than rounding.
        """
        with undisturbed():
            return FusedComposite(self._plan)

    def log_odds(self, images: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Give what calibration starts from: `Plan.log_odds`."""
        check_values(images, self.target, "the target")
        return self._plan.log_odds(images)

    def now(self) -> Plan:
        """Give what a call reads now: one set of clones."""
        return self._plan

    def train(self, mode: bool = True) -> Self:
        """Set the flag of the composite alone: neither the target nor a clone ever leaves eval mode through it."""
        self.training = mode
        return self

    def verify(self, before: Snapshot | None = None, *, images: Tensor | None = None) -> Report:
        """Run the target's own forward beside its recording, and compare it with what the clones were made for.

        Args:
            before: From `pnc.snapshot(target)`: everything of the target is compared with that too.
            images: Your own, (N, C, H, W), besides random ones.
        """
        changed, clones = self._recorded.watch.difference(), list(self._clones.values())
        return verify_composite(self, self.target, changed, clones, images, before)

    def refresh(self, *, allow_mismatch: bool = False) -> Self:
        """Record the target again, after layers, hooks, parameters or settings of it were replaced on purpose.

        Args:
            allow_mismatch: Go on with clones that were made for the target as it was, as in `pnc.attach`.
        Raises:
            MismatchError: the clones were made for another target than it is now; the composite refuses calls as
                before.
            RecordingError: the target cannot be recorded.
        """
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
        # Copies and pickles would copy the recording's weights apart from the target's, and blocks that never end.
        kept = {name: value for name, value in self.__dict__.items() if name not in _RECORDED}
        return {**kept, "_blocks": (), "_modules": dict(self._modules)}  # a shallow copy has modules of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._record()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._record()  # the target's tensors are others now, and a recording holds devices as constants
        return self

    def _replicate_for_data_parallel(self) -> Self:
        raise InputError(
            "a composite cannot be spread over several devices by DataParallel; give DataParallel one device, or use "
            "DistributedDataParallel with one process for each"
        )

    # -------------------------------------------------------------------------------------------------- inside
    def _pairs(self) -> list[tuple[Clone, Branch]]:
        return [(clone, cast(Branch, b)) for clone, b in zip(self._clones.values(), self.branches, strict=True)]

    def _replace(self, pairs: list[tuple[Clone, Branch]]) -> None:
        branches = nn.ModuleList(branch for _, branch in pairs)
        branches.training = False
        self.branches, self._clones = branches, {clone.name: clone for clone, _ in pairs}
        self._update_plan()

    def _check_names(self, names: list[str] | tuple[str, ...]) -> None:
        unknown = [name for name in names if name not in self._clones]
        if unknown:
            raise InputError(f"name: {unknown_name(unknown[0], self.clones, 'clone')}")

    @contextmanager
    def _block(self, block: Block) -> Iterator[None]:
        """Enter a block of enabled clones; blocks may end in any order, as threads do."""
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
        taps, views = [clone.target_cut for clone, _ in pairs], [clone.target_features for clone, _ in pairs]
        cuts, features = tuple(dict.fromkeys(taps)), tuple(dict.fromkeys(views))
        plan = Plan(
            trunk=self._recorded.trunk(tuple(cut.name for cut in (*cuts, *features))),
            features=features,
            taps=tuple(map(cuts.index, taps)),
            views=tuple(map(features.index, views)),
            names=tuple(clone.name for clone, _ in pairs),
            branches=tuple(branch for _, branch in pairs),
            calibrated=tuple(not branch.scalars.is_identity for _, branch in pairs),
            classes=(*self._base_classes, *(name for clone, _ in pairs for name in clone.classes)),
            base_priority=self._base_priority,
            clones=tuple(clone for clone, _ in pairs),
            probe=self._recorded.probe,
            watch=self._recorded.watch,
        )
        # Past Module.__setattr__: the trunk shares the target's weights, registered it would list each of them twice.
        self.__dict__["_plan"] = plan


def attach(target: nn.Module | NamedNetwork, *clones: Clone, allow_mismatch: bool = False) -> Composite:
    """Put clones into a target: a new module around it, while the target itself stays as it is, bit for bit.

    The target's forward pass is recorded, and compared with the recording, bit for bit, on random images at batch sizes
    1 and 4. The target is compared with the one that each clone was made for: names, types, shapes and values of all
    tensors, a digest of the recorded graph, and answers to a fixed pattern. Nothing is compared on images of yours:
    that is `net.verify(images=...)`.

    Args:
        target: The network that the clones were made for; or what `load_model` gave: its names are compared too.
        clones: One or more; `Clone.renamed` helps where two have a name or a class in common.
        allow_mismatch: Attach them to another target too, such as a fine-tuned one, if they fit; check what comes out.
    Raises:
        InputError: no clone is given, two have one name, or the target is a composite.
        MismatchError: a clone was made for another target; with `allow_mismatch`, it does not fit to this one.
        ClassNameError: two classes have one name, or two clones call the target's outputs differently.
        RecordingError: the target cannot be recorded.
    """
    target = network_of(target, clones)
    check_flag(allow_mismatch, "allow_mismatch")
    if isinstance(target, Composite):
        raise InputError("target is a composite already; use its method attach, composite.attach(clone)")
    known = KnownFingerprint()
    if not allow_mismatch:
        check_target(target, clones, known)
    composite = Composite(target, clones[0], known)
    for clone in clones:
        composite.attach(clone, allow_mismatch=True)  # the weights, which take longest, were compared once for all
    if not allow_mismatch:
        check_forward(composite._recorded.forward_print, clones)
    return composite


def _follow_weights(composite: nn.Module, incompatible_keys: object) -> None:
    """Record the target anew once weights were loaded, which may have replaced its tensors (`assign=True`)."""
    assert isinstance(composite, Composite)
    composite._record()
