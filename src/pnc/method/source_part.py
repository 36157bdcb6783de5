"""A part of the source."""

from dataclasses import dataclass

from torch import fx

from pnc.channels.channel_masks import ChannelMasks


@dataclass(frozen=True, eq=False)
class SourcePart:
    """A part of the source, as an own copy without gradients.

    Attributes:
        module: From the cut to the source's penultimate features.
        masks: What was removed of it; None for nothing.
        density: Share of its prunable multiply-accumulates that is left.
    """

    module: fx.GraphModule
    masks: ChannelMasks | None = None
    density: float = 1.0
