"""Counts of what inference executes: a check of its cost that does not depend on the machine's speed."""

import copy
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import hazards
import pnc
from handmade import Bottleneck, Network, make_clone
from pnc.bench.random_lives import make_stage
from pnc.graph.recording import info, record

N_IMAGES = 10


class Kernels(TorchDispatchMode):
    """Counts the kernels that run within the block, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def kernels(run) -> Counter:
    with Kernels() as mode, torch.no_grad():
        run()
    return mode.counts


def macs(run) -> int:
    """Multiply-accumulates per image, of `N_IMAGES`."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    n_macs, rest = divmod(counter.get_total_flops(), 2 * N_IMAGES)
    assert rest == 0
    return n_macs


def head_macs(branch) -> int:
    return sum(tensor.numel() for name, tensor in branch.head.named_buffers() if name.endswith(".weight"))


@pytest.fixture
def net(stage):
    return pnc.attach(copy.deepcopy(stage.target), *stage.clones)


@pytest.fixture(scope="module")
def images(stage):
    return stage.images.repeat(N_IMAGES // len(stage.images), 1, 1, 1)


def test_a_composite_executes_the_target_once_and_each_branch_once(stage, net, images):
    target = macs(lambda: net.target(images))
    recorded = record(net.target, images)
    assert target == sum(info(node).n_macs for node in recorded.module.graph.nodes)
    added = sum(row.n_macs + head_macs(branch) for row, branch in zip(net.status(), net.branches, strict=True))
    assert macs(lambda: net(images)) == target + added
    with net.disabled():
        assert kernels(lambda: net(images)) == kernels(lambda: net.target(images)), "the target's kernels and no other"


def test_clones_at_one_cut_run_the_trunk_once(images):
    stage = make_stage()
    dog = stage.clones[1]
    net = pnc.attach(copy.deepcopy(stage.target), dog)
    base, one = kernels(lambda: net.target(images)), kernels(lambda: net(images))
    for n in (2, 3, 4):
        names = dict(zip(dog.classes, (f"{name} {n}" for name in dog.classes), strict=True))
        net.attach(dog, name=str(n), rename=names)
        found = kernels(lambda: net(images))
        assert found["convolution"] == base["convolution"] + n * (one["convolution"] - base["convolution"])


def test_a_clone_costs_as_much_as_rows_ask_for_it(stage, net, images):
    base = macs(lambda: net.target(images))
    assert macs(lambda: net(images, only=[()] * N_IMAGES)) == base
    for row, branch in zip(net.status(), net.branches, strict=True):
        whole = row.n_macs + head_macs(branch)
        for n in (1, 4, N_IMAGES):
            only = [row.name] * n + [()] * (N_IMAGES - n)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                net(images, only=only)
            assert counter.get_total_flops() == 2 * (N_IMAGES * base + n * whole)


def test_nothing_is_computed_for_detached_clones(stage, net, images):
    dog = next(iter(net.clones))
    with net.only(dog):
        plain = kernels(lambda: net(images))
        net.rescale({dog: pnc.Scalars(0.5)})
        calibrated = kernels(lambda: net(images))
    assert sum(calibrated.values()) > sum(plain.values()), "calibration costs, where there is any"
    assert not {"where", "eq", "einsum"} & plain.keys(), "neither scalars nor prefix tokens, where there are none"


def test_the_fused_form_executes_no_norm_of_a_clone_and_fewer_kernels(stage, net, images):
    net.attach(stage.clones[0], name="again", rename={"dog": "another dog"})
    fused = net.fused()
    plain, found, base = (kernels(lambda run=run: run(images)) for run in (net, fused, net.target))
    norms = [name for name in plain if "batch_norm" in name]
    assert sum(plain[name] - base[name] for name in norms) > 10
    assert all(found[name] == base[name] for name in norms)
    assert found["convolution"] == plain["convolution"] - 1, "two clones at one cut share the adapter's convolution"
    assert sum(found.values()) < 0.75 * sum(plain.values())
    assert macs(lambda: fused(images)) <= macs(lambda: net(images)) * 1.01, "the heads have some rows more"


def test_an_adapter_folded_into_a_convolution_saves_its_macs():
    target, source = Network(hazards.build(hazards.Residual)), Network(hazards.build(Bottleneck))
    into = next(cut.index for cut in source.cuts if cut.name == "first")
    net = pnc.attach(target.module, make_clone(target, source, "x", places=(1, into)))
    x = hazards.images(N_IMAGES)
    adapter, merged = 9 * 4 * 6 * 64 + 6 * 4 * 64, 9 * 4 * 4 * 64
    fused = net.fused()
    assert kernels(lambda: fused(x))["convolution"] == kernels(lambda: net(x))["convolution"] - 1
    more = 256  # upper bound for the rows of the fused head
    assert macs(lambda: net(x)) - macs(lambda: fused(x)) >= adapter - merged - more
