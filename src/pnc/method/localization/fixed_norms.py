"""BatchNorm layers whose statistics are fixed while weights are tuned: computed by the convolutions before them.

A convolution's output is scaled and shifted by constants, so its weights can be scaled and shifted in its place, with
gradients to all of them. That saves two passes over every map in each direction.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, fx, nn

from pnc.channels.compaction import own_copy
from pnc.composite.layer_folding import CONVOLUTIONS, bypass, norms_after_layers


class FixedNorms:
    """A segment that needs fewer BatchNorm layers, with the parameters of the original.

    Args:
        segment: In evaluation mode, without shared parameters, such as `own_copy` returns; not changed.

    Attributes:
        module: A copy in which convolutions give the results of the BatchNorm layers after them, if it is called with
            the parameters from `merged`.
    """

    def __init__(self, segment: fx.GraphModule) -> None:
        self.module = own_copy(segment)
        self._merged: list[tuple[str, str, Tensor, Tensor]] = []
        for source, layer, node, norm in norms_after_layers(self.module):
            if type(layer) not in CONVOLUTIONS:
                continue
            conv, statistics = cast(nn.Conv2d, layer), cast(nn.BatchNorm2d, norm)
            mean, variance = statistics.get_buffer("running_mean"), statistics.get_buffer("running_var")
            if conv.bias is None:
                conv.bias = nn.Parameter(torch.zeros_like(mean), requires_grad=False)
            self._merged.append((str(source.target), str(node.target), mean, (variance + statistics.eps).rsqrt()))
            bypass(node, source)
        self.module.recompile()

    def merged(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters of `module` for those of the original segment; differentiable."""
        found = dict(parameters)
        for layer, norm, mean, factor in self._merged:
            weight, bias = parameters[f"{layer}.weight"], parameters.get(f"{layer}.bias")
            scale = factor * parameters.get(f"{norm}.weight", 1.0)
            shift = parameters.get(f"{norm}.bias", 0.0)
            found[f"{layer}.weight"] = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
            found[f"{layer}.bias"] = ((0.0 if bias is None else bias) - mean) * scale + shift
        return found
