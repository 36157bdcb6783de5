"""Low-rank adapters: the target's weights stay frozen, and a low-rank path parallel to each layer is trained.

Hu et al., 2021 (arXiv:2106.09685), for convolutions as in the library `peft`: a convolution like the layer's, but to
`rank` channels, then a 1x1 convolution initialised with zeros. Grouped convolutions have none. The widened classifier
is trained as a whole, norms keep their statistics. Base samples of the support are trained on.
"""

import copy

import torch
from torch import Tensor, nn

from pnc.bench.rivals.rival import Budget, Fitted, Rival
from pnc.bench.rivals.tuning import TuningMethod, grid, tune
from pnc.method.task import CloneTask

LEARNING_RATES = (0.1, 0.3, 0.03, 1.0)
RANKS = (4, 1, 16)


class LowRank(nn.Module):
    """A frozen convolution or linear layer with a trained low-rank path parallel to it."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layer = layer
        self.down: nn.Conv2d | nn.Linear
        self.up: nn.Conv2d | nn.Linear
        if isinstance(layer, nn.Conv2d):
            self.down = copy.deepcopy(layer)
            self.down.out_channels = rank
            self.down.weight = nn.Parameter(torch.empty(rank, *layer.weight.shape[1:]))
            self.down.bias = None
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False, device="meta")
        else:  # on the meta device, so that no random number is drawn
            self.down = nn.Linear(layer.in_features, rank, bias=False, device="meta").to_empty(device="cpu")
            self.up = nn.Linear(rank, layer.out_features, bias=False, device="meta")
        self.up.to_empty(device="cpu")
        with torch.no_grad():
            self.down.weight.normal_(0, self.down.weight[0].numel() ** -0.5, generator=generator)
            self.up.weight.zero_()
        self.to(layer.weight.device, layer.weight.dtype)

    def forward(self, tensor: Tensor) -> Tensor:
        """Add the outputs of the layer and of the trained path."""
        out: Tensor = self.layer(tensor) + self.up(self.down(tensor))
        return out


def fit(task: CloneTask, budget: Budget) -> Fitted:
    """Train adapters for all layers, and the classifier."""
    classifier = task.target.head.module

    def begin(model: nn.Module, strength: float, generator: torch.Generator) -> None:
        model.requires_grad_(False)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
        for name, layer in layers.items():
            if name == classifier:
                layer.requires_grad_(True)
            elif not (isinstance(layer, nn.Conv2d) and layer.groups > 1):
                model.set_submodule(name, LowRank(layer, int(strength), generator))

    settings = grid(LEARNING_RATES, (False,), RANKS)
    return tune(task, TuningMethod(settings, strength="rank", begin=begin), budget)


RIVAL = Rival("LoRA", "tuning", fit, {"learning_rate": LEARNING_RATES, "rank": RANKS})
