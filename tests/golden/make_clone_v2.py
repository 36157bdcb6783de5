"""Makes the clone files of format version 2 that stay in this folder, and the logits that they must give.

Run it from the root of a checkout, `python tests/golden/make_clone_v2.py`, before the first release only; see
`make_clone_v1.py`, whose networks and images these are. What version 2 adds are deltas: changes of the part's weights.
"""

import json
import runpy
from pathlib import Path
from typing import Any

import torch

import pnc
from pnc.method import part_tuning
from pnc.method.task import prepare_task

FOLDER = Path(__file__).parent
N_STEPS = 20


def clones(v1: dict[str, Any]) -> dict[str, tuple[pnc.Clone, str]]:
    """Tuned clones: name of the file -> clone, kind of the file."""
    part_tuning.N_STEPS = N_STEPS
    names = {"classes": v1["NEW"], "source_classes": v1["NEW"], "base_classes": v1["BASE"]}
    labels = [[*v1["BASE"], *v1["NEW"]][index % 7] for index in range(28)]
    task = prepare_task(v1["source"](), v1["target"](), (v1["images"](28), labels), **names)
    found = pnc.scan(task, exhaustive=True)
    place = found.adapter(max(found.positions, key=lambda position: position.n_params))
    weights = pnc.fit(task, place, density=0.5, tune="weights", name="v2")
    return {
        "clone_v2_weights": (weights, "thin"),
        "clone_v2_weights_full": (weights, "full"),
        "clone_v2_low_rank": (pnc.fit(task, place, density=0.5, tune="low-rank", name="v2"), "thin"),
        "clone_v2_whole": (pnc.fit(task, place, tune="weights", name="v2"), "thin"),
    }


def main() -> None:
    """Write all files."""
    v1, logits = runpy.run_path(str(FOLDER / "make_clone_v1.py")), {}
    for name, (made, kind) in clones(v1).items():
        pnc.save(made, FOLDER / f"{name}.safetensors", kind)
        with torch.no_grad():
            logits[name] = pnc.attach(v1["target"](), made)(v1["images"](3)).tolist()
    (FOLDER / "clone_v2.json").write_text(json.dumps(logits, indent=1) + "\n")


if __name__ == "__main__":
    main()
