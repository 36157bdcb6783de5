"""What a clone may cost and what is removed for it: settings that travel together, checked as they are made."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import nn

from pnc.foundation.argument_checks import check_choice, check_flag, check_module, check_share, check_whole
from pnc.foundation.errors import InputError
from pnc.foundation.process_team import Team
from pnc.foundation.tensor_bits import dtype_name

Method = Literal["gates", "taylor", "magnitude", "random", "local-surrogate"]
"""How channels are chosen: learned by gradient, scored once, or by the paper's rule."""

Tune = Literal["weights", "low-rank", "norms", "none"]
"""What of a part is tuned once channels are gone."""

Prefer = Literal["accuracy", "balanced", "small"]
"""What an automatic density gives up for lower cost, in plain words."""

Effort = Literal["seconds", "minutes"]
"""How long a clone may take: closed form only, or with learning by gradient."""

Strategy = Literal["scan", "sequential"]
"""How a position is found: all in closed form, or as the paper does (`paper_search`), the reference."""


LEAST_MEMORY = 2**20


@dataclass(frozen=True)
class Removal:
    """Which channels of the source's part go.

    Attributes:
        density: Share of the prunable multiply-accumulates to keep, in (0, 1], or "auto".
        method: How channels are chosen below density 1; None for what suits the tuning.
        round_to: Keep multiples of so many channels.
        tune: What of the part is tuned then.
    Raises:
        InputError: one of them is out of range.
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
        """The density where one position is given.

        Raises:
            InputError: it is "auto", which chooses among positions.
        """
        if self.density == "auto":
            raise InputError("density: 'auto' chooses among positions, which pnc.clone does; give a share, such as 0.5")
        return self.density


@dataclass(frozen=True)
class Bounds:
    """What a clone may cost; None bounds nothing.

    Attributes:
        max_macs: Added multiply-accumulates as a share of the source's, in (0, 1].
        max_bytes: Size of the thin file, at least 1.
        max_base_drop: Accuracy that base images may lose, in (0, 1).
    Raises:
        InputError: one of them is out of range.
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
                raise InputError(
                    "max_base_drop: 1 would allow to lose every base image; give less, such as 0.02, or None"
                )

    @property
    def is_bounded(self) -> bool:
        """Whether anything is bounded."""
        return self != Bounds()


def check_strategy(strategy: str, removal: Removal, bounds: Bounds, refine: bool) -> None:
    """Refuse a strategy that does not exist, or that what else is asked for does not fit to.

    Raises:
        InputError: the message names the arguments to leave out.
    """
    check_choice(strategy, "strategy", get_args(Strategy))
    if strategy == "sequential" and (bounds.is_bounded or refine):
        raise InputError(
            "strategy: the sequential search takes no max_macs, max_bytes, max_base_drop or refine; leave them out"
        )


def check_effort(effort: str, prefer: str, removal: Removal, refine: bool, strategy: str) -> Removal:
    """Refuse what takes longer than is allowed, or does not go together.

    Returns:
        What is removed and tuned: where there is nothing to choose, at density 1 by default, and with nothing tuned in
        closed form.
    Raises:
        InputError: the message names the arguments to leave out.
    """
    check_choice(effort, "effort", get_args(Effort))
    check_choice(prefer, "prefer", get_args(Prefer))
    tune = removal.tune
    if refine and tune in ("weights", "low-rank"):
        raise InputError(f"refine: tune={tune!r} moves the adapter already; leave one of them out")
    if strategy == "sequential" and tune is not None:
        raise InputError("tune: the sequential search tunes nothing but adapter and head; leave it out")
    if effort == "seconds":
        learned = [f"method={removal.method!r}"] if removal.method in ("gates", "local-surrogate") else []
        learned += [f"tune={tune!r}"] if tune not in (None, "none") else []
        learned += ["refine=True"] if refine else []
        learned += [f"strategy={strategy!r}"] if strategy == "sequential" else []
        if learned:
            raise InputError(f"effort: 'seconds' is closed form alone, and {learned[0]} learns by gradient; drop one")
    if effort == "minutes" and not refine and strategy == "scan":
        return removal
    density = 1.0 if removal.density == "auto" else removal.density
    return replace(removal, density=density, tune=tune or ("norms" if refine else "none"))


def check_network(model: nn.Module, argument: str) -> None:
    """Refuse what is no network of float32, before anything is read."""
    check_module(model, argument)
    other = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
    if other is not None:
        raise InputError(
            f"{argument} has parameters in {dtype_name(other)}, and clones are made in float32: give "
            f"copy.deepcopy({argument}).float() here (precision='bfloat16' is faster), and cast the composite"
        )


def check_run(flip: object, seed: object, batch_size: object, memory: object, team: object) -> None:
    """Refuse settings of a run that are out of range."""
    check_flag(flip, "flip")
    check_whole(seed, "seed", 0)
    check_whole(batch_size, "batch_size", 1)
    check_whole(memory, "memory", LEAST_MEMORY)
    if not isinstance(team, Team):
        raise InputError(f"team: expected a team of pnc.joined, got {type(team).__name__}")
