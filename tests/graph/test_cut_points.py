"""Cut points, heads and parts: exact at every cut of every network of `hazards`, and correctly described."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hazards
from pnc.foundation.errors import InputError
from pnc.foundation.network_state import differences, take_snapshot
from pnc.foundation.tensor_bits import same_bits
from pnc.graph.candidate_cuts import candidate_cuts, gaps
from pnc.graph.classifier import find_head
from pnc.graph.cut_points import INPUT, LOGITS, CutPoint, cut_points, extract
from pnc.graph.recording import info, record
from pnc.models.reference_networks import resnet

pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


def recording_of(factory):
    return record(hazards.build(factory), hazards.images(2))


def named(recording):
    return {cut.name: cut for cut in cut_points(recording)}


def run(recording, start, outputs, x):
    with torch.no_grad():
        return extract(recording, start, outputs)(x)


# -------------------------------------------------------------------------------------------------------------- extract


@pytest.mark.parametrize("name", hazards.REPRODUCED)
def test_prefix_then_suffix_is_the_network_at_every_cut(name):
    network = hazards.build(hazards.REPRODUCED[name])
    before = take_snapshot(network)
    recording = record(network, hazards.images(2))
    cuts = cut_points(recording)
    assert cuts[0].name == INPUT
    assert [cut.index for cut in cuts] == list(range(len(cuts)))
    for size in (2, 5) if name == "SqueezedBatch" else (1, 5):
        x = hazards.images(size, seed=size)
        kept = x.clone()
        with torch.no_grad():
            expected = recording.module(x.clone())
        *taps, whole = run(recording, None, [*cuts, LOGITS], x)
        assert same_bits(whole, expected)
        for cut, tap in zip(cuts, taps, strict=True):
            features = run(recording, None, [cut], x)
            assert same_bits(features, tap), cut.name
            assert features.shape == (size, *cut.shape)
            given = features.clone()
            assert same_bits(run(recording, cut, [LOGITS], features), expected), cut.name
            assert same_bits(features, given), f"the suffix from {cut.name} wrote to what it was given"
        assert same_bits(x, kept)
    assert not differences(network, before)


def test_outputs_come_in_the_order_asked_for_and_one_alone_as_a_tensor():
    recording = recording_of(hazards.Residual)
    x = hazards.images(2)
    cuts = named(recording)
    logits, features, again = run(recording, None, [LOGITS, cuts["layers_0_relu_1"], "layers_0_relu_1"], x)
    assert logits.shape == (2, hazards.N_CLASSES)
    assert same_bits(features, again)
    middle, end = run(recording, cuts["layers_0_relu_1"], ["layers_1_conv1", LOGITS], features)
    assert middle.shape == (2, 6, 4, 4)
    assert same_bits(end, logits)
    assert same_bits(run(recording, None, [INPUT], x), x)


def test_tapped_tensor_has_the_value_from_before_it_is_overwritten():
    recording = recording_of(hazards.OverwrittenCuts)
    x = hazards.images(3)
    with torch.no_grad():
        stem = hazards.build(hazards.OverwrittenCuts).eval().stem(x)
        tap, _ = run(recording, None, ["stem_2", LOGITS], x)
    assert same_bits(tap, stem)


def test_suffix_takes_tensors_in_another_memory_layout():
    recording = recording_of(hazards.VisionTransformer)
    cut = named(recording)["transpose"]
    tokens = run(recording, None, [cut], hazards.images(4))
    assert not tokens.is_contiguous()
    found = run(recording, cut, [LOGITS], tokens.contiguous())
    # Another layout may use other kernels, so the bits may differ.
    torch.testing.assert_close(found, run(recording, cut, [LOGITS], tokens), rtol=0, atol=1e-6)


def test_parts_share_the_weights_and_can_be_copied():
    network = hazards.build(hazards.Residual)
    recording = record(network, hazards.images(2))
    cut = named(recording)["layers_0_relu_1"]
    suffix = extract(recording, cut, [LOGITS])
    copied = copy.deepcopy(suffix)
    pointers = {p.data_ptr() for p in network.parameters()}
    assert {p.data_ptr() for p in suffix.parameters()} < pointers
    assert not {p.data_ptr() for p in copied.parameters()} & pointers
    assert not any(name.startswith("stem") for name, _ in suffix.named_modules())
    x = torch.rand(3, *cut.shape)
    with torch.no_grad():
        assert same_bits(copied(x), suffix(x))
    assert all(info(node) == info(twin) for node, twin in zip(suffix.graph.nodes, copied.graph.nodes, strict=True))


@pytest.mark.parametrize("factory", [hazards.VisionTransformer, hazards.Windows])
def test_suffix_can_be_exported(factory):
    recording = recording_of(factory)
    cut = candidate_cuts(recording)[1]
    suffix, features = extract(recording, cut, [LOGITS]), run(recording, None, [cut], hazards.images(5))
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(suffix, (features,), dynamic_shapes=(batch,)).module()
    with torch.no_grad():
        assert torch.equal(exported(features), suffix(features))


def test_unknown_and_undetermined_outputs_are_refused():
    recording = recording_of(hazards.Residual)
    with pytest.raises(InputError, match="no tensor named 'layer9'; its cut points: input, stem_0, stem_1"):
        extract(recording, None, ["layer9"])
    with pytest.raises(InputError, match="layers_0_conv1 cannot be computed from layers_1_relu_1 alone"):
        extract(recording, named(recording)["layers_1_relu_1"], ["layers_0_conv1"])
    with pytest.raises(InputError, match="outputs: expected at least one"):
        extract(recording, None, [])


# ----------------------------------------------------------------------------------------------------------- cut points


def test_resnet20_has_eleven_candidates():
    recording = record(resnet((3, 32, 32), 10, n_blocks=3), torch.randn(2, 3, 32, 32))
    found = candidate_cuts(recording)
    assert [cut.shape for cut in found] == [(3, 32, 32), *[(16, 32, 32)] * 4, *[(32, 16, 16)] * 3, *[(64, 8, 8)] * 3]
    assert all(cut.kind == "map" for cut in found)
    stem = 3 * 16 * 9 * 32 * 32
    block = 2 * 16 * 16 * 9 * 32 * 32
    assert [cut.n_macs for cut in found[:3]] == [0, stem, stem + block]
    assert [cut.n_params for cut in found[:3]] == [0, 16 * 27 + 32, 16 * 27 + 32 + 2 * (16 * 16 * 9 + 32)]
    head = find_head(recording)
    assert (head.features.kind, head.features.shape, head.n_features) == ("vector", (64,), 64)
    assert head.features.index > found[-1].index


@pytest.mark.parametrize("limit", [2, 3, 5, 8])
def test_candidates_are_spread_over_the_depth(limit):
    recording = record(resnet((3, 32, 32), 10, n_blocks=3), torch.randn(2, 3, 32, 32))
    every = candidate_cuts(recording, limit=100)
    found = candidate_cuts(recording, limit)
    assert len(found) == limit
    assert (found[0], found[-1]) == (every[0], every[-1])
    assert set(found) <= set(every)
    steps = [b.n_macs - a.n_macs for a, b in zip(found, found[1:], strict=False)]
    assert max(steps) <= every[-1].n_macs / (limit - 1) + max(
        b.n_macs - a.n_macs for a, b in zip(every, every[1:], strict=False)
    )


def test_limit_is_checked():
    with pytest.raises(InputError, match="limit: expected at least 2 .* got 1"):
        candidate_cuts(recording_of(hazards.Plain), limit=1)


def test_of_a_chain_without_multiplications_only_the_last_is_a_candidate():
    recording = recording_of(hazards.Residual)
    assert {"stem_0", "stem_1", "stem_2", "layers_1_add", "layers_1_relu_1"} <= named(recording).keys()
    assert [cut.name for cut in candidate_cuts(recording)] == [
        INPUT,
        "stem_2",
        "layers_0_relu_1",
        "layers_1_relu_1",
        "layers_2_relu_1",
    ]


def test_a_map_is_cut_before_it_is_padded_for_the_next_layer():
    class Padding(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3)
            self.classifier = nn.Linear(4, 5)

        def forward(self, x):
            x = F.pad(F.relu(self.stem(x)), (0, 1, 0, 1))
            return self.classifier(F.relu(self.last(x)).mean((2, 3)))

    recording = record(Padding(), torch.randn(2, 3, 8, 8))
    assert [(cut.name, cut.shape) for cut in candidate_cuts(recording)] == [
        (INPUT, (3, 8, 8)),
        ("relu", (4, 8, 8)),
        ("relu_1", (4, 7, 7)),
    ]


def test_tokens_and_their_prefix():
    recording = recording_of(hazards.VisionTransformer)
    cuts = named(recording)
    facts = {name: (cut.kind, cut.shape, cut.channel_dim, cut.n_prefix_tokens) for name, cut in cuts.items()}
    assert facts["patches"] == ("map", (8, 2, 2), 1, 0)
    assert facts["flatten"] == ("tokens", (8, 4), 1, 0)
    assert facts["transpose"] == ("tokens", (4, 8), 2, 0)
    assert facts["cat"] == facts["add"] == facts["norm"] == ("tokens", (6, 8), 2, 2)
    assert facts["getitem"] == ("vector", (8,), 1, 0)
    assert cuts["patches"].n_channels == cuts["norm"].n_channels == 8
    assert [cut.name for cut in candidate_cuts(recording)] == [INPUT, "add", "add_1", "norm"]


class LateTokens(hazards.VisionTransformer):
    """The class token is removed for some layers, then put before a register token."""

    def forward(self, x):
        x = self.tokens(x)
        token, others = x[:, :1], x[:, 1:]
        others = others * 2
        return self.head(torch.cat([token, others[:, 0:]], 1).mean(1))


def test_prefix_tokens_are_followed_through_slices():
    cuts = named(recording_of(LateTokens))
    assert cuts["cat_1"].n_prefix_tokens == 2

    class WithoutTokens(hazards.VisionTransformer):
        def forward(self, x):
            return self.head(self.tokens(x)[:, 2:].mean(1))

    cuts = named(recording_of(WithoutTokens))
    assert (cuts["getitem"].shape, cuts["getitem"].n_prefix_tokens) == ((4, 8), 0)


def test_class_tokens_alone_are_a_grid():
    class TwoTokens(hazards.VisionTransformer):
        def forward(self, x):
            tokens = self.tokens(x)[:, :2]
            return self.head(F.layer_norm(tokens, (8,)).mean(1))

    cuts = named(recording_of(TwoTokens))
    assert cuts["norm"].n_prefix_tokens == 2
    for name in ("getitem", "layer_norm"):
        assert (cuts[name].kind, cuts[name].shape, cuts[name].n_prefix_tokens) == ("tokens", (2, 8), 0)


def test_maps_with_the_channels_last():
    cuts = named(recording_of(hazards.ChannelsLastMaps))
    assert (cuts["permute"].kind, cuts["permute"].shape, cuts["permute"].channel_dim) == ("map", (8, 8, 4), 3)
    assert (cuts["add"].channel_dim, cuts["permute_1"].channel_dim) == (3, 1)


class PermutingModule(hazards.ChannelsLastMaps):
    """As many channels as rows, so that shapes alone do not show which is which."""

    class Permute(nn.Module):
        def __init__(self, *dims):
            super().__init__()
            self.dims = dims

        def forward(self, x):
            return x.permute(self.dims)

    def __init__(self):
        super().__init__()
        self.stem, self.last, self.first = hazards.stem(8), self.Permute(0, 2, 3, 1), self.Permute(0, -1, 1, 2)
        self.conv, self.tail = nn.Conv2d(8, 8, 3, padding=1), hazards.tail(8)

    def middle(self, x):
        return self.first(self.last(x).relu())


def test_channels_are_followed_through_modules_that_permute():
    cuts = named(recording_of(PermutingModule))
    assert [cuts[name].channel_dim for name in ("stem_2", "last", "relu", "first", "conv")] == [1, 3, 3, 1, 1]


def test_windows_in_front_of_which_the_batch_is_folded_are_no_cut_points():
    cuts = named(recording_of(hazards.Windows))
    assert list(cuts) == [INPUT, "stem_0", "stem_1", "stem_2", "permute", "reshape_2", "conv", "tail_0", "tail_1"]


def test_nothing_inside_of_a_residual_block_is_a_cut_point():
    names = named(recording_of(hazards.Residual))
    assert not any(name.startswith(("layers_0_conv", "layers_1_norm")) for name in names)
    assert named(recording_of(hazards.SqueezeExcite)).keys() == {
        *(INPUT, "stem_0", "stem_1", "stem_2", "mul", "conv", "tail_0", "tail_1")
    }


def test_in_place_activation_is_a_cut_point_and_so_is_what_it_overwrites():
    cuts = named(recording_of(hazards.OverwrittenCuts))
    assert {"stem_2", "sub", "clamp"} <= cuts.keys()
    assert "setitem" not in cuts


def test_costs_grow_towards_the_output():
    for factory in (hazards.Residual, hazards.VisionTransformer, hazards.SharedModules):
        recording = recording_of(factory)
        cuts = cut_points(recording)
        nodes = [info(node) for node in recording.module.graph.nodes]
        for a, b in zip(cuts, cuts[1:], strict=False):
            assert (a.n_macs, a.n_params) <= (b.n_macs, b.n_params)
        assert cuts[-1].n_macs <= sum(facts.n_macs for facts in nodes)
        assert cuts[-1].n_params <= sum(facts.n_params for facts in nodes)


class FewCuts(nn.Module):
    """Two parallel branches with most of the operations, then a layer with most of the weights."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = hazards.stem(), nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 1)
        self.wide, self.head = nn.Linear(512, 64), nn.Linear(64, hazards.N_CLASSES)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.wide((self.one(x).relu() + self.two(x)).flatten(1)).relu())


def test_gaps_are_found_by_macs_and_by_parameters():
    macs = {"stem_0": 3 * 4 * 9 * 64, "add": (4 * 8 * 9 + 4 * 8) * 64, "wide": 512 * 64, "logits": 64 * 5}
    params = {"stem_0": 3 * 4 * 9, "add": 4 * 8 * 9 + 8 + 4 * 8 + 8, "wide": 512 * 64 + 64, "logits": 64 * 5 + 5}
    found = gaps(recording_of(FewCuts))
    assert [(gap.after, gap.before) for gap in found[:2]] == [("flatten", "wide"), ("stem_2", "add")]
    assert {gap.before: gap.share for gap in found if gap.share} == {
        name: pytest.approx(n / sum(macs.values())) for name, n in macs.items()
    }
    n_params = sum(params.values()) + 8  # of the norm
    assert {gap.before: gap.params_share for gap in found if gap.before in params} == {
        name: pytest.approx(n / n_params) for name, n in params.items()
    }
    assert [gap.before for gap in found if gap.is_large] == ["wide", "add"]


# ----------------------------------------------------------------------------------------------------------------- head


HEADS = {
    "Plain": ("tail_1", "vector", "tail.2"),
    "VisionTransformer": ("getitem", "vector", "head"),
    "HiddenLayerHead": ("head_2", "vector", "head.3"),
    "Recurrent": ("getitem", "vector", "head"),
    "ConvolutionHead": ("stem_2", "map", "head"),
    "TorchTransformer": ("mean", "vector", "head"),
}


@pytest.mark.parametrize("name", HEADS)
def test_head_with_its_weights(name):
    network = hazards.build(hazards.REPRODUCED[name])
    recording = record(network, hazards.images(2))
    head = find_head(recording)
    assert (head.features.name, head.features.kind, head.module) == HEADS[name]
    layer = network.get_submodule(head.module)
    assert same_bits(head.weight, layer.weight.detach().reshape(hazards.N_CLASSES, head.n_features))
    assert same_bits(head.bias, layer.bias.detach())
    x = hazards.images(3)
    features, logits = run(recording, None, [head.features, LOGITS], x)
    pooled = features.flatten(2).mean(2) if head.features.kind == "map" else features
    # The head may pool after its layer, which changes the order of summation.
    torch.testing.assert_close(pooled @ head.weight.T + head.bias, logits, rtol=0, atol=1e-5)


def test_head_made_of_functions_has_no_module():
    recording = recording_of(hazards.HeadWithoutBias)
    head = find_head(recording)
    assert (head.features.name, head.module, head.weight, head.bias) == ("amax", None, None, None)


class ActivationAfterHead(hazards.ConvolutionHead):
    def forward(self, x):
        return self.pool(self.head(self.stem(x)).relu()).flatten(1)


def test_layer_whose_output_is_not_the_logits_lends_no_weights():
    head = find_head(recording_of(ActivationAfterHead))
    assert (head.features.name, head.module, head.weight) == ("stem_2", "head", None)


def test_two_heads_on_one_tensor_have_it_for_features():
    head = find_head(recording_of(hazards.Distilled))
    assert (head.features.name, head.features.kind, head.module) == ("norm", "tokens", None)
    assert head.n_features == 8


class TwoBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = hazards.Plain(), hazards.VisionTransformer()

    def forward(self, x):
        return self.one(x) + self.two(x)


def test_heads_on_several_branches_have_the_logits_for_features():
    recording = recording_of(TwoBranches)
    head = find_head(recording)
    assert isinstance(head.features, CutPoint)
    assert (head.features.kind, head.features.shape, head.module) == ("vector", (hazards.N_CLASSES,), None)
    x = hazards.images(3)
    features, logits = run(recording, None, [head.features, LOGITS], x)
    assert same_bits(features, logits)
    assert [cut.name for cut in candidate_cuts(recording)] == [INPUT]


class NothingLearned(nn.Module):
    def forward(self, x):
        return x.relu().mean((2, 3))


def test_network_without_a_head_is_refused_with_what_there_is():
    recording = recording_of(NothingLearned)
    with pytest.raises(InputError, match="no classifier head found.*deepest cut points are input, relu$"):
        find_head(recording)
    with pytest.raises(InputError, match="no classifier head found"):
        candidate_cuts(recording)
