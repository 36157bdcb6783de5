"""What all rivals share: a name, a kind, a search space, a budget, and the form of the result."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from pnc.foundation.errors import InputError
from pnc.method.task import CloneTask, Precision

RivalKind = Literal["ensemble", "features", "tuning", "clone", "bound"]
"""ensemble: both networks side by side; features: a classifier on one network's frozen features; tuning: training
parameters of the target; clone: inserting a part of the source; bound: sees data that the others do not."""


@dataclass(frozen=True)
class Budget:
    """Training steps of each rival that trains by gradient, the same for all; used by `pnc.bench.rivals.tuning`.

    Attributes:
        first_steps: For every setting of its space.
        second_steps: For the best `n_second` of these, from scratch.
        last_steps: For the best of these, from scratch; it competes with the shorter training.
        n_second: Settings in the second round.
        batch_size: Samples per step, every class equally often.
        precision: Of the forward pass in training; "bfloat16" (autocast) takes half the time on processors that support
            it.
    """

    first_steps: int = 20
    second_steps: int = 60
    last_steps: int = 180
    n_second: int = 3
    batch_size: int = 64
    precision: Precision = "float32"


@dataclass(frozen=True, eq=False)
class Fitted:
    """The result of a rival.

    Attributes:
        module: The network, (B, C, H, W) to (B, K_base + K_new), in eval mode.
        chosen: The chosen setting, as plain values; empty if there is no choice.
        trials: Every setting that was tried, with its score on held-out support.
    """

    module: nn.Module
    chosen: Mapping[str, Any] = field(default_factory=dict)
    trials: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Rival:
    """A way to get a network that knows base and new classes from two networks and a support.

    Attributes:
        name: In results.
        kind: What it does, in one word.
        fit: Fits it. Raises an `InputError` if it cannot use the support.
        space: The values that are searched, by setting; empty without a search.
        sees_everything: Whether it receives all training images of all classes instead of the support.
    """

    name: str
    kind: RivalKind
    fit: Callable[[CloneTask, Budget], Fitted]
    space: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    sees_everything: bool = False


def need_base_samples(task: CloneTask, what: str) -> None:
    """Refuse a support without samples of base classes; `what`, which needs them, begins the message.

    Raises:
        InputError: there is none.
    """
    if not task.has_base:
        raise InputError(f"{what} needs samples of the base classes; the support has none")
