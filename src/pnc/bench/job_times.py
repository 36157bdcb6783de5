"""Time to make a clone, compared with the paper's search, fine-tuning with replay and training from scratch."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from pnc.bench.clock_and_memory import finish, peak_memory
from pnc.bench.result_files import Cells
from pnc.bench.rivals.finetuning import WITH_REPLAY
from pnc.bench.rivals.rival import Budget
from pnc.bench.rivals.tuning import Hyperparameters, TuningMethod, train_once
from pnc.bench.setting import Setting
from pnc.data.image_set import class_subset, images_as_float
from pnc.foundation.network_state import evaluating
from pnc.method.pipeline import clone
from pnc.method.task import CloneTask, Progress, prepare_task
from pnc.models.model_specs import LoadedModel, build_model
from pnc.models.pretraining import recipe_for

CLOSED, GATES, REFINED, SEQUENTIAL = "closed form", "gates, density 0.5", "refined", "sequential"
SEARCH, TUNED, SCRATCH = "fine-tuning with replay, search", "fine-tuning with replay, once", "training from scratch"
CLONES: Mapping[str, Mapping[str, Any]] = {
    CLOSED: {"effort": "seconds"},
    GATES: {"density": 0.5, "tune": "norms"},
    REFINED: {"refine": True},
    SEQUENTIAL: {"strategy": "sequential"},
}
"""What is timed, as arguments of `clone`."""
FORMS = (*CLONES, SEARCH, TUNED, SCRATCH)
N_REPEATS = {CLOSED: 3}
"""How often a form is timed for each seed, if more than once; noise affects the fastest form most."""
COUNTED = (CLOSED, TUNED)
"""Forms whose operations are also counted, in an additional run."""
LONG = (SEQUENTIAL, SEARCH)
"""Forms whose memory is not measured: it takes another run, since the measurement slows allocations down."""
N_STEPS = 8
"""Steps of training from scratch that are timed; the first does not count."""


def run(setting: Setting, seeds: range, cells: Cells, progress: Progress | None = None) -> None:
    """Time every form that is not in `cells` yet, for every seed, each starting from two loaded networks."""
    wanted = [(seed, form) for seed in seeds for form in FORMS]
    for done, (seed, form) in enumerate(wanted):
        if progress is not None:
            progress(f"job, seed {seed}: {form}", done, len(wanted))
        cell = {"part": "job", "case": f"seed {seed}", "form": form}
        if cell not in cells:
            cells.add({**cell, **_row(setting, seed, form, cells)})


def _row(setting: Setting, seed: int, form: str, cells: Cells) -> dict[str, Any]:
    """Seconds and peak memory of one form, and the choice of a search."""
    if form == SCRATCH:
        return _scratch(setting, seed)
    found: dict[str, Any] = {}
    work = _work(setting, seed, form, cells, found)
    seconds: list[float] = []
    for _ in range(N_REPEATS.get(form, 1)):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    if form not in LONG:
        found["peak_bytes"] = peak_memory(work, setting.device)[1]
    if form in COUNTED:
        with FlopCounterMode(display=False) as counter:
            work()
        found["n_macs"] = counter.get_total_flops() // 2
    return {"seconds": median(seconds), "all_seconds": seconds, **found}


def _work(setting: Setting, seed: int, form: str, cells: Cells, found: dict[str, Any]) -> Callable[[], None]:
    """The work to be timed; facts about its result go into `found`."""
    source, target = setting.source, setting.target
    support = setting.draw(setting.new_classes, seed)
    settings = setting.arguments(setting.new_classes, seed)

    def make() -> None:
        made = clone(source.module, target.module, support, **CLONES[form], **settings)
        n_samples = len(support) * (2 if setting.flip else 1)
        found.update(
            macs_share=made.recipe["macs_share"],
            held_out_score=made.recipe["score"],
            once_macs=n_samples * sum(_network_macs(one, setting.device) for one in (source, target)),
        )

    def task() -> CloneTask:
        return prepare_task(source.module, target.module, support, **settings)

    def search() -> None:
        found["chosen"] = dict(WITH_REPLAY.fit(task(), Budget()).chosen)

    def tune() -> None:
        rows = [row for row in cells.rows if (row["form"], row["case"]) == (SEARCH, f"seed {seed}")]
        chosen = rows[0]["chosen"]
        one = Hyperparameters(chosen["learning_rate"], chosen["train_norm"], n_steps=chosen["steps"])
        train_once(task(), TuningMethod((one,)), Budget())
        found["chosen"] = chosen

    return make if form in CLONES else search if form == SEARCH else tune


def _network_macs(model: LoadedModel, device: torch.device) -> int:
    with FlopCounterMode(display=False) as counter, evaluating(model.module):
        model.module(torch.zeros(1, *model.input_shape, device=device))
    return int(counter.get_total_flops()) // 2


def _scratch(setting: Setting, seed: int) -> dict[str, Any]:
    """Estimate the training of a network like the source: time of a step times the steps of its recipe."""
    source = setting.source
    new = setting.new_classes
    images = class_subset(setting.train, new)
    recipe = recipe_for(source.spec)
    device = setting.device
    model = build_model(source.spec, new, source.input_shape, seed=seed).module.train().to(device)
    first = slice(recipe.batch_size)
    batch = images_as_float(images.images[first]).to(device), images.labels[first].to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    seconds = []
    for _ in range(N_STEPS):
        start = time.perf_counter()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        finish(device)
        seconds.append(time.perf_counter() - start)
    n_steps = recipe.epochs * max(1, len(images.labels) // recipe.batch_size)
    step = median(seconds[1:])
    return {"seconds": step * n_steps, "estimated": True, "step_seconds": step, "steps": n_steps}
