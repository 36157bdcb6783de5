"""What rivals share that put a classifier on the target's frozen features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnc.cuts import CutPoint, extract
from pnc.stitching import pool
from pnc.task import CloneTask


class TargetFeatures(nn.Module):
    """The target up to its penultimate features, over its own weights."""

    def __init__(self, task: CloneTask) -> None:
        super().__init__()
        self.features: CutPoint = task.target.head.features
        self.network = extract(task.target.recording, None, [self.features])

    def forward(self, images: Tensor) -> Tensor:
        """Give features (B, D), float32, for images (B, C, H, W)."""
        return pool(self.network(images), self.features).float()


class Linear(nn.Module):
    """A linear classifier that was not trained by gradient, (K, D) and (K,)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())
        self.weight: Tensor
        self.bias: Tensor

    def forward(self, features: Tensor) -> Tensor:
        """Give logits (B, K) for features (B, D)."""
        return F.linear(features, self.weight, self.bias)


@torch.no_grad()
def target_features(task: CloneTask) -> Tensor:
    """The target's penultimate features of the support, (N, D), float32 on the CPU."""
    network, device = TargetFeatures(task), task.target.device
    return torch.cat([network(images.to(device)).cpu() for images in task.samples.images.split(task.batch_size)])


def on_target(task: CloneTask, classifier: nn.Module) -> nn.Module:
    """Put a classifier on the target's features."""
    return nn.Sequential(TargetFeatures(task), classifier.to(task.target.device)).eval()
