import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import hazards
from channel_zoo import (
    CASES,
    Chain,
    ExplicitAttention,
    FusedAttention,
    LayerNorm2d,
    Net,
    UnknownOperation,
    WeightFromAllChannels,
)
from pnc.channels import rule_table, size_arguments, tensor_rules
from pnc.channels.channel_masks import channel_masks
from pnc.channels.channel_spaces import channel_spaces
from pnc.channels.compaction import compact, filled, mask_segment, output_channels, own_copy
from pnc.foundation.errors import MismatchError, PNCError
from pnc.foundation.network_state import differences, take_snapshot
from pnc.graph.candidate_cuts import candidate_cuts
from pnc.graph.classifier import find_head
from pnc.graph.cut_points import extract
from pnc.graph.nodes import info
from pnc.graph.recording import record
from segments import assert_compact_is_masked, half, network, segment_of


def images(n, seed=1):
    return torch.randn((n, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def halved(segment, free_output=False):
    spaces = channel_spaces(segment, free_output)
    masks = half(spaces)
    return compact(segment, spaces, masks), mask_segment(segment, spaces, masks), spaces, masks


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}


@pytest.mark.parametrize("name", CASES)
def test_one_unit_per_space_still_runs_and_equals_masking(name):
    segment = segment_of(network(CASES[name][0]))
    spaces = channel_spaces(segment)
    one = channel_masks(spaces, {space.name: torch.arange(space.size) == space.size - 1 for space in spaces.spaces})
    smaller, masked = compact(segment, spaces, one), mask_segment(segment, spaces, one)
    # Sums over fewer terms are taken in another order.
    torch.testing.assert_close(smaller(images(3)), masked(images(3)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", hazards.REPRODUCED)
def test_every_network_that_can_be_recorded_can_be_compacted(name):
    module = hazards.build(hazards.REPRODUCED[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parameter = next(module.parameters())
        recording = record(module, hazards.images(2).to(parameter.dtype))
        segment = extract(recording, None, [find_head(recording).features])
        smaller, masked, spaces, _ = halved(segment)
        x = hazards.images(5).to(parameter.dtype)
        found, expected = smaller(x).float(), masked(x).float()
    tolerance = 1e-4 if parameter.dtype == torch.float32 else 0.05  # rounding of float32, of half types
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    n_params, n_before = (sum(p.numel() for p in m.parameters()) for m in (smaller, own_copy(segment)))
    assert n_params < n_before if spaces.spaces else n_params == n_before


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("test_resnet", 0.40),
        ("test_byobnet", 0.55),
        ("test_efficientnet", 0.55),
        ("test_convnext2", 0.55),
        ("test_nfnet", 0.55),
        ("test_vit", 0.75),
        ("test_vit_relpos", 0.75),
    ],
)
def test_families_shrink_to_the_promised_share(torchvision, name, share):
    """timm's miniature networks after the stem, with half of every space dropped."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = timm.create_model(name, num_classes=5).eval()
    size = module.default_cfg["input_size"][1]
    recording = record(module, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
    segment = extract(recording, candidate_cuts(recording)[1], [find_head(recording).features])
    smaller, *_ = halved(segment)  # compared with masking in float64 on the way
    n_params, n_before = (sum(p.numel() for p in m.parameters()) for m in (smaller, segment))
    assert n_params <= share * n_before


def test_weights_and_layer_sizes_shrink():
    smaller, *_ = halved(segment_of(network(Chain)))
    assert shapes(smaller) == {
        "first.weight": (4, 3, 3, 3),
        "first.bias": (4,),
        "last.weight": (5, 4, 1, 1),
        "last.bias": (5,),
    }
    assert (smaller.first.out_channels, smaller.last.in_channels, smaller.last.out_channels) == (4, 4, 5)


def test_a_mask_zeroes_and_keeps_the_shapes():
    segment = segment_of(network(Chain))
    _, masked, _, masks = halved(segment)
    assert shapes(masked) == shapes(segment)
    dropped = ~masks.kept["first"]
    assert not masked.first.weight[dropped].any() and not masked.first.bias[dropped].any()
    assert torch.equal(masked.first.weight[~dropped], segment.first.weight[~dropped])


def test_whole_heads_go():
    smaller, *_ = halved(segment_of(network(FusedAttention)))
    assert shapes(smaller)["qkv.weight"] == (3 * 2 * 4, 12)  # two of three heads are left
    assert shapes(smaller)["proj.weight"] == (12, 2 * 4)


def test_constants_that_shrink_replace_what_they_were_computed_from():
    smaller, *_ = halved(segment_of(network(WeightFromAllChannels)))
    assert sorted(shape for shape in shapes(smaller).values() if len(shape) == 4) == [
        (4, 3, 3, 3),
        (4, 4, 3, 3),
        (5, 4, 1, 1),
    ]
    assert not any(node.target is torch.index_select for node in smaller.graph.nodes)


@pytest.mark.parametrize("form", [compact, mask_segment, lambda segment, *_: own_copy(segment)])
def test_copies_own_all_they_have(form):
    module = network(lambda: Net(norm=LayerNorm2d(8), bn=nn.BatchNorm2d(8))).train()
    segment = segment_of(module)
    spaces = channel_spaces(segment)
    before = take_snapshot(module)
    made = form(segment, spaces, half(spaces))
    tensors = [*made.parameters(), *made.buffers()]
    assert not any(t.requires_grad for t in tensors)
    assert not any(part.training for part in made.modules())
    with torch.no_grad():
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.zero_()
    assert not differences(module, before)
    theirs = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    assert not theirs & {t.untyped_storage().data_ptr() for t in tensors}


def test_parametrized_layers_become_plain_and_the_originals_stay():
    class Normalized(Net):
        def __init__(self):
            super().__init__(mid=parametrizations.weight_norm(nn.Conv2d(8, 8, 1)))

        def middle(self, x):
            return self.mid(x)

    module = network(Normalized)
    before = take_snapshot(module)
    smaller, masked, spaces, _ = halved(segment_of(module))
    assert [space.name for space in spaces.spaces] == ["first", "mid"]
    assert shapes(smaller)["mid.weight"] == (4, 4, 1, 1)
    torch.testing.assert_close(smaller(images(3)), masked(images(3)), rtol=1e-9, atol=1e-9)  # another order of sums
    assert not differences(module, before)


def test_layers_with_hooks_are_opened_or_stay():
    def hooked(hook):
        module = network(Chain)
        module.first.register_forward_hook(hook)
        return assert_compact_is_masked(segment_of(module))

    assert [s.name for s in hooked(lambda m, args, out: 2 * out).spaces] == ["first"]
    spaces = hooked(lambda m, args, out: out * float(out.sum() > 0))
    assert spaces.frozen["first"] == "first has hooks, which may change its output"


def test_a_free_output_keeps_the_channels_that_it_says():
    segment = segment_of(network(Chain))
    smaller, masked, spaces, masks = halved(segment, free_output=True)
    keep = output_channels(spaces, masks)
    assert keep.equal(masks.keep("last"))
    torch.testing.assert_close(smaller(images(3)), masked(images(3))[:, keep], rtol=1e-9, atol=1e-9)  # order of sums
    frozen = channel_spaces(segment)
    assert output_channels(frozen, half(frozen)) is None


def test_facts_about_nodes_are_those_of_the_smaller_network():
    module = network(ExplicitAttention).requires_grad_(False)
    segment = segment_of(module)
    for graph in (segment, halved(segment)[0]):
        n_flops = []
        for size in (2, 3):
            with FlopCounterMode(display=False) as counter:
                graph(images(size))
            n_flops.append(counter.get_total_flops())
        assert sum(info(node).n_macs for node in graph.graph.nodes) == (n_flops[1] - n_flops[0]) // 2
        assert sum(info(node).n_params for node in graph.graph.nodes) == sum(p.numel() for p in graph.parameters())
    found = {node.name: info(node).shape for node in halved(segment)[0].graph.nodes}
    assert (found["query"], found["softmax"], found["up"]) == ((2, 4, 8), (2, 2, 4, 4), (2, 4, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(dtype):
    module = network(Chain).to(dtype)
    recording = record(module, torch.zeros(2, 3, 8, 8, dtype=dtype))
    smaller, *_ = halved(extract(recording, None, [find_head(recording).features]))
    assert {p.dtype for p in smaller.parameters()} == {dtype}
    assert smaller(torch.zeros(1, 3, 8, 8, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("name", ["FusedAttention", "NormsThatCountChannels", "WeightFromAllChannels", "GatedHalves"])
def test_compacted_segments_can_be_copied_saved_and_exported(name):
    segment = segment_of(network(CASES[name][0]))
    smaller, _, spaces, masks = halved(segment)
    expected = smaller(images(2))
    assert torch.equal(copy.deepcopy(smaller)(images(2)), expected)
    again = compact(segment, spaces, masks)
    for parameter in again.parameters():
        parameter.zero_()
    again.load_state_dict(smaller.state_dict())
    assert torch.equal(again(images(2)), expected)
    exported = torch.export.export(smaller, (images(2),)).module()
    torch.testing.assert_close(exported(images(2)), expected, rtol=1e-9, atol=1e-9)  # kernels may be chosen anew


def test_a_segment_with_channels_filled_in_can_be_pickled():
    smaller, *_ = halved(segment_of(network(CASES["AddedToFixed"][0])))
    assert any(node.target is filled for node in smaller.graph.nodes)
    again = pickle.loads(pickle.dumps(smaller))  # noqa: S301 - our own bytes
    assert torch.equal(again(images(2)), smaller(images(2)))


def test_a_wrong_rule_cannot_give_a_wrong_network(monkeypatch):
    segment = segment_of(network(UnknownOperation))
    monkeypatch.setitem(rule_table.FUNCTION_RULES, "cumsum", tensor_rules.conversion)
    spaces = channel_spaces(segment)
    assert spaces.spaces
    with pytest.raises(PNCError, match=r"differs from the masked one by .* clone it with density=1"):
        compact(segment, spaces, half(spaces))


def test_a_missing_rewrite_is_an_error(monkeypatch):
    segment = segment_of(network(FusedAttention))
    monkeypatch.delitem(size_arguments._REWRITES, "reshape")
    spaces = channel_spaces(segment)
    with pytest.raises(PNCError, match="the compacted segment cannot run"):
        compact(segment, spaces, half(spaces))


@pytest.mark.parametrize("form", [compact, mask_segment, lambda segment, *given: output_channels(*given)])
def test_masks_of_other_spaces_are_refused(form):
    segment = segment_of(network(Chain))
    other = channel_spaces(segment_of(network(FusedAttention)), free_output=True)
    with pytest.raises(MismatchError, match="made for other channel spaces"):
        form(segment, channel_spaces(segment, free_output=True), half(other))
