"""Clones with random weights, built by hand for tests of how clones run, where accuracy does not matter."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

import hazards
import pnc
from pnc.channels.compaction import own_copy
from pnc.clones.adapter import Adapter, Stitched
from pnc.clones.branch import Branch, Scalars
from pnc.clones.heads import DiscriminantHead, SourceHead, StackedHead
from pnc.foundation.fingerprints import fingerprint
from pnc.graph.classifier import find_head
from pnc.graph.cut_points import cut_points, extract
from pnc.graph.recording import record


class Bottleneck(nn.Module):
    """A linear tensor with few readers, then a 1x1 convolution to fewer channels."""

    def __init__(self, stride=1, padding=0, kernel=1):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.second = nn.Conv2d(6, 4, kernel, stride, padding)
        self.tail = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), hazards.tail(4))

    def forward(self, x):
        return self.tail(self.second(self.first(x)))


class Network:
    """A network with random weights and statistics, recorded once."""

    def __init__(self, module: nn.Module, shape=(3, 8, 8), seed=0):
        self.module, self.shape = module.eval(), shape
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for part in module.modules():
                if (
                    isinstance(part, _NormBase)
                    and part.running_mean is not None
                    and not part.running_mean.is_inference()
                ):
                    part.running_mean.copy_(torch.randn(part.running_mean.shape, generator=generator) * 0.3)
                    part.running_var.copy_(torch.rand(part.running_var.shape, generator=generator) + 0.5)
        self.recording = record(module, torch.rand(2, *shape, generator=generator))
        self.cuts, self.features = cut_points(self.recording), find_head(self.recording).features


def head_of(kind, n_base, n_new, n_target, n_source, generator):
    discriminants = DiscriminantHead(n_base, n_base + n_new, n_target + n_source)
    own = SourceHead(n_new, n_source)
    head = {"stacked": StackedHead(discriminants, own), "discriminant": discriminants, "source": own}[kind]
    for buffer in head.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return head


def make_branch(
    target, source, places=(0, 0), rectify=False, is_identity=False, head="stacked", n_new=2, scalars=None, seed=0
):
    """The branch of a clone between two cuts; `places` are indices into the cut points of target and source."""
    generator = torch.Generator().manual_seed(seed)
    adapter = Adapter(target.cuts[places[0]], source.cuts[places[1]], rectify, is_identity)
    for buffer in adapter.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
    body = own_copy(extract(source.recording, source.cuts[places[1]], [source.features]))
    sizes = target.recording.n_classes, n_new, target.features.n_channels, source.features.n_channels
    branch = Branch(Stitched(adapter, body, source.features), head_of(head, *sizes, generator))
    return branch.rescaled(scalars or Scalars())


def make_clone(target, source, name, **settings):
    """A clone with such a branch, ready to be attached; settings as for `make_branch`."""
    branch = make_branch(target, source, **settings)
    return pnc.Clone(
        name=name,
        classes=tuple(f"{name} {number}" for number in range(len(branch.offset))),
        base_classes=tuple(f"base {number}" for number in range(target.recording.n_classes)),
        branch=branch,
        masks=None,
        source=fingerprint(source.module),
        target=fingerprint(target.module),
        input_shape=target.shape,
        target_features=target.features,
        recipe={},
    )
