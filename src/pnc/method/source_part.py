"""A part of the source, and how it was made."""

from dataclasses import dataclass

from torch import fx

from pnc.channels.channel_masks import ChannelMasks
from pnc.clones.deltas import Deltas


@dataclass(frozen=True, eq=False)
class SourcePart:
    """A part of the source: a copy without gradients.

    Attributes:
        module: The source from the cut to its penultimate features.
        masks: Which channels were kept; None for all.
        density: Share of its prunable multiply-accumulates that was kept.
        deltas: How tuning changed its parameters, already merged into them; None if nothing was tuned.
        held_out: The part made without the fold that scores the clone; None if that is the same.
    """

    module: fx.GraphModule
    masks: ChannelMasks | None = None
    density: float = 1.0
    deltas: Deltas | None = None
    held_out: fx.GraphModule | None = None
