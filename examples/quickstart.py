"""A network that knows the digits 0-4 gets 5-9 from another one: no download, half a minute."""

import torch
from torch import nn

import pnc

train, test = pnc.load_data("digits", "train"), pnc.load_data("digits", "test")


def trained(first: int) -> nn.Module:
    """Stand-in for your two networks: one for 0-4, one for 5-9."""
    torch.manual_seed(first)
    layers = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5)]
    network, own = nn.Sequential(*layers), (train.labels >= first) & (train.labels < first + 5)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(train.images[own]), train.labels[own] - first).backward()
        optimizer.step()
    return network.eval()


target, source = trained(0), trained(5)
old, new = [*"01234"], [*"56789"]
support = pnc.draw_support(train, new, old, 20, 5, torch.Generator().manual_seed(0))  # 20 images of each new digit
clone = pnc.clone(source, target, support, source_classes=new, base_classes=old)
pnc.save(clone, "digits.safetensors")  # what was fitted, 36 kB: the source's weights stay in the source

net = pnc.attach(target, pnc.load("digits.safetensors", source=source))
print(pnc.evaluate(net, test))
print(net.verify())
net.detach(clone.name)  # now the target is alone again, bit for bit
