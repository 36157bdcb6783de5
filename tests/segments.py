"""Segments of tiny networks for the tests of channels, masks, compaction and localization."""

import torch
from torch import fx

from pnc.channels.channel_masks import ChannelMasks, channel_masks
from pnc.channels.channel_spaces import ChannelSpaces, channel_spaces
from pnc.channels.compaction import compact, kept_flags, mask_segment
from pnc.graph.classifier import find_head
from pnc.graph.cut_points import cut_points, extract
from pnc.graph.nodes import info
from pnc.graph.recording import record


def network(factory, seed=0):
    """A network in float64 with random weights and statistics; the global random state does not change."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = factory()
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                if tensor.is_floating_point() and tensor.dim() == 1:  # norms start as the identity, biases as zero
                    tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return module.double().eval()


def segment_of(module, shape=(3, 8, 8), start=None):
    """The part of a float64 network from its input, or from the cut made in module `start`, to its features."""
    recording = record(module, torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    cut = next(c for c in reversed(cut_points(recording)) if c.scope == start) if start else None
    return extract(recording, cut, [find_head(recording).features])


def half(spaces: ChannelSpaces, seed=0) -> ChannelMasks:
    """Masks that drop a random half of the units of each space."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for space in spaces.spaces:
        dropped = torch.randperm(space.size, generator=generator)[: space.size // 2]
        kept[space.name] = torch.ones(space.size, dtype=torch.bool).index_fill(0, dropped, False)
    return channel_masks(spaces, kept)


class Values(fx.Interpreter):
    """Runs a segment and keeps the result of every node."""

    def __init__(self, segment):
        super().__init__(segment)
        self.values = {}

    def run_node(self, n):
        out = super().run_node(n)
        # A copy: later operations may write to it in place.
        self.values[n.name] = out.clone() if isinstance(out, torch.Tensor) else out
        return out


def assert_compact_is_masked(segment, free_output=False, seed=0) -> ChannelSpaces:
    """Compare the two forms after every node of the graph, at a batch size that was not recorded."""
    spaces = channel_spaces(segment, free_output)
    masks = half(spaces, seed)
    flags = kept_flags(spaces, masks)
    given = next(iter(segment.graph.nodes))
    x = torch.randn((5, *info(given).shape[1:]), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    forms = [Values(form(segment, spaces, masks)) for form in (mask_segment, compact)]
    with torch.no_grad():
        for form in forms:
            form.run(x.clone())
    masked, smaller = (form.values for form in forms)
    data = {node.name for node in forms[0].module.graph.nodes if info(node).from_input}
    compared = 0
    for name, value in masked.items():
        # Constants are made smaller on one side only, where they are read.
        if not isinstance(value, torch.Tensor) or name not in smaller or name not in data:
            continue
        channels = spaces.output if name == "output" else spaces.nodes.get(name)
        if channels is not None:
            value = value.index_select(channels.dim, flags[channels.units].nonzero().reshape(-1))
            compared += 1
        # Fewer terms in another order: the sums differ by rounding.
        torch.testing.assert_close(smaller[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    assert compared or not spaces.spaces
    return spaces
