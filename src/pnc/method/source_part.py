"""A part of the source."""

from dataclasses import dataclass

from torch import fx

from pnc.channels.channel_masks import ChannelMasks
from pnc.clones.deltas import Deltas


@dataclass(frozen=True, eq=False)
class SourcePart:
    """A part of the source, as an own copy without gradients.

    Attributes:
        module: From the cut to the source's penultimate features.
        masks: What was removed of it; None for nothing.
        density: Share of its prunable multiply-accumulates that is left.
        deltas: What tuning changed of its parameters, merged into them; None for nothing.
        held_out: The same part as it was made without the fold that scores the clone; None where that is no other.
    """

    module: fx.GraphModule
    masks: ChannelMasks | None = None
    density: float = 1.0
    deltas: Deltas | None = None
    held_out: fx.GraphModule | None = None
