import torch
from torch import nn
from torch.func import functional_call

from pnc.graph.recording import record
from pnc.method.localization.fixed_norms import FixedNorms


class Net(nn.Module):
    """Norms behind convolutions of several kinds, behind a sum, and behind a convolution that something else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm_one = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.two, self.norm_two = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(8, affine=False)
        self.three, self.norm_three = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.norm_four = nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.norm_one(self.one(x)).relu()
        x = x + self.norm_two(self.two(x))
        y = self.three(x)
        return self.norm_four(y + self.norm_three(y)).mean((2, 3))


def recorded(net):
    torch.manual_seed(0)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            if layer.affine:
                nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    return record(net.eval(), torch.randn(2, 3, 12, 12)).module


def gradients(module, parameters, inputs, change=lambda parameters: parameters):
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in parameters.items()}
    outputs = functional_call(module, change(leaves), (inputs,))
    outputs.square().sum().backward()
    return outputs.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def test_outputs_and_gradients_are_those_of_the_original():
    segment, inputs = recorded(Net()), torch.randn(4, 3, 12, 12)
    fixed, parameters = FixedNorms(segment), dict(segment.named_parameters())
    before, after = (sum(n.op == "call_module" for n in one.graph.nodes) for one in (segment, fixed.module))
    assert before - after == 2
    expected, wanted = gradients(segment, parameters, inputs)
    outputs, found = gradients(fixed.module, parameters, inputs, fixed.merged)
    assert torch.allclose(outputs, expected, atol=1e-5)
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-4), name
