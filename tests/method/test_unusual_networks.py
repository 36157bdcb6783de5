"""Networks as people write them that once ended in a traceback, or in a clone that could not be saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pnc
from pnc.foundation.errors import InputError, RecordingError

BASE, NEW = ("ant", "bee"), ("cat", "dog")
NAMES: dict[str, Any] = {"source_classes": NEW, "base_classes": BASE}
IMAGES = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SUPPORT = IMAGES, [(*BASE, *NEW, *NEW)[place % 6] for place in range(24)]

pytestmark = pytest.mark.filterwarnings("ignore::pnc.foundation.errors.PNCWarning")  # untrained: right by chance


def plain() -> nn.Module:
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    return nn.Sequential(*layers).eval()


class WindowedAttention(nn.Module):
    """Runs `nn.MultiheadAttention` on four windows of each image: its batch is four times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.fc = nn.Conv2d(3, 12, 4, 4), nn.Linear(12, 2)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.patches(x).permute(0, 2, 3, 1)
        n, height, width, channels = maps.shape
        windows = maps.reshape(n, 2, 2, 2, 2, channels).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 4, channels)
        windows = self.attention(windows, windows, windows, need_weights=False)[0]
        maps = windows.view(n, 2, 2, 2, 2, channels).permute(0, 1, 3, 2, 4, 5).contiguous()
        logits: Tensor = self.fc(maps.view(n, height, width, channels).mean((1, 2)))
        return logits


class Experts(nn.Module):
    """Each image goes to one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.fc = nn.Conv2d(3, 12, 3), nn.Linear(12, 2), nn.Linear(12, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.first(x)).mean((2, 3))
        weight, chosen = self.gate(features).softmax(-1).max(-1)
        out = torch.zeros_like(features)
        for place, expert in enumerate(self.experts):
            rows = chosen == place
            out[rows] = expert(features[rows]) * weight[rows, None]
        logits: Tensor = self.fc(features + out)
        return logits


class Turned(nn.Module):
    """Its channels are the second image dim for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.relu(self.first(x)).permute(0, 2, 1, 3)
        logits: Tensor = self.fc(torch.relu(self.second(turned)).mean((2, 3)))
        return logits


class Gated(nn.Module):
    """Weighs every place by the mean over its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.relu(self.first(x))
        maps = maps * torch.sigmoid(maps.mean(1, keepdim=True))
        logits: Tensor = self.fc(torch.relu(self.second(maps)).mean((2, 3)))
        return logits


def part_of(source: nn.Module) -> pnc.Clone:
    return pnc.clone(source.eval(), plain(), SUPPORT, density=0.5, tune="none", **NAMES)


def test_attention_in_windows_can_lose_channels() -> None:
    assert part_of(WindowedAttention()).masks is not None


def test_channels_of_experts_cannot_be_ranked() -> None:
    with pytest.raises(InputError, match=r"density: .* choose the rows of experts_\w+; give density=1, or effort="):
        part_of(Experts())
    assert pnc.clone(Experts().eval(), plain(), SUPPORT, effort="seconds", **NAMES).classes == NEW


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_is_refused() -> None:
    for role in range(2):
        networks = [plain(), plain()]
        networks[role] = torch.jit.script(networks[role])
        with pytest.raises(RecordingError, match="TorchScript cannot be recorded"):
            pnc.clone(*networks, SUPPORT, effort="seconds", **NAMES)


def test_a_clone_at_any_position_can_be_saved(tmp_path: Path) -> None:
    task = pnc.prepare_task(plain(), Turned().eval(), SUPPORT, classes=None, **NAMES)
    found = pnc.scan(task, exhaustive=True, max_cuts=20)
    for position in found.positions:
        pnc.save(pnc.fit(task, found.adapter(position)), tmp_path / "clone.safetensors")


def test_a_full_file_holds_means_over_channels_that_were_removed(tmp_path: Path) -> None:
    pnc.save(part_of(Gated()), tmp_path / "clone.safetensors", kind="full")
    assert not pnc.inspect(tmp_path / "clone.safetensors")["needs_source"]
    assert pnc.load(tmp_path / "clone.safetensors").classes == NEW


def test_answers_that_depend_on_the_batch_are_doubted() -> None:
    mixing = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), *plain()[1:]).eval()
    with pytest.warns(pnc.PNCWarning, match="the source's answers to an image depend on the other images of its batch"):
        pnc.clone(mixing, plain(), SUPPORT, effort="seconds", **NAMES)
