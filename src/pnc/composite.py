"""A target with clones attached: one ordinary module whose base logits are the target's own, bit for bit."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from pnc.cloning import Branch, Clone
from pnc.cuts import LOGITS, CutPoint, extract
from pnc.errors import ClassNameError, InputError, MismatchError
from pnc.graph import Recording, record
from pnc.integrity import first_difference
from pnc.stitching import pool


@dataclass(frozen=True, eq=False)
class _Plan:
    """What one forward pass runs. Replaced whole when clones come and go, so that a running pass never sees a mixture."""

    trunk: fx.GraphModule
    taps: tuple[int, ...]
    branches: tuple[Branch, ...]


class Composite(nn.Module):
    """A target and its clones. Made by `attach`.

    The target is neither copied nor changed: the composite runs its recorded forward pass over its own modules and
    parameters, and reads the tensors that the clones need. It takes what the target takes, (B, C, H, W), and gives
    logits (B, K_base + K_new): the target's, then each clone's in the order of attachment; `classes` names them.

    Moving or casting the composite moves or casts the target with it, as with any module inside another.
    """

    def __init__(
        self, target: nn.Module, recording: Recording, base_classes: tuple[str, ...], features: CutPoint
    ) -> None:
        super().__init__()
        self.target = target
        self.branches = nn.ModuleList()
        self._recording, self._features = recording, features
        self._base_classes = base_classes
        self._clones: dict[str, Clone] = {}
        self._enabled = True
        # The trunk shares the target's modules; registered, it would list each of their tensors twice.
        self.__dict__["_plan"] = self._make_plan()
        self.eval()

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
        parameter = next(self.target.parameters(), None)
        branch = copy.deepcopy(clone.branch)
        if parameter is not None:
            branch = branch.to(parameter.device)
        self.branches.append(branch)
        self._clones[clone.name] = clone
        self.__dict__["_plan"] = self._make_plan()
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
        self.branches = nn.ModuleList(branch for k, branch in enumerate(self.branches) if k != index)
        self.__dict__["_plan"] = self._make_plan()
        return clone

    @contextmanager
    def disabled(self) -> Iterator[Self]:
        """Within the block the composite is the target alone: it gives the base logits only."""
        self._enabled = False
        self.__dict__["_plan"] = self._make_plan()
        try:
            yield self
        finally:
            self._enabled = True
            self.__dict__["_plan"] = self._make_plan()

    def forward(self, images: Tensor) -> Tensor:
        """Give logits (B, K_base + K_new) for images (B, C, H, W)."""
        plan: _Plan = self._plan
        if self.target.training:
            raise InputError(
                "the target was put into training mode, where its answers depend on the batch; call target.eval()"
            )
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
        difference = first_difference(self.target, clone.target)
        if difference is not None:
            raise MismatchError(
                f"clone {clone.name!r} was made for another target: {difference}; attach it to that one, or clone again"
            )

    def _make_plan(self) -> _Plan:
        branches = tuple(self.branches) if self._enabled else ()
        wanted = [branch.stitched.adapter.target_cut for branch in branches]
        cuts = list(dict.fromkeys(wanted))
        trunk = extract(self._recording, None, [*cuts, self._features, LOGITS])
        return _Plan(trunk, tuple(cuts.index(cut) for cut in wanted), branches)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._plan.trunk._apply(fn)  # a second time for what is shared, which changes nothing; its constants follow
        return self


def attach(target: nn.Module, *clones: Clone) -> Composite:
    """Put clones into a target: a new module around it, while the target itself stays as it is, bit for bit.

    Args:
        target: The network that the clones were made for, in eval mode.
        clones: One or more.
    Raises:
        InputError: no clone is given, two have one name, or the target is in training mode.
        MismatchError: a clone was made for another target.
        ClassNameError: two classes have one name.
        RecordingError: the target can no longer be recorded.
    """
    if not clones:
        raise InputError("clones: give at least one")
    if isinstance(target, Composite):
        raise InputError("target is a composite already; use its method attach")
    if target.training:
        raise InputError("target is in training mode, where its answers depend on the batch; call target.eval() first")
    first = clones[0]
    difference = first_difference(target, first.target)
    if difference is not None:
        raise MismatchError(
            f"clone {first.name!r} was made for another target: {difference}; attach it to that one, or clone again"
        )
    parameter = next(target.parameters(), torch.empty(0))
    example = torch.rand(2, *first.input_shape, generator=torch.Generator().manual_seed(0))
    recording = record(target, example.to(parameter.device, parameter.dtype))
    composite = Composite(target, recording, first.base_classes, first.target_features)
    for clone in clones:
        composite.attach(clone)
    return composite
