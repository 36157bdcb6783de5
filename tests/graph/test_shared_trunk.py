"""The trunk that two networks share is found by its operations and weights, to the last bit and no further."""

import copy

import pytest
import torch
from torch import nn

import hazards
from pnc.graph.classifier import find_head
from pnc.graph.cut_points import INPUT, cut_points, extract
from pnc.graph.recording import record
from pnc.graph.shared_trunk import shared_cut
from pnc.models.reference_networks import resnet

pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


class Small(nn.Module):
    """Two convolutions with norms, and a head."""

    def __init__(self, slope=0.0, n_classes=5):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.act1, self.act2 = nn.ReLU(), nn.LeakyReLU(slope)
        self.fc = nn.Linear(6, n_classes)

    def forward(self, x):
        x = self.act1(self.norm1(self.conv1(x)))
        return self.fc(self.act2(self.norm2(self.conv2(x))).mean((2, 3)))


def shared(target, source):
    recordings = [record(network, hazards.images(2)) for network in (target, source)]
    return shared_cut(*recordings), recordings


@pytest.mark.parametrize("name", hazards.REPRODUCED)
def test_a_copy_shares_everything_up_to_the_last_cut_before_the_features(name):
    network = hazards.build(hazards.REPRODUCED[name])
    recording = record(network, hazards.images(2))
    before = cut_points(recording)[: find_head(recording).features.index]
    last = before[-1] if before[-1].n_macs else before[0]
    assert shared_cut(recording, recording) == (last, last)


def test_another_head_is_no_part_of_the_trunk():
    source = hazards.build(Small)
    target = copy.deepcopy(source)
    target.fc = nn.Linear(6, 9)
    (in_target, in_source), recordings = shared(target, source)
    assert (in_target.name, in_source.name) == ("act2", "act2")
    images = hazards.images(7, seed=3)
    with torch.no_grad():
        tensors = [extract(recording, None, ["act2"])(images) for recording in recordings]
    assert torch.equal(*tensors)


@pytest.mark.parametrize(
    ("change", "last"),
    [
        (lambda net: net.conv1.weight[0, 0, 0, 0].add_(1e-6), INPUT),
        (lambda net: net.norm1.running_mean[0].add_(1e-6), "conv1"),
        (lambda net: net.norm1.num_batches_tracked.add_(1), "act2"),
        (lambda net: net.conv2.bias[0].add_(1e-6), "act1"),
        (lambda net: setattr(net.norm2, "eps", 1e-3), "conv2"),
        (lambda net: setattr(net.act2, "negative_slope", 0.1), "norm2"),
        (lambda net: setattr(net, "act1", nn.ReLU(inplace=True)), "act2"),
        (lambda net: setattr(net, "act1", nn.Identity()), "norm1"),
    ],
)
def test_the_trunk_ends_where_weights_statistics_or_settings_differ(change, last):
    source = hazards.build(Small)
    target = copy.deepcopy(source)
    with torch.no_grad():
        change(target)
    (in_target, in_source), _ = shared(target, source)
    assert in_target.name == in_source.name == last


def test_networks_of_other_kinds_share_the_input_alone():
    (in_target, in_source), _ = shared(hazards.build(Small), hazards.build(lambda: resnet((3, 8, 8), 5, 3)))
    assert in_target.name == in_source.name == INPUT


def test_cuts_of_other_names_are_the_same_place():
    source = hazards.build(Small)
    wrapped = nn.Sequential(copy.deepcopy(source))
    wrapped[0].fc = nn.Linear(6, 3)
    (in_target, in_source), _ = shared(wrapped, source)
    assert (in_target.name, in_source.name) == ("_0_act2", "act2")
    assert in_target.n_macs == in_source.n_macs
