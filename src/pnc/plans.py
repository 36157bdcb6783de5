"""What a composite runs, as data: replaced whole whenever clones come and go; and what is attached where."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from pnc.branch import Branch
from pnc.cloning import Clone
from pnc.cuts import CutPoint
from pnc.stitching import pool


@dataclass(frozen=True)
class CloneStatus:
    """One attached clone, as `Composite.status` lists it.

    Attributes:
        name: By which it is detached.
        classes: Its classes, in the order of its logits.
        target_cut: Name of the target's tensor that it reads.
        source_cut: Name of the source's tensor that its adapter makes of that.
        n_macs: Multiply-accumulates that it adds for one image.
        n_params: Number of values that it adds.
        n_bytes: Of the tensors that hold them, as they are now.
        density: Share of the prunable MACs of the source's part that was kept.
        calibrated: Whether `calibrate` has moved its logits.
        enabled: Whether its logits are given now; not so within `disabled()` or `only()` of others.
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
    """Sum up a clone and the copy of its branch that is attached."""
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
class Plan:
    """One forward pass. A call reads one plan, so that it sees all of one set of clones and nothing of another.

    Attributes:
        trunk: From images to the target's tensors that the branches read, its features and its logits.
        features: The cut of those features.
        taps: For each branch which of the trunk's tensors it reads.
        names: Of the clones that run.
        branches: Theirs.
        classes: Names of all logits.
        base_priority: Nats that are taken off the new logits.
    """

    trunk: fx.GraphModule
    features: CutPoint
    taps: tuple[int, ...]
    names: tuple[str, ...]
    branches: tuple[Branch, ...]
    classes: tuple[str, ...]
    base_priority: float

    def logits(self, images: Tensor) -> Tensor:
        """Give logits (B, K_base + K_new) for images (B, C, H, W)."""
        *tensors, features, logits = self._run(images)
        if not self.branches:
            return logits
        pooled = pool(features, self.features)
        new = [branch(tensors[tap], pooled, logits) for tap, branch in zip(self.taps, self.branches, strict=True)]
        if self.base_priority:
            new = [one - self.base_priority for one in new]
        return torch.cat([logits, *new], 1)

    def log_odds(self, images: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Give the target's logits, each clone's uncalibrated log-odds and its features: `Composite.log_odds`."""
        *tensors, features, logits = self._run(images)
        pooled, level = pool(features, self.features), logits.logsumexp(1, keepdim=True)
        found = {}
        for name, tap, branch in zip(self.names, self.taps, self.branches, strict=True):
            new, own_features = branch.head_logits(tensors[tap], pooled, logits)
            found[name] = (new - level, own_features)
        return logits, found

    def _run(self, images: Tensor) -> tuple[Tensor, ...]:
        """The tensors that the branches read, the target's features and its logits."""
        tensors: tuple[Tensor, ...] = self.trunk(images)
        return tensors
