"""Direct ensemble: both networks run, and the source's logits of the new classes are put beside the target's."""

import torch
from torch import Tensor, nn

from pnc.task import CloneTask


class DirectEnsemble(nn.Module):
    """The target's logits, then the source's of the chosen classes."""

    def __init__(self, target: nn.Module, source: nn.Module, source_ids: list[int]) -> None:
        super().__init__()
        self.target, self.source, self.source_ids = target, source, source_ids

    def forward(self, images: Tensor) -> Tensor:
        """Give logits (B, K_base + K_new) for images (B, C, H, W)."""
        return torch.cat([self.target(images), self.source(images)[:, self.source_ids]], 1)


def fit(task: CloneTask) -> nn.Module:
    """Nothing is fitted, so the support does not matter; every sample costs both networks."""
    return DirectEnsemble(task.target.recording.module, task.source.recording.module, task.source_ids)
