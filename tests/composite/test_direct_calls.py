"""Graphs that call layers as functions and reuse memory compute the same as the original graphs."""

import pytest
import torch
from torch import nn

import hazards
from handmade import Network
from pnc.composite.direct_calls import called_directly, flattened, reusing_memory
from pnc.models.model_specs import build_model

NAMES = tuple("abcde")
PLAIN = (nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.LayerNorm, nn.ReLU, nn.GELU, nn.Identity, nn.Dropout)


def layers_of(module):
    calls = [node for node in module.graph.nodes if node.op == "call_module"]
    return [module.get_submodule(node.target) for node in calls]


@pytest.mark.filterwarnings("ignore")  # some of these networks are deprecated on purpose
@pytest.mark.parametrize("name", hazards.REPRODUCED)
def test_direct_calls_give_the_same_bits_over_the_same_memory(name):
    network, images = Network(hazards.build(hazards.REPRODUCED[name])), hazards.images(3, seed=5)
    module = network.recording.module
    direct = called_directly(flattened(module))
    with torch.no_grad():
        assert torch.equal(direct(images.clone()), module(images.clone()))  # some write to their input
    given = {tensor.data_ptr() for tensor in [*module.parameters(), *module.buffers()] if tensor.numel()}
    assert {tensor.data_ptr() for tensor in [*direct.parameters(), *direct.buffers()] if tensor.numel()} <= given


@pytest.mark.parametrize("spec", ["zoo:resnet20", "zoo:mobilenetv2?width=0.5", "zoo:vit_tiny"])
def test_all_plain_layers_of_reference_networks_are_called_directly(spec):
    network = Network(build_model(spec, NAMES, (3, 16, 16), seed=1).module, (3, 16, 16))
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    module = network.recording.module
    direct = called_directly(flattened(module))
    assert not [layer for layer in layers_of(direct) if type(layer) in PLAIN] and layers_of(module)
    again = reusing_memory(called_directly(flattened(module)))
    for other in (direct, again):
        (expected,) = torch.autograd.grad(module(images).square().sum(), images)
        (gradient,) = torch.autograd.grad(other(images).square().sum(), images)
        assert torch.equal(other(images), module(images)) and torch.equal(gradient, expected)
    targets = [node.target for node in again.graph.nodes]
    assert (torch.relu_ in targets) == (spec == "zoo:resnet20") and torch.relu not in targets


class Unusual(nn.Module):
    """Layers whose call does more than run a kernel."""

    def __init__(self):
        super().__init__()
        self.hooked, self.replaced = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.reflecting, self.tail = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), hazards.tail(4)
        self.hooked.register_forward_hook(lambda module, args, result: result * 2)
        self.replaced.forward = lambda x: nn.Conv2d.forward(self.replaced, x) + 1

    def forward(self, x):
        return self.tail(self.reflecting(self.replaced(self.hooked(x))))


def test_layers_whose_call_does_more_are_called_as_they_were():
    network = Network(Unusual())
    direct = called_directly(flattened(network.recording.module))
    with torch.no_grad():
        assert torch.equal(direct(hazards.images(3)), network.module(hazards.images(3)))


def test_a_tensor_that_others_read_is_not_written_over():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.tail = nn.Conv2d(3, 4, 3, padding=1), hazards.tail(4)

        def forward(self, x):
            made = self.conv(x)
            wide = self.conv(x[:, :, :1, :1]).add(made)  # broadcast: the sum has another shape than this operand
            other = self.conv(x)
            written = torch.relu(other.add_(made))  # `other` is read again below
            return self.tail(torch.relu(made).add(made) + wide + written + other)

    network, images = Network(Shared()), hazards.images(3)
    again = reusing_memory(called_directly(flattened(network.recording.module)))
    with torch.no_grad():
        assert torch.equal(again(images), network.module(images))
