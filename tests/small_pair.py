"""A small source and target that are quickly cloned, and the same weights with other forward passes."""

import copy
from functools import cache

import torch
from torch import nn

import pnc

BASE, NEW = ("ant", "bee", "cat"), ("dog", "elk")


class Net(nn.Module):
    def __init__(self, n_classes, activation=nn.ReLU, eps=1e-5, padding_mode="zeros"):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 6, 3, padding=1, padding_mode=padding_mode), nn.BatchNorm2d(6, eps=eps)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6, eps=eps)
        self.act1, self.act2 = activation(), activation()
        self.body = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.register_buffer("factor", torch.ones(()), persistent=False)
        self.fc = nn.Linear(6, n_classes)

    def features(self, x):
        return self.body(self.act2(self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))))

    def forward(self, x):
        return self.fc(self.features(x) * self.factor)


class Negated(Net):
    def forward(self, x):
        return -super().forward(x)


class Reversed(Net):
    def forward(self, x):
        return super().forward(x).flip(1)


class Rewritten(Net):
    """The same function, written in another way."""

    def forward(self, x):
        x = self.norm1(self.conv1(x)).clamp(min=0)
        return nn.functional.linear(self.body(self.norm2(self.conv2(x)).relu()), self.fc.weight, self.fc.bias)


def scaled(n_classes):
    net = Net(n_classes)
    net.factor.fill_(2.0)
    return net


OTHERS = {
    "GELU": lambda k: Net(k, nn.GELU),
    "negative slope": lambda k: Net(k, lambda: nn.LeakyReLU(0.2)),
    "eps": lambda k: Net(k, eps=0.1),
    "padding": lambda k: Net(k, padding_mode="reflect"),
    "sign": Negated,
    "order of outputs": Reversed,
    "buffer that no state dict holds": scaled,
}


@cache
def network(n_classes, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net(n_classes)
        for _ in range(5):
            net(torch.rand(16, 1, 8, 8))
    return net.eval()


def target():
    return copy.deepcopy(network(3, 1))


def source():
    return copy.deepcopy(network(2, 2))


def like(made, factory):
    """Another network with the weights of `made`."""
    other = factory(made.fc.out_features)
    other.load_state_dict(made.state_dict())
    return other.eval()


def images(n, seed=9):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def support(names, n=8):
    own = [torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(sum(map(ord, name)))) for name in names]
    noise = images(n * len(names), 0)
    return torch.cat([0.7 * one.expand(n, 1, 8, 8) for one in own]) + 0.3 * noise, [c for c in names for _ in range(n)]


@cache
def clone(*names):
    return pnc.clone(source(), target(), support(BASE + names), classes=names, source_classes=NEW, base_classes=BASE)
