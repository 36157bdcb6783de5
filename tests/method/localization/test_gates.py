import pytest
import torch

from channel_zoo import FusedAttention, NormInBetween, SqueezeExcite
from pnc.channels.channel_masks import channel_masks
from pnc.channels.channel_spaces import channel_spaces
from pnc.channels.compaction import mask_segment
from pnc.channels.mac_budget import Costs, masks_within
from pnc.channels.module_inlining import opened
from pnc.foundation.network_state import differences, take_snapshot
from pnc.method.localization.channel_scores import Gated
from pnc.method.localization.gates import learn_gates
from segments import half, network, segment_of


def images(n, seed=1):
    return torch.randn((n, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def zeros(spaces):
    return {space.name: torch.zeros(space.size) for space in spaces.spaces}


def towards(function, n=8):
    seed = 0
    while True:
        seed += 1
        x = images(n, seed)
        wanted = function(x).detach()
        yield x, lambda outputs, wanted=wanted: (outputs - wanted).square().mean()


@pytest.mark.parametrize("factory", [SqueezeExcite, FusedAttention, NormInBetween])
def test_gates_for_all_samples_are_masks(factory):
    segment = segment_of(network(factory))
    spaces = channel_spaces(segment)
    masks = half(spaces)
    gated = Gated(opened(segment), spaces)
    expected = mask_segment(segment, spaces, masks)(images(3))
    found = gated.run_with(images(3), masks.flat.double())
    torch.testing.assert_close(found, expected)  # zeros by another way
    each = gated.run_with(images(3), masks.flat.double().expand(3, -1))
    assert torch.equal(each, found)


def test_the_units_that_matter_are_found_from_equal_ranks():
    """Targets come from the segment without some units: these must be removed and the others kept."""
    segment = segment_of(network(NormInBetween))
    spaces = channel_spaces(segment)
    dropped = torch.tensor([1, 4, 6])
    truth = channel_masks(spaces, {"first": torch.ones(8, dtype=torch.bool).index_fill(0, dropped, False)})
    costs = Costs(segment, spaces)
    # The targets use batch statistics too, which are per channel, so masks do not mix them.
    teacher = mask_segment(segment, spaces, truth)
    teacher.norm.training, teacher.norm.momentum = True, 0.0
    n_macs = costs.n_macs(truth.flat)
    density = costs.density(truth.flat)
    ranking, _ = learn_gates(segment, costs, zeros(spaces), density, towards(teacher), 150, tune=False)
    found = masks_within(costs, ranking, n_macs)
    assert torch.equal(found.flat, truth.flat)


@pytest.mark.parametrize("tune", [True, False])
def test_nothing_of_the_segment_changes_and_the_copy_differs_in_its_norms_only(tune):
    module = network(NormInBetween).requires_grad_(True).train()
    segment = segment_of(module)
    spaces = channel_spaces(segment)
    before, state = take_snapshot(module), torch.get_rng_state()
    arguments = (segment, Costs(segment, spaces), zeros(spaces), 0.5)
    (ranking, learned), (again, _) = (
        learn_gates(*arguments, towards(lambda x: x.mean((1, 2, 3), keepdim=True)), 5, tune=tune) for _ in range(2)
    )
    assert not differences(module, before)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.get_rng_state().equal(state)
    assert all(torch.equal(ranking[name], again[name]) for name in ranking)
    assert float(ranking["first"].abs().max()) > 0
    weights = segment.state_dict()
    changed = {name for name, tensor in learned.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert changed == ({"norm.weight", "norm.bias"} if tune else set()) | {"norm.num_batches_tracked"}
    assert not any(parameter.requires_grad for parameter in learned.parameters())
