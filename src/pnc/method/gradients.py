"""Whether autograd can differentiate the source: some methods need it, and some networks do not allow it."""

from dataclasses import replace
from typing import Any, get_args

import torch

from pnc.foundation.errors import InputError
from pnc.graph.cut_points import LOGITS, CutPoint, cut_points, extract
from pnc.method.settings import Removal, Tune
from pnc.method.task import CloneTask

N_IMAGES = 2
_FREE = ("magnitude", "random")
"""Methods that need no gradient."""


def uses_gradient(removal: Removal, refine: bool, sequential: bool = False) -> str | None:
    """Return the argument that needs gradients, as the caller would write it; None if there is none."""
    if sequential:
        return "strategy='sequential'"
    if removal.density != 1 and removal.method not in _FREE:
        return f"method={removal.method or 'taylor'!r}"
    if removal.tune != "none" and (removal.density != 1 or removal.tune in ("weights", "low-rank")):
        return f"tune={removal.tune or 'weights'!r}"
    return "refine=True" if refine else None


def without_gradient(task: CloneTask, removal: Removal) -> Removal:
    """Return a removal that needs no gradient if none flows through the source and the caller asked for none."""
    is_free = removal.method in _FREE or (removal.method is None and removal.density == "auto")
    if removal.tune is not None or removal.density == 1 or not is_free:
        return removal
    if _problem(task, cut_points(task.source.recording)[0], "") is None:
        return removal
    return replace(removal, density=1.0 if removal.method is None else removal.density, tune="none")


def check_whole_source(task: CloneTask, asked: str | None) -> None:
    """Refuse, before any work, a source without a gradient from its features back to its input.

    A later part of it might have one, but the position is not known yet.

    Args:
        task: Gives the source.
        asked: From `uses_gradient`.
    Raises:
        InputError: the message names alternatives that need no gradient.
    """
    if asked is not None:
        check_gradient(task, cut_points(task.source.recording)[0], asked)


def check_gradient(task: CloneTask, cut: CutPoint, asked: str | None) -> None:
    """Refuse a position whose part of the source has no gradient.

    Raises:
        InputError: the message names alternatives that need no gradient.
    """
    problem = None if asked is None else _problem(task, cut, asked)
    if problem is not None:
        raise InputError(_message(cut, problem, str(asked)))


def _message(cut: CutPoint, problem: str, asked: str) -> str:
    way_out = {"refine=True": "leave refine out", "strategy='sequential'": "use strategy='scan'"}
    way_out |= {f"tune={tune!r}": "use tune='none'" for tune in get_args(Tune)}
    return (
        f"{asked.partition('=')[0]}: no gradient flows through the source from {cut.name!r} on ({problem}), which "
        f"{asked} needs; {way_out.get(asked, f'use method={_FREE[0]!r}, which needs none, or density=1')}"
    )


def _problem(task: CloneTask, cut: CutPoint, asked: str) -> str | None:
    """Say why no gradient flows from a cut of the source to its features (logits for "local-surrogate"), or None."""
    end: Any = LOGITS if "local-surrogate" in asked else task.source.head.features
    images = task.samples.images[:N_IMAGES].to(task.source.device)
    with torch.no_grad():
        tensor = extract(task.source.recording, None, [cut])(images)
    body = extract(task.source.recording, cut, [end])
    with torch.enable_grad():
        start = tensor.detach().clone().requires_grad_()
        try:
            out = body(start * 1)  # parts may write to their input, which autograd forbids for a leaf
            (gradient,) = torch.autograd.grad(out.sum(), start)
        except (RuntimeError, NotImplementedError) as error:
            return str(error).splitlines()[0].rstrip(".")[:200]
    return None if bool(gradient.isfinite().all()) and bool(gradient.any()) else "it is zero or not finite"
