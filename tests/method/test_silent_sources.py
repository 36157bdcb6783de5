"""Sources with almost constant logits: heads stay bounded, and the fused form stays exact."""

import pytest
import torch
from torch import nn

import pnc
from handmade import Network, make_branch
from pnc.composite.fused_composite import MAGNIFYING, _remedy
from pnc.foundation.errors import InputError


def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(8, 3)).eval()


def small_logits(net):
    net[-1].weight.data.mul_(1e-6)


def hardly_moving_input(net):
    net[0].weight.data.mul_(1e-6)


def hardly_moving_features(net):
    net[1].weight.data.fill_(1e-7)
    net[1].bias.data.fill_(1.0)


def no_logits(net):
    net[-1].weight.data.mul_(1e-7)
    net[-1].bias.data.zero_()


@pytest.mark.parametrize("silence", [small_logits, hardly_moving_input, hardly_moving_features, no_logits])
def test_heads_of_constant_sources_are_bounded_and_can_be_fused(silence):
    source, target = network(1), network(2)
    silence(source)
    images = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    clone = pnc.clone(
        source, target, (images, list("abcdef") * 10), source_classes=["d", "e", "f"], base_classes=["a", "b", "c"]
    )
    assert max(float(tensor.abs().max()) for tensor in clone.branch.head.buffers()) < 500
    net = pnc.attach(target, clone)
    torch.testing.assert_close(net.fused()(images), net(images), rtol=1e-4, atol=1e-4)


def test_the_fused_form_blames_a_head_that_magnifies():
    target = Network(network(3), (3, 8, 8))
    branch = make_branch(target, target, (0, 0), is_identity=True)

    class Plan:
        names, branches = ("pets",), (branch,)

    assert _remedy(Plan) == "please report the networks"
    next(branch.head.buffers()).fill_(2 * MAGNIFYING)
    assert "head of clone 'pets' has weights up to 2e+04, which magnify rounding" in _remedy(Plan)


class Complex(nn.Module):
    """A network whose first parameter is complex."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, 2, 1, dtype=torch.complex64), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.conv(x.to(torch.complex64)).abs().relu().mean((2, 3)))


class Packed(nn.Module):
    """A network whose first parameter holds bytes."""

    def __init__(self):
        super().__init__()
        self.packed = nn.Parameter(torch.randint(0, 255, (8, 3, 3, 3), dtype=torch.uint8), requires_grad=False)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        weight = (self.packed.float() - 128) / 100
        return self.fc(nn.functional.conv2d(x, weight, padding=1).relu().mean((2, 3)))


class Counted(nn.Module):
    """A network whose only parameters are integers and whose weights are a buffer."""

    def __init__(self):
        super().__init__()
        self.steps = nn.Parameter(torch.tensor(3), requires_grad=False)
        self.register_buffer("filters", torch.randn(8, 3, 3, 3))
        self.register_buffer("weight", torch.randn(3, 8))

    def forward(self, x):
        return nn.functional.linear(nn.functional.conv2d(x, self.filters).relu().mean((2, 3)), self.weight)


@pytest.mark.parametrize("kind", [Complex, Packed, Counted])
@pytest.mark.parametrize("role", ["source", "target"])
def test_networks_whose_first_parameter_is_not_a_float_get_float_images(kind, role, tmp_path):
    images = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        odd = kind().eval()
    nets = {"source": network(1), "target": network(2), role: odd}
    support = images, list("abcdef") * 4
    clone = pnc.clone(**nets, support=support, source_classes=["d", "e", "f"], base_classes=["a", "b", "c"])
    pnc.save(clone, tmp_path / "f")
    net = pnc.attach(nets["target"], pnc.load(tmp_path / "f", source=nets["source"]))
    with torch.no_grad():
        assert torch.equal(net(images)[:, :3], nets["target"](images))
    assert net.verify(images=images).ok
    pnc.calibrate(net, support)
    with pytest.raises(InputError, match="images like those"):
        net(images.double())
