"""Makes the clone files of format version 1 that stay in this folder for ever, and the logits that they must give.

Run it from the root of a checkout, `python tests/golden/make_clone_v1.py`, before the first release only: afterwards
these files are what other people have, and every later version of pnc must read them. Networks and images are made by
arithmetic, not drawn, so that no random generator has to stay the same.
"""

import copy
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import pnc
from pnc.clones.branch import Branch, Scalars
from pnc.clones.heads import StackedHead
from pnc.method.task import prepare_task

FOLDER = Path(__file__).parent
BASE, NEW = ["ant", "bee", "cat"], ["dog", "eel", "fox", "gnu"]


def wave(shape: torch.Size, step: float) -> Tensor:
    """Numbers between -1 and 1 that no generator draws."""
    count = torch.arange(shape.numel(), dtype=torch.float64)
    return torch.sin(step * (count + 1) ** 1.5).reshape(shape).float()


def network(n_classes: int, step: float) -> nn.Module:
    """A small network with norms and an inner layer that can lose channels."""
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, n_classes),
    )
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        if tensor.is_floating_point():
            values = wave(tensor.shape, step + 0.1 * number) / 2
            tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)
    return model.eval()


def target() -> nn.Module:
    """The network that knows `BASE`."""
    return network(len(BASE), 0.7)


def source() -> nn.Module:
    """The network that knows `NEW`."""
    return network(len(NEW), 1.3)


def images(n_images: int) -> Tensor:
    """(N, 1, 8, 8)."""
    return (wave(torch.Size([n_images, 1, 8, 8]), 0.31) + 1) / 2


def clones() -> dict[str, tuple[pnc.Clone, str]]:
    """Clones of every kind that a file may hold: name of the file -> clone, kind of the file."""
    labels = [[*BASE, *NEW][index % 7] for index in range(28)]
    made = {}
    for n_images in (28, 0):
        chosen = [index for index in range(28) if n_images or labels[index] in NEW]
        support = images(28)[chosen], [labels[index] for index in chosen]
        names = {"classes": NEW, "source_classes": NEW, "base_classes": BASE}
        task = prepare_task(source(), target(), support, **names)
        found = pnc.scan(task, exhaustive=True)
        place = max(found.positions, key=lambda position: position.n_params)
        made[n_images] = pnc.fit(task, found.adapter(place), density=0.5, method="taylor", tune="none", name="v1")
    calibrated = replace(made[28], branch=copy.deepcopy(made[28].branch))
    for values in (calibrated.branch.gain, calibrated.branch.offset):
        values.fill_(0.25)
    assert isinstance(made[28].branch.head, StackedHead)
    discriminant = Branch(made[28].branch.stitched, made[28].branch.head.discriminants)
    rivals = wave(torch.Size([6, 9]), 0.4).tolist()
    beside_others = calibrated.branch.rescaled(Scalars(1.25, (0.25,) * 4, tuple(map(tuple, rivals))))
    return {
        "clone_v1_thin": (made[28], "thin"),
        "clone_v1_full": (made[28], "full"),
        "clone_v1_source_head": (made[0], "thin"),
        "clone_v1_calibrated": (calibrated, "thin"),
        "clone_v1_rivals": (replace(calibrated, branch=beside_others), "thin"),
        "clone_v1_discriminant": (replace(made[28], branch=discriminant), "thin"),
    }


def main() -> None:
    """Write all files."""
    logits = {}
    for name, (made, kind) in clones().items():
        pnc.save(made, FOLDER / f"{name}.safetensors", kind)
        with torch.no_grad():
            logits[name] = pnc.attach(target(), made)(images(3)).tolist()
    (FOLDER / "clone_v1.json").write_text(json.dumps(logits, indent=1) + "\n")


if __name__ == "__main__":
    main()
