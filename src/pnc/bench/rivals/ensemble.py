"""Direct ensemble: both networks run, and the source's logits of the new classes follow the target's."""

import torch
from torch import Tensor, nn

from pnc.bench.rivals.rival import Budget, Fitted, Rival
from pnc.method.task import CloneTask


class DirectEnsemble(nn.Module):
    """The target's logits, then the source's logits of the chosen classes.

    Args:
        target: Gives the base logits.
        source: Gives logits that include the new classes.
        source_ids: Indices of the new classes among them.
        scales: Factors of the target's and the source's logits; None leaves both unchanged.
        offset: Added to the new logits.
    """

    def __init__(
        self,
        target: nn.Module,
        source: nn.Module,
        source_ids: list[int],
        scales: tuple[float, float] | None = None,
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.target, self.source, self.source_ids = target, source, source_ids
        self.scales, self.offset = scales, offset

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K_base + K_new) for images (B, C, H, W)."""
        base, new = self.target(images), self.source(images)[:, self.source_ids]
        if self.scales is not None:
            base, new = base * self.scales[0], new * self.scales[1] + self.offset
        return torch.cat([base, new], 1)


def fit(task: CloneTask, budget: Budget) -> Fitted:
    """Put both networks side by side; nothing is fitted, so the support does not matter."""
    return Fitted(DirectEnsemble(task.target.recording.module, task.source.recording.module, task.source_ids))


RIVAL = Rival("direct ensemble", "ensemble", fit)
