import pytest
import torch
from torch import nn

from channel_zoo import Net, NormInBetween
from pnc.channels.channel_spaces import channel_spaces
from pnc.channels.compaction import compact
from pnc.foundation.errors import InputError
from pnc.foundation.network_state import differences, take_snapshot
from pnc.method.localization.norms import batch_norms, reestimate_statistics, training_norms, tunable, tune_norms
from segments import half, network, segment_of


def images(n, seed=1):
    return torch.randn((n, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compacted():
    segment = segment_of(network(NormInBetween))
    spaces = channel_spaces(segment)
    return compact(segment, spaces, half(spaces))


def test_statistics_become_those_of_the_inputs():
    part = compacted()
    batches = [images(4, seed) for seed in (1, 2, 3)]
    reestimate_statistics(part, iter(batches))
    outs = [part.first(batch) for batch in batches]
    mean = torch.stack([out.mean((0, 2, 3)) for out in outs]).mean(0)
    variance = torch.stack([out.var((0, 2, 3)) for out in outs]).mean(0)
    torch.testing.assert_close(part.norm.running_mean, mean)  # a running mean, in another order
    torch.testing.assert_close(part.norm.running_var, variance)
    assert part.norm.num_batches_tracked == 3


def test_only_statistics_change():
    part = compacted()
    before = {name: tensor.clone() for name, tensor in part.state_dict().items()}
    momentum, state = part.norm.momentum, torch.get_rng_state()
    reestimate_statistics(part, [images(4)])
    changed = {name for name, tensor in part.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert part.norm.momentum == momentum
    assert not any(module.training for module in part.modules())
    assert torch.get_rng_state().equal(state)


def test_everything_is_restored_after_an_error():
    part = compacted()
    before, momentum = take_snapshot(part), part.norm.momentum
    with pytest.raises(RuntimeError):
        reestimate_statistics(part, [images(4), torch.zeros(4, 2, 8, 8, dtype=torch.float64)])
    assert not differences(part, before)
    assert part.norm.momentum == momentum


@pytest.mark.parametrize("batches", [[], [images(1)]])
def test_statistics_need_inputs(batches):
    with pytest.raises(InputError, match="2 or more inputs, got none"):
        reestimate_statistics(compacted(), batches)


def test_a_single_sample_is_left_out():
    wanted, part = compacted(), compacted()
    reestimate_statistics(wanted, [images(4)])
    reestimate_statistics(part, [images(1, seed=2), images(4)])
    torch.testing.assert_close(part.state_dict(), wanted.state_dict(), rtol=0, atol=0)


def test_statistics_of_other_libraries_norms(torchvision):
    from timm.layers import BatchNormAct2d

    class Fused(Net):
        def __init__(self):
            super().__init__(norm=BatchNormAct2d(8), conv=nn.Conv2d(8, 8, 1), inner=nn.BatchNorm2d(8))

        def middle(self, x):
            return self.inner(self.conv(self.norm(x)))

    segment = segment_of(network(Fused))
    spaces = channel_spaces(segment)
    assert [space.name for space in spaces.spaces] == ["first", "conv"]
    part = compact(segment, spaces, half(spaces))
    reestimate_statistics(part, [images(6)])
    torch.testing.assert_close(part.norm.running_mean, part.first(images(6)).mean((0, 2, 3)))  # order of sums
    assert not part.norm.training


# --------------------------------------------------------------------------------------------------------------- tuning


def towards(part, wanted):
    """Batches of the same images, with the squared distance of the outputs from the wanted ones."""
    while True:
        yield images(16), lambda outputs: (outputs - wanted).square().mean()


def tuned(change, n_steps=200, start=None):
    """A segment tuned towards a copy with other norms, and the outputs of that copy."""
    part, wanted = compacted(), compacted()
    reestimate_statistics(wanted, [images(16)])
    change(wanted.norm)
    expected = wanted(images(16)).detach()
    tune_norms(part, towards(part, expected), n_steps, [images(16)], start)
    return part, expected


def test_scales_and_shifts_are_found_and_end_up_in_the_statistics():
    before = {name: tensor.clone() for name, tensor in compacted().state_dict().items()}

    def change(norm):
        with torch.no_grad():
            norm.weight.mul_(torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64))
            norm.bias.add_(torch.tensor([0.5, -0.5, 0.0, 1.0], dtype=torch.float64))

    part, wanted = tuned(change)
    reached = (part(images(16)) - wanted).square().mean()
    untuned = compacted()
    reestimate_statistics(untuned, [images(16)])
    assert reached < 0.05 * (untuned(images(16)) - wanted).square().mean()
    changed = {name for name, tensor in part.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert bool((part.norm.running_var >= 0).all())
    assert not any(module.training for module in part.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in part.parameters())


def test_without_steps_only_statistics_are_estimated_unless_there_is_a_start():
    part, plain, start = compacted(), compacted(), compacted()
    reestimate_statistics(plain, [images(16)])
    tune_norms(part, towards(part, None), 0, [images(16)])
    torch.testing.assert_close(part(images(4)), plain(images(4)))  # statistics went through a root and a square
    with torch.no_grad():
        start.norm.weight.mul_(2)
        start.norm.bias.sub_(0.25)
    tune_norms(part, towards(part, None), 0, [images(16)], start)
    reestimate_statistics(start, [images(16)])
    assert torch.equal(part.norm.weight, plain.norm.weight)
    torch.testing.assert_close(part(images(4)), start(images(4)))  # the same


def test_channels_of_scale_zero_stay_as_they_are_and_signs_stay():
    part, start = compacted(), compacted()
    with torch.no_grad():
        for module in (part, start):
            module.norm.weight[0] = 0
        start.norm.weight[0], start.norm.bias[0] = 5.0, 5.0
        start.norm.weight[1] *= -1
    weight = part.norm.weight.clone()
    tune_norms(part, towards(part, None), 0, [images(16)], start)
    assert torch.equal(part.norm.weight, weight)
    assert bool(part(images(4)).isfinite().all())
    assert bool((part.norm.running_var >= 0).all())


def test_segments_without_batch_norms_are_left_alone():
    part = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).eval().requires_grad_(False)
    before = take_snapshot(part)
    x = torch.randn(3, 4)
    tune_norms(part, iter([(x, lambda out: out.sum())]), 1, [x])
    assert not differences(part, before)


def test_flags_are_restored_after_an_error():
    part = compacted()
    before, momentum = take_snapshot(part), part.norm.momentum
    with pytest.raises(ZeroDivisionError), training_norms(part) as parameters:
        assert part.norm.training and len(parameters) == 2 and parameters[0].requires_grad
        raise ZeroDivisionError
    assert part.norm.momentum == momentum
    assert not differences(part, before)


class OnePlusWeight(nn.BatchNorm2d):
    """Multiplies by 1 + weight."""

    def forward(self, x):
        factor = 1 / (self.num_batches_tracked + 1) if self.momentum is None else self.momentum
        if self.training:
            self.num_batches_tracked += 1
        tensors = self.running_mean, self.running_var, 1 + self.weight, self.bias
        return nn.functional.batch_norm(x, *tensors, self.training, float(factor), self.eps)


class SquaredWeight(OnePlusWeight):
    def forward(self, x):
        return super().forward(x) * self.weight[:, None, None]


class FixedMomentum(nn.BatchNorm2d):
    """Collects its statistics in another way."""

    def forward(self, x):
        tensors = self.running_mean, self.running_var, self.weight, self.bias
        return nn.functional.batch_norm(x, *tensors, self.training, 0.1, self.eps)


class WithActivation(nn.BatchNorm2d):
    """As timm's: the norm, then an activation."""

    def forward(self, x):
        return super().forward(x).relu()


class NoneOfThese(nn.BatchNorm2d):
    def forward(self, x):
        raise TypeError("not so")


def with_norm(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        part = nn.Sequential(nn.Conv2d(3, 4, 3), kind(4)).double().eval()
        part[1].running_mean.uniform_(-0.5, 0.5)
        part[1].weight.data.uniform_(0.5, 1.5)
    return part


@pytest.mark.parametrize("kind", [OnePlusWeight, SquaredWeight])
def test_a_norm_that_uses_its_weight_in_another_way_is_not_tuned_and_a_warning_says_so(kind):
    part, plain = with_norm(kind), with_norm(kind)
    assert batch_norms(part) == [part[1]] and tunable(batch_norms(part)) == []
    with pytest.warns(UserWarning, match=f"norm layers of type {kind.__name__} use weight and bias in another way"):
        tune_norms(part, ((images(16), lambda out: out.square().sum()) for _ in range(9)), 9, [images(16)])
    reestimate_statistics(plain, [images(16)])
    assert torch.equal(part(images(4)), plain(images(4)))
    assert torch.equal(part[1].weight, with_norm(kind)[1].weight)


@pytest.mark.parametrize("kind", [FixedMomentum, NoneOfThese])
def test_a_norm_that_collects_statistics_in_another_way_keeps_them(kind):
    part = with_norm(kind)
    before = {name: tensor.clone() for name, tensor in part.state_dict().items()}
    assert batch_norms(part) == []
    reestimate_statistics(
        nn.Sequential(part[0], part[1], nn.Identity()) if kind is FixedMomentum else part[:1], [images(4)]
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in part.state_dict().items())


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, WithActivation])
def test_norms_that_are_understood_are_tuned(kind):
    part = with_norm(kind)
    assert tunable(batch_norms(part)) == [part[1]]
    before = part(images(16)).square().mean()
    tune_norms(part, ((images(16), lambda out: out.square().mean()) for _ in range(50)), 50, [images(16)])
    assert part(images(16)).square().mean() < 0.5 * before
