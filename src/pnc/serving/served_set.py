"""One set of clones as it is served: immutable, so that every request sees one consistent set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from pnc.composite.answering import Prediction, prediction_of
from pnc.composite.forward_plan import CloneStatus
from pnc.foundation.class_names import unknown_name
from pnc.foundation.errors import InputError


@dataclass(frozen=True, eq=False)
class ServedSet:
    """A network with a fixed set of clones.

    Attributes:
        generation: Counts the sets of a server.
        net: Maps images (B, C, H, W) to logits (B, K): the fused form of a composite.
        classes: Names of the logits: the target's own, then each clone's.
        clones: The clones, in the order of their logits.
    """

    generation: int
    net: nn.Module
    classes: tuple[str, ...]
    clones: tuple[CloneStatus, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the clones."""
        return tuple(clone.name for clone in self.clones)

    @cached_property
    def owners(self) -> Mapping[str, str]:
        """Name of the clone of each class that is a clone's."""
        return {name: clone.name for clone in self.clones for name in clone.classes}

    def predictions(
        self, logits: Tensor, images: Sequence[str | None], wanted: frozenset[str] | None
    ) -> tuple[Prediction, ...]:
        """Turn logits into predictions.

        Args:
            logits: (N, K), on the CPU.
            images: Names of the N images, if they have any.
            wanted: Names of the clones whose classes may be answered, besides the target's own; None for all.
        Raises:
            InputError: a wanted clone is not in this set.
        """
        classes: Sequence[str] = self.classes
        if wanted is not None:
            for name in wanted:
                if name not in self.names:
                    raise InputError(f"clones: {unknown_name(name, self.names, 'attached clone')}")
            kept = [at for at, name in enumerate(classes) if self.owners.get(name) in (None, *wanted)]
            classes, logits = [classes[at] for at in kept], logits[:, kept]
        return tuple(prediction_of(*one, classes, self.owners) for one in zip(images, logits, strict=True))
