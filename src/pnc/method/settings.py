"""Settings of a clone: what may be removed, what it may cost, and how it is made; each checked when it is made."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from pnc.clones.clone import check_name
from pnc.foundation.argument_checks import check_choice, check_flag, check_module, check_share, check_whole
from pnc.foundation.errors import InputError
from pnc.foundation.process_team import Team
from pnc.foundation.resumable_steps import check_steps_path
from pnc.foundation.tensor_bits import dtype_name

Method = Literal["gates", "taylor", "magnitude", "random", "local-surrogate"]
"""How channels are chosen: learned by gradient, scored once, or with the paper's rule."""

Tune = Literal["weights", "low-rank", "norms", "none"]
"""Which parameters of a part are tuned after channels were removed."""

Prefer = Literal["accuracy", "balanced", "small"]
"""How much accuracy an automatic density gives up for lower cost."""

Effort = Literal["seconds", "minutes"]
"""How long making a clone may take: closed form only, or with training by gradient."""

Strategy = Literal["scan", "sequential"]
"""How a position is found: in closed form, or with the paper's search (`paper_search`), as a reference."""

LEAST_MEMORY = 2**20


@dataclass(frozen=True)
class Removal:
    """Which channels of the source's part are removed, and what is tuned afterwards.

    Attributes:
        density: Share of the prunable multiply-accumulates to keep, in (0, 1], or "auto".
        method: How channels are chosen below density 1; None chooses the method that suits `tune`.
        round_to: Keep channels in multiples of this number.
        tune: Which parameters of the part are tuned; None chooses.
    Raises:
        InputError: a value is out of range.
    """

    density: float | Literal["auto"] = 1.0
    method: Method | None = None
    round_to: int = 1
    tune: Tune | None = None

    def __post_init__(self) -> None:
        if self.density != "auto":
            check_share(self.density, "density", "the prunable multiply-accumulates that is kept", " or 'auto'")
        if self.method is not None:
            check_choice(self.method, "method", get_args(Method))
        if self.tune is not None:
            check_choice(self.tune, "tune", get_args(Tune))
        check_whole(self.round_to, "round_to", 1)

    @property
    def fixed_density(self) -> float:
        """The density, if it is a number.

        Raises:
            InputError: it is "auto", which chooses among positions.
        """
        if self.density == "auto":
            raise InputError("density: 'auto' chooses among positions, which pnc.clone does; give a share, such as 0.5")
        return self.density


@dataclass(frozen=True)
class Bounds:
    """What a clone may cost; None sets no bound.

    Attributes:
        max_macs: Added multiply-accumulates as a share of the source's, in (0, 1].
        max_bytes: Size of the thin file, at least 1.
        max_base_drop: Accuracy that base images may lose, in (0, 1).
    Raises:
        InputError: a bound is out of range.
    """

    max_macs: float | None = None
    max_bytes: int | None = None
    max_base_drop: float | None = None

    def __post_init__(self) -> None:
        if self.max_macs is not None:
            check_share(self.max_macs, "max_macs", "the source's multiply-accumulates", ", or None")
        if self.max_bytes is not None:
            check_whole(self.max_bytes, "max_bytes", 1)
        if self.max_base_drop is not None:
            check_share(self.max_base_drop, "max_base_drop", "base images", ", or None")
            if self.max_base_drop == 1:
                raise InputError("max_base_drop: 1 allows losing every base image; give less, such as 0.02, or None")

    @property
    def is_bounded(self) -> bool:
        """Whether any bound is set."""
        return self != Bounds()


def check_strategy(strategy: str, bounds: Bounds, refine: bool) -> None:
    """Refuse an unknown strategy, and the sequential search with arguments that it does not support.

    Raises:
        InputError: the message names the arguments to leave out.
    """
    check_choice(strategy, "strategy", get_args(Strategy))
    if strategy == "sequential" and (bounds.is_bounded or refine):
        raise InputError(
            "strategy: 'sequential' does not support max_macs, max_bytes, max_base_drop or refine; leave them out"
        )


def check_effort(effort: str, prefer: str, removal: Removal, refine: bool, strategy: str) -> Removal:
    """Refuse arguments that take longer than `effort` allows, or that exclude each other.

    Returns:
        The removal with defaults filled in: unchanged if a density may be searched, otherwise density 1 for "auto", and
        nothing tuned (with `refine`, norms) unless asked for.
    Raises:
        InputError: the message names the arguments to leave out.
    """
    check_choice(effort, "effort", get_args(Effort))
    check_choice(prefer, "prefer", get_args(Prefer))
    tune = removal.tune
    if prefer != "balanced":
        given = [f"density={removal.density}"] if removal.density != "auto" else []
        given += [f"effort={effort!r}"] if effort == "seconds" else []
        if given:
            raise InputError(f"prefer: {prefer!r} chooses the density, which {given[0]} fixes; leave one of them out")
    if refine and tune in ("weights", "low-rank"):
        raise InputError(f"refine: tune={tune!r} already tunes the adapter; leave one of them out")
    if strategy == "sequential" and tune is not None:
        raise InputError("tune: strategy='sequential' tunes only adapter and head; leave it out")
    if effort == "seconds":
        learned = [f"method={removal.method!r}"] if removal.method in ("gates", "local-surrogate") else []
        learned += [f"tune={tune!r}"] if tune not in (None, "none") else []
        learned += ["refine=True"] if refine else []
        learned += [f"strategy={strategy!r}"] if strategy == "sequential" else []
        if learned:
            raise InputError(f"effort: 'seconds' is closed form only, but {learned[0]} trains by gradient; drop one")
    if effort == "minutes" and not refine and strategy == "scan":
        return removal
    density = 1.0 if removal.density == "auto" else removal.density
    return replace(removal, density=density, tune=tune or ("norms" if refine else "none"))


def check_outputs(name: str | None, resume: str | Path | None, progress: object) -> None:
    """Check the arguments that are used only after or beside the work."""
    check_name(name)
    if resume is not None:
        check_steps_path(resume)
    if progress is not None and not callable(progress):
        raise InputError(f"progress: expected a function of (what, done, total) or None; got {type(progress).__name__}")


def check_network(model: nn.Module, argument: str) -> None:
    """Refuse anything but a float32 network."""
    check_module(model, argument)
    other = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
    if other is not None:
        raise InputError(
            f"{argument} has parameters in {dtype_name(other)}, but clones are made in float32: pass "
            f"copy.deepcopy({argument}).float() (precision='bfloat16' is faster), and cast the composite"
        )


def check_run(flip: object, seed: object, batch_size: object, memory: object, team: object) -> None:
    """Refuse settings of a run that are out of range."""
    check_flag(flip, "flip")
    check_whole(seed, "seed", 0)
    check_whole(batch_size, "batch_size", 1)
    check_whole(memory, "memory", LEAST_MEMORY)
    if not isinstance(team, Team):
        raise InputError(f"team: expected a team of pnc.joined, got {type(team).__name__}")
