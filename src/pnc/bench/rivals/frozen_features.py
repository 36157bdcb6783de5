"""Frozen features of one network, the target or the source, for rivals that put a classifier on them."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnc.clones.position_grids import pool
from pnc.graph.cut_points import CutPoint, extract
from pnc.method.task import CloneTask, Network

Role = Literal["target", "source"]
"""Whose features."""


class Features(nn.Module):
    """A network up to its penultimate features; it shares the network's weights."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.features: CutPoint = network.head.features
        self.network = extract(network.recording, None, [self.features])

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, D), float32, for images (B, C, H, W)."""
        return pool(self.network(images), self.features).float()


class Linear(nn.Module):
    """A linear classifier with fixed weight (K, D) and bias (K,)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())
        self.weight: Tensor
        self.bias: Tensor

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, K) for features (B, D)."""
        return F.linear(features, self.weight, self.bias)


def features_of(task: CloneTask, role: Role = "target") -> Tensor:
    """Penultimate features of the support in one network, (N, D), float32 on the CPU."""
    network, device = Features(_network(task, role)), task.target.device
    with torch.no_grad():
        return torch.cat([network(images.to(device)).cpu() for images in task.samples.images.split(task.batch_size)])


def on_features(task: CloneTask, classifier: nn.Module, role: Role = "target") -> nn.Module:
    """Put a classifier on the features of one network; the other network is not run."""
    return nn.Sequential(Features(_network(task, role)), classifier.to(task.target.device)).eval()


def _network(task: CloneTask, role: Role) -> Network:
    return task.target if role == "target" else task.source
