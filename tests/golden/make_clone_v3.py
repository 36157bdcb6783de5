"""Makes the clone files of format version 3 that stay in this folder, and the logits that they must give.

Run it from the root of a checkout, `python tests/golden/make_clone_v3.py`, before the first release only; see
`make_clone_v1.py`, whose networks and images these are. Version 3 adds the structure of the part.
"""

import json
import runpy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pnc
from pnc.method.task import prepare_task

FOLDER = Path(__file__).parent


class Scaled(nn.Module):
    """A layer of nobody's library: a file holds the operations that it consists of."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, n_channels))
        self.register_buffer("shift", torch.full((1,), 0.25), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift the channels of (B, C, H, W)."""
        return x * self.scale[:, None, None] + self.shift


def with_own_layer(source: nn.Module) -> nn.Module:
    """The same network with a layer of its own before the last convolution."""
    assert isinstance(source, nn.Sequential)
    return nn.Sequential(*source[:6], Scaled(6), *source[6:]).eval()


def clones(v1: dict[str, Any]) -> dict[str, pnc.Clone]:
    """Clones by the names of their files."""
    names = {"classes": v1["NEW"], "source_classes": v1["NEW"], "base_classes": v1["BASE"]}
    labels = [[*v1["BASE"], *v1["NEW"]][index % 7] for index in range(28)]
    made = {}
    for name, source, density in (
        ("clone_v3_half", v1["source"](), 0.5),
        ("clone_v3_own_layer", with_own_layer(v1["source"]()), 1.0),
    ):
        task = prepare_task(source, v1["target"](), (v1["images"](28), labels), **names)
        found = pnc.scan(task, exhaustive=True)
        place = found.adapter(max(found.positions, key=lambda position: position.n_params))
        made[name] = pnc.fit(task, place, density=density, tune="none", name="v3")
    return made


def main() -> None:
    """Write all files."""
    v1, logits = runpy.run_path(str(FOLDER / "make_clone_v1.py")), {}
    for name, made in clones(v1).items():
        pnc.save(made, FOLDER / f"{name}.safetensors", "full")
        with torch.no_grad():
            logits[name] = pnc.attach(v1["target"](), made)(v1["images"](3)).tolist()
    (FOLDER / "clone_v3.json").write_text(json.dumps(logits, indent=1) + "\n")


if __name__ == "__main__":
    main()
