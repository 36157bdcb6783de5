"""A target with clones attached: one ordinary module whose base logits are the target's own, bit for bit."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor, fx, nn

from pnc.cloning import Branch, Clone
from pnc.cuts import LOGITS, extract
from pnc.errors import ClassNameError, InputError, MismatchError
from pnc.graph import record
from pnc.integrity import first_difference
from pnc.stitching import pool


@dataclass(frozen=True, eq=False)
class _Plan:
    """What one forward pass runs; replaced whole when clones come and go, so that no pass sees a mixture."""

    trunk: fx.GraphModule
    taps: tuple[int, ...]
    branches: tuple[Branch, ...]


class Composite(nn.Module):
    """A target and its clones. Made by `attach`.

    It takes what the target takes, (B, C, H, W), and gives logits (B, K_base + K_new): the target's, then each clone's
    in the order of attachment; `classes` names them. The target is neither copied nor changed: the composite runs the
    target's recorded forward pass over the target's own weights, always in eval mode, and reads the tensors that the
    clones need. Moving or casting the composite moves or casts the target with it, as with any module inside another.
    """

    _plan: _Plan

    def __init__(self, target: nn.Module, clone: Clone) -> None:
        super().__init__()
        self.target = target
        self.branches = nn.ModuleList()
        self._base_classes, self._features = clone.base_classes, clone.target_features
        self._input_shape = clone.input_shape
        self._clones: dict[str, Clone] = {}
        self._enabled = True
        self.branches.training = self.training = False
        self._record()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the logits, in order."""
        return (*self._base_classes, *(name for clone in self._clones.values() for name in clone.classes))

    @property
    def clones(self) -> tuple[str, ...]:
        """Names of the attached clones, in the order of their logits."""
        return tuple(self._clones)

    def attach(self, clone: Clone) -> Self:
        """Attach one more clone; its weights are copied.

        Raises:
            MismatchError: the clone was made for another target.
            ClassNameError: it has a class that is there already.
            InputError: a clone of that name is attached already.
        """
        self._check(clone)
        self.branches.append(copy.deepcopy(clone.branch).to(self._recording.probe.device))
        self._clones[clone.name] = clone
        self._update_plan()
        return self

    def detach(self, name: str) -> Clone:
        """Take a clone out, in any order; the others and the target stay as they are.

        Raises:
            InputError: no clone of that name is attached.
        """
        if name not in self._clones:
            attached = ", ".join(self._clones) or "none"
            raise InputError(f"name: there is no clone {name!r}; attached: {attached}")
        index = list(self._clones).index(name)
        clone = self._clones.pop(name)
        del self.branches[index]
        self._update_plan()
        return clone

    @contextmanager
    def disabled(self) -> Iterator[Self]:
        """Within the block the composite is the target alone: it gives the base logits only."""
        self._enabled = False
        self._update_plan()
        try:
            yield self
        finally:
            self._enabled = True
            self._update_plan()

    def forward(self, images: Tensor) -> Tensor:
        """Give logits (B, K_base + K_new) for images (B, C, H, W)."""
        plan: _Plan = self._plan
        *tensors, features, logits = plan.trunk(images)
        pooled = pool(features, self._features)
        new = [branch(tensors[tap], pooled, logits) for tap, branch in zip(plan.taps, plan.branches, strict=True)]
        return torch.cat([logits, *new], 1) if new else logits

    def train(self, mode: bool = True) -> Self:
        """Set the flag of the composite alone: neither the target nor a clone ever leaves eval mode through it."""
        self.training = mode
        return self

    def extra_repr(self) -> str:
        """Name what is attached."""
        return ", ".join(f"{clone.name}: {', '.join(clone.classes)}" for clone in self._clones.values())

    def _check(self, clone: Clone) -> None:
        if clone.name in self._clones:
            raise InputError(
                f"clone: one named {clone.name!r} is attached already; detach it, or clone with another name="
            )
        clash = [name for name in clone.classes if name in self.classes]
        if clash:
            raise ClassNameError(f"clone {clone.name!r}: the composite has a class {clash[0]!r} already")
        check_target(self.target, clone)

    def _record(self) -> None:
        parameter = next(self.target.parameters(), torch.empty(0))
        example = torch.rand(2, *self._input_shape, generator=torch.Generator().manual_seed(0))
        self._recording = record(self.target, example.to(parameter.device, parameter.dtype))
        self._update_plan()

    def _update_plan(self) -> None:
        branches = tuple(cast(Branch, branch) for branch in self.branches) if self._enabled else ()
        wanted = [branch.stitched.adapter.target_cut for branch in branches]
        cuts = list(dict.fromkeys(wanted))
        trunk = extract(self._recording, None, [*cuts, self._features, LOGITS])
        # Past Module.__setattr__: the trunk shares the target's weights, registered it would list each of them twice.
        self.__dict__["_plan"] = _Plan(trunk, tuple(cuts.index(cut) for cut in wanted), branches)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._record()  # the target's tensors are others now, and a recording holds devices as constants
        return self


def attach(target: nn.Module, *clones: Clone) -> Composite:
    """Put clones into a target: a new module around it, while the target itself stays as it is, bit for bit.

    Args:
        target: The network that the clones were made for.
        clones: One or more.
    Raises:
        InputError: no clone is given, two have one name, or the target is a composite.
        MismatchError: a clone was made for another target.
        ClassNameError: two classes have one name.
        RecordingError: the target cannot be recorded.
    """
    if not clones:
        raise InputError("clones: give at least one")
    if isinstance(target, Composite):
        raise InputError("target is a composite already; use its method attach")
    check_target(target, clones[0])
    composite = Composite(target, clones[0])
    for clone in clones:
        composite.attach(clone)
    return composite


def check_target(target: nn.Module, clone: Clone) -> None:
    """Raise a `MismatchError` unless `clone` was made for `target` with the weights that it has now."""
    difference = first_difference(target, clone.target)
    if difference is not None:
        raise MismatchError(
            f"clone {clone.name!r} was made for another target: {difference}; attach it to that one, or clone again"
        )
