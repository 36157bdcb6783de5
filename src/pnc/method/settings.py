"""What a clone may cost and what is removed for it: settings that travel together, checked as they are made."""

from dataclasses import dataclass
from typing import Literal, get_args

from pnc.foundation.argument_checks import check_choice, check_share, check_whole
from pnc.foundation.errors import InputError

Method = Literal["gates", "taylor", "magnitude", "random", "local-surrogate"]
"""How channels are chosen: learned by gradient, scored once, or by the paper's rule."""

Strategy = Literal["scan", "sequential"]
"""How a position is found: all in closed form, or as the paper does (`paper_search`), the reference."""


@dataclass(frozen=True)
class Removal:
    """Which channels of the source's part go.

    Attributes:
        density: Share of the prunable multiply-accumulates to keep, in (0, 1], or "auto".
        method: How channels are chosen below density 1.
        round_to: Keep multiples of so many channels.
    Raises:
        InputError: one of them is out of range.
    """

    density: float | Literal["auto"] = 1.0
    method: Method = "gates"
    round_to: int = 1

    def __post_init__(self) -> None:
        if self.density != "auto":
            check_share(self.density, "density", "the prunable multiply-accumulates that is kept", " or 'auto'")
        check_choice(self.method, "method", get_args(Method))
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
        max_bytes: Size of the thin file at full density, at least 1.
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
    if strategy == "sequential" and (bounds.is_bounded or refine or removal.density == "auto"):
        raise InputError(
            "strategy: the sequential search takes no max_macs, max_bytes, max_base_drop, refine or density='auto'; "
            "leave them out"
        )
