"""The forward pass of a composite as immutable data, replaced whenever its clones change."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from pnc.clones.branch import Branch
from pnc.clones.clone import Clone
from pnc.clones.position_grids import pool
from pnc.composite.target_watch import TargetWatch
from pnc.foundation.class_names import unknown_name
from pnc.foundation.errors import InputError
from pnc.foundation.tensor_bits import dtype_name
from pnc.graph.cut_points import CutPoint

WantedClones = Sequence[str | Collection[str] | None]
"""The clones to run for each image: a name, a collection of names (may be empty), or None for all enabled ones."""

_EXAMPLE = "['pets', ('pets', 'birds'), (), None]"


@dataclass(frozen=True)
class CloneStatus:
    """One attached clone, as listed by `Composite.status`.

    Attributes:
        name: Its name.
        classes: Its classes, in the order of its logits.
        target_cut: Name of the target's tensor that it reads.
        source_cut: Name of the source's tensor that its adapter replaces.
        n_macs: Multiply-accumulates that it adds per image.
        n_params: Number of values that it adds.
        n_bytes: Size of the tensors that hold them, in their present dtypes.
        density: Share of the prunable MACs of the source's part that was kept.
        calibrated: Whether it has calibration scalars.
        enabled: Whether a call returns its logits now; see `Composite.disabled` and `Composite.only`.
    """

    name: str
    classes: tuple[str, ...]
    target_cut: str
    source_cut: str
    n_macs: int
    n_params: int
    n_bytes: int
    density: float
    calibrated: bool
    enabled: bool


def status_of(clone: Clone, branch: Branch, enabled: bool) -> CloneStatus:
    """Describe a clone and the attached copy of its branch."""
    tensors = [*branch.parameters(), *branch.buffers()]
    return CloneStatus(
        name=clone.name,
        classes=clone.classes,
        target_cut=clone.target_cut.name,
        source_cut=clone.source_cut.name,
        n_macs=branch.n_macs,
        n_params=sum(tensor.numel() for tensor in tensors),
        n_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        density=float(clone.recipe.get("density", 1.0)),
        calibrated=not branch.scalars.is_identity,
        enabled=enabled,
    )


@dataclass(frozen=True, eq=False)
class Block:
    """One `with` block in which only the clones with these names are enabled."""

    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """One forward pass. A call reads one plan, so it always uses one consistent set of clones.

    Attributes:
        trunk: Maps images to the target's tensors that branches read, then those that heads read, then its logits.
        features: Cuts of the tensors that heads read.
        taps: For each branch, the index of the tensor that it reads.
        views: For each branch, the index of the features that its head reads.
        names: Names of the clones that run.
        branches: Their branches.
        calibrated: For each branch, whether its scalars have any effect; if not, they are skipped.
        classes: Names of all logits.
        base_priority: Nats subtracted from the new logits.
        probe: The images that the target was recorded with.
        clones: The clones that run; `branches` are copies of theirs.
        watch: Detects changes of the target since it was recorded.
    """

    trunk: fx.GraphModule
    features: tuple[CutPoint, ...]
    taps: tuple[int, ...]
    views: tuple[int, ...]
    names: tuple[str, ...]
    branches: tuple[Branch, ...]
    calibrated: tuple[bool, ...]
    classes: tuple[str, ...]
    base_priority: float
    probe: Tensor
    clones: tuple[Clone, ...]
    watch: TargetWatch

    @property
    def owners(self) -> dict[str, str]:
        """Name of the clone of each class that is a clone's."""
        return {name: clone.name for clone in self.clones for name in clone.classes}

    @property
    def uncalibrated(self) -> tuple[str, ...]:
        """Names of the clones that were never calibrated; empty if there is only one clone."""
        names = zip(self.names, self.calibrated, strict=True)
        return tuple(name for name, is_calibrated in names if not is_calibrated) if len(self.names) > 1 else ()

    def logits(self, images: Tensor, only: WantedClones | None = None) -> Tensor:
        """Compute logits (B, K_base + K_new) for images (B, C, H, W); see `Composite.forward`."""
        rows = [None] * len(self.names) if only is None else self._rows(only, images.shape[0])
        inputs, logits = self._run(images)
        if not self.branches:
            return logits
        new = [self._new(place, rows[place], *seen, logits) for place, seen in enumerate(inputs)]
        if self.base_priority:
            new = [one - self.base_priority for one in new]
        return torch.cat([logits, *new], 1)

    def check_there(self, branches: Sequence[Branch]) -> None:
        """Raise an `InputError` unless all branches of this plan are still attached."""
        for name, branch in zip(self.names, self.branches, strict=True):
            if not any(branch is other for other in branches):
                raise InputError(f"net: clone {name!r} was detached, replaced or rescaled meanwhile; calibrate again")

    def _new(self, place: int, rows: list[int] | None, *inputs: Tensor) -> Tensor:
        """New logits (B, K_new) of the clone at index `place`: -inf except in the given rows; None means all rows."""
        branch = self.branches[place]
        run = branch if self.calibrated[place] else branch.head_logits
        if rows is None:
            return run(*inputs)
        logits = inputs[-1].new_full((inputs[-1].shape[0], len(branch.offset)), -torch.inf)
        if rows:
            index = torch.tensor(rows, device=logits.device)
            logits = logits.index_copy(0, index, run(*(one.index_select(0, index) for one in inputs)))
        return logits

    def _rows(self, only: WantedClones, n_images: int) -> list[list[int] | None]:
        """For each clone the rows that want it; None if all do."""
        if isinstance(only, str) or not isinstance(only, Sequence):
            raise InputError(f"only: expected a list with one entry for each image, such as {_EXAMPLE}; got {only!r}")
        if len(only) != n_images:
            raise InputError(f"only: expected one entry for each of {n_images} images; got {len(only)}")
        asked = [self._names(row, entry) for row, entry in enumerate(only)]
        rows = [[row for row, names in enumerate(asked) if name in names] for name in self.names]
        return [None if len(of_clone) == n_images else of_clone for of_clone in rows]

    def _names(self, row: int, entry: str | Collection[str] | None) -> Collection[str]:
        """Names of the clones that one entry wants."""
        names = self.names if entry is None else (entry,) if isinstance(entry, str) else entry
        if not isinstance(names, Collection):
            raise InputError(f"only: row {row}: expected a name, several, or None for all clones; got {entry!r}")
        for name in names:
            if name not in self.names:
                raise InputError(f"only: row {row}: {unknown_name(str(name), self.names, 'enabled clone')}")
        return names

    def log_odds(self, images: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Compute the inputs of calibration.

        Returns:
            The target's logits (B, K_base); and, by name, each enabled clone's uncalibrated logits minus the logsumexp
            of those, (B, K_new), with its features, (B, D_s).
        """
        inputs, logits = self._run(images)
        level = logits.logsumexp(1, keepdim=True)
        found = {}
        for name, (tensor, target_features), branch in zip(self.names, inputs, self.branches, strict=True):
            features = branch.stitched(tensor)
            found[name] = (branch.head(target_features, features, logits) - level, features)
        return logits, found

    def _run(self, images: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """For each branch the tensor and the pooled features that it reads, and the target's logits."""
        check_like(images, self.probe)
        self.watch.check()
        found = self.trunk(images)
        if not self.branches:
            return [], found
        *tensors, logits = found
        n_taps = len(tensors) - len(self.features)
        pooled = [pool(tensor, cut) for tensor, cut in zip(tensors[n_taps:], self.features, strict=True)]
        return [(tensors[tap], pooled[view]) for tap, view in zip(self.taps, self.views, strict=True)], logits


def check_like(images: Tensor, probe: Tensor) -> None:
    """Refuse images of another size or dtype than in the recording, which holds for these only."""
    if not isinstance(images, Tensor):
        raise InputError(f"images: expected a tensor (B, C, H, W); got {type(images).__name__}")
    if images.shape[1:] != probe.shape[1:] or images.dtype != probe.dtype:
        expected, came = (f"{tuple(one.shape[1:])} {dtype_name(one.dtype)}" for one in (probe, images))
        raise InputError(
            f"images: a composite takes images like those that its clones were made with, (B, C, H, W) with {expected} "
            f"each; got {came}; resize or cast them"
        )
