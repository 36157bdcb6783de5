"""What all rivals share: a name, a kind, the space that is searched, what may be spent, and what comes out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from pnc.foundation.errors import InputError
from pnc.method.task import CloneTask, Precision

RivalKind = Literal["ensemble", "features", "tuning", "clone", "bound"]
"""Both networks side by side; a classifier on one network's frozen features; parameters of the target trained; a part
of the source put in, as by `pnc` but without its search; or no rival but a bound: it sees what the others do not."""


@dataclass(frozen=True)
class Budget:
    """What each rival that trains by gradient may spend: the same for all, `pnc.bench.rivals.tuning` says how.

    Attributes:
        first_steps: Of every setting of its space.
        second_steps: Of the best `n_second` of these, anew.
        last_steps: Of the best of these, anew; it is compared with the shorter training.
        n_second: Settings in the second round.
        batch_size: Samples in a step, every class equally often.
        precision: Of the forward pass while training; "bfloat16" (autocast) takes half the time where the processor has
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
    """What a rival made.

    Attributes:
        module: The network, (B, C, H, W) to (B, K_base + K_new), in eval mode.
        chosen: The setting that was chosen, as plain values; empty where nothing is.
        trials: Every setting that was tried, with its score on held-out support.
    """

    module: nn.Module
    chosen: Mapping[str, Any] = field(default_factory=dict)
    trials: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Rival:
    """A way to get from two networks and a support to a network that knows old and new classes.

    Attributes:
        name: In results.
        kind: What it does, in one word.
        fit: Makes it. Raises an `InputError` where it cannot use the support.
        space: The values that are searched, by the name of the setting; empty where nothing is.
        sees_everything: It is to be given all images of all classes, whatever the support of the others.
    """

    name: str
    kind: RivalKind
    fit: Callable[[CloneTask, Budget], Fitted]
    space: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    sees_everything: bool = False


def need_base_samples(task: CloneTask, what: str) -> None:
    """Refuse a support without samples of base classes; `what` needs them, and begins the message.

    Raises:
        InputError: there is none.
    """
    if not task.has_base:
        raise InputError(f"{what} needs samples of the base classes; the support has none")
