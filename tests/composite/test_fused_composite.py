"""The fused form of a composite: the same logits up to rounding, base logits bit for bit, from fewer operations."""

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

import hazards
import pnc
from handmade import Bottleneck, Network, make_branch, make_clone
from pnc.channels.channel_masks import ChannelMasks
from pnc.channels.channel_spaces import channel_spaces
from pnc.channels.compaction import compact, filled
from pnc.clones.branch import Scalars
from pnc.composite import fused_composite
from pnc.composite.forward_plan import Plan
from pnc.composite.fused_composite import FusedComposite
from pnc.composite.layer_folding import folded_part
from pnc.composite.target_watch import TargetWatch
from pnc.foundation.errors import InputError, PNCError
from pnc.graph.cut_points import LOGITS, extract
from pnc.models.model_specs import build_model

NAMES = tuple("abcde")


@cache
def small(name) -> Network:
    return Network(hazards.build(hazards.REPRODUCED[name]))


@cache
def reference(spec, shape=(3, 16, 16)) -> Network:
    return Network(build_model(spec, NAMES, shape, seed=1).module, shape)


def plan_of(target, branches, **settings) -> Plan:
    """The plan of a composite with these branches."""
    cuts = list(dict.fromkeys(branch.stitched.adapter.target_cut for branch in branches))
    names = tuple(str(number) for number in range(len(branches)))
    return Plan(
        **{
            "trunk": extract(target.recording, None, [*cuts, target.features, LOGITS]),
            "features": (target.features,),
            "taps": tuple(cuts.index(branch.stitched.adapter.target_cut) for branch in branches),
            "views": (0,) * len(branches),
            "names": names,
            "branches": tuple(branches),
            "calibrated": tuple(not branch.scalars.is_identity for branch in branches),
            "classes": (*NAMES, *(f"{n}{k}" for n, b in zip(names, branches, strict=True) for k in b.offset.tolist())),
            "base_priority": 0.0,
            "probe": target.recording.probe,
            "clones": (),
            "watch": TargetWatch(target.module, target.recording.module.graph),
            **settings,
        }
    )


def assert_fused(plan, images) -> FusedComposite:
    fused = FusedComposite(plan)
    with torch.no_grad():
        expected, found = plan.logits(images), fused(images)
    assert found.shape == expected.shape
    assert torch.equal(found[:, :5], expected[:, :5])
    # Folding weights and reordering sums changes the rounding.
    scale = float(expected[:, 5:].abs().max().clamp_min(1))
    assert float((found - expected).abs().max()) <= 1e-5 * scale
    return fused


def n_called(fused, function) -> int:
    return sum(node.target is function for body in fused.bodies for node in body.graph.nodes)


def n_norms(module) -> int:
    called = n_called(module, F.batch_norm) if isinstance(module, FusedComposite) else 0
    return called + sum(isinstance(part, _NormBase) for part in module.modules())


@pytest.mark.filterwarnings("ignore")  # some of these networks are deprecated on purpose
@pytest.mark.parametrize("name", hazards.REPRODUCED)
def test_it_equals_the_composite_wherever_the_source_is_cut(name):
    target, source = small("Residual"), small(name)
    deepest = min(source.features.index, len(source.cuts) - 1)
    places = sorted({0, min(1, deepest), deepest // 2, deepest})
    branches = [
        make_branch(target, source, (at, into), rectify, seed=into)
        for at, into, rectify in [*((0, into, False) for into in places), (3, places[1], True), (3, places[-1], False)]
    ]
    branches.append(make_branch(target, source, (0, 0), is_identity=True))
    images = hazards.images(3, seed=5)
    assert_fused(plan_of(target, branches), images)
    assert torch.equal(images, hazards.images(3, seed=5))


@pytest.mark.parametrize("spec", ["zoo:resnet20?width=0.5", "zoo:vit_tiny", "zoo:mobilenetv2?width=0.5"])
def test_it_equals_the_composite_on_reference_networks(spec):
    target, source = reference("zoo:resnet20?width=0.5"), reference(spec)
    depth = source.features.index
    places = [(0, 0), (4, depth // 3), (4, depth // 2), (9, depth)]
    for one, other in ((target, source), (source, target)):
        there = [(a * (len(one.cuts) - 1) // len(target.cuts), min(b, other.features.index)) for a, b in places]
        plan = plan_of(one, [make_branch(one, other, place, place[1] % 2 == 0, seed=place[1]) for place in there])
        assert_fused(plan, torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)))


def test_norms_are_folded_also_into_the_adapter():
    target, source = small("Residual"), small("Residual")
    whole = make_branch(target, source, (0, 0))
    assert n_norms(whole) == 8 and n_norms(assert_fused(plan_of(target, [whole]), hazards.images(3))) == 0
    before_norm = next(cut.index for cut in source.cuts if cut.name == "stem_0")
    linear = make_branch(target, source, (0, before_norm))
    assert n_norms(assert_fused(plan_of(target, [linear]), hazards.images(3))) == 0
    rectified = make_branch(target, source, (0, before_norm), rectify=True)
    assert n_norms(assert_fused(plan_of(target, [rectified]), hazards.images(3))) == 1, "behind a ReLU it must stay"


class PaddedConv(nn.Conv2d):
    """A convolution that is called as a function, since it pads its input with a layer of its own."""

    def __init__(self, *sizes, **settings) -> None:
        super().__init__(*sizes, **settings)
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x):
        return F.conv2d(self.pad(x), self.weight, self.bias, self.stride, groups=self.groups)


def test_norms_are_folded_into_convolutions_that_are_called_as_functions():
    torch.manual_seed(0)
    layers = [PaddedConv(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), PaddedConv(8, 8, 2, groups=8, bias=False)]
    net = nn.Sequential(*layers, nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    target, source = small("Residual"), Network(net)
    before = {name: tensor.clone() for name, tensor in source.module.state_dict().items()}
    whole = make_branch(target, source, (0, 0))
    fused = assert_fused(plan_of(target, [whole]), hazards.images(3))
    assert n_norms(whole) == 2 and n_norms(fused) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.module.state_dict().items())
    n_held = sum(tensor.numel() for body in fused.bodies for tensor in body.parameters())
    assert n_held < 1.2 * sum(tensor.numel() for tensor in net[:5].parameters()), "no weight is held twice"


def test_a_convolution_with_a_bias_that_is_no_parameter_stays_as_it_is():
    class Shifted(PaddedConv):
        def forward(self, x):
            return F.conv2d(self.pad(x), self.weight, bias=self.shift)

    torch.manual_seed(0)
    conv = Shifted(3, 8, 2, bias=False)
    conv.register_buffer("shift", torch.randn(8))
    net = nn.Sequential(conv, nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    whole = make_branch(target := small("Residual"), Network(net), (0, 0))
    assert n_norms(assert_fused(plan_of(target, [whole]), hazards.images(3))) == 1


def convolutions(fused) -> int:
    return n_called(fused, torch.conv2d) + sum(isinstance(part, nn.Conv2d) for part in fused.modules())


@pytest.mark.parametrize(
    ("settings", "folded"),
    [({}, True), ({"stride": 2}, True), ({"padding": 1}, False), ({"kernel": 3, "padding": 1}, False)],
)
def test_adapters_are_folded_where_that_is_exact(settings, folded):
    target, source = small("Residual"), Network(hazards.build(lambda: Bottleneck(**settings)))
    into = next(cut.index for cut in source.cuts if cut.name == "first")
    plan = plan_of(target, [make_branch(target, source, (1, into))])
    assert (convolutions(assert_fused(plan, hazards.images(3))) == 0) == folded
    rectified = plan_of(target, [make_branch(target, source, (1, into), rectify=True)])
    assert convolutions(assert_fused(rectified, hazards.images(3))) == 1


def test_a_linear_layer_behind_a_vector_is_folded():
    target, source = small("Residual"), small("HiddenLayerHead")
    flat = next(cut.index for cut in source.cuts if cut.kind == "vector")
    plan = plan_of(target, [make_branch(target, source, (len(target.cuts) - 1, flat))])
    assert_fused(plan, hazards.images(3))


def test_adapters_of_one_geometry_are_one_convolution():
    target, source = small("Residual"), small("Plain")
    settings = [((1, 2), False), ((1, 2), True), ((1, 3), True), ((0, 2), False)]
    branches = [make_branch(target, source, places, rectify, seed=n) for n, (places, rectify) in enumerate(settings)]
    fused = assert_fused(plan_of(target, branches), hazards.images(3))
    assert [stem.places for stem in fused.stems] == [(0, 1, 2), (3,)]


def test_convolutions_work_channels_last_where_they_can():
    target = small("Residual")
    parts = [folded_part(0, make_branch(target, small("Plain"), (0, into)).stitched) for into in (0, 3)]
    bottleneck = Network(hazards.build(Bottleneck))
    into = next(cut.index for cut in bottleneck.cuts if cut.name == "first")
    parts.append(folded_part(0, make_branch(target, bottleneck, (1, into)).stitched))
    assert [part.channels_last for part in parts] == [True, True, False], "the last one has no convolution left"
    overwritten = [folded_part(0, make_branch(target, small("WrittenThroughView"), (0, 0)).stitched)]
    assert not overwritten[0].channels_last, "views of a map need the usual layout"


def thinned(branch, n_kept):
    """The branch with `n_kept` of every five channels in each space."""
    body = branch.stitched.body
    spaces = channel_spaces(body)
    masks = ChannelMasks({space.name: torch.arange(space.size) % 5 < n_kept for space in spaces.spaces})
    branch.stitched.body = compact(body, spaces, masks)
    return branch


@pytest.mark.parametrize(
    ("cut", "n_kept", "n_left"), [("stem_2", 2, 0), ("stage2_0_add", 2, 2), ("stage2_0_add", 3, 0)]
)
def test_zeros_for_removed_channels_come_from_the_convolution_where_that_costs_nothing(cut, n_kept, n_left):
    target, source = small("Residual"), reference("zoo:resnet20")
    into = next(one.index for one in source.cuts if one.name == cut)
    branch = thinned(make_branch(target, source, (0, into)), n_kept)
    fused = assert_fused(plan_of(target, [branch]), hazards.images(3))
    assert n_filled(branch.stitched.body) >= 2
    # 2/5 of 32 channels are 13, which fit one register instead of two; 3/5 are 19.
    assert n_filled(fused.bodies[0]) == n_left


def n_filled(body) -> int:
    return sum(node.target is filled for node in body.graph.nodes)


@pytest.mark.parametrize("n_images", [1, 2])
def test_maps_of_several_images_lie_channels_last_in_the_clones(n_images):
    target, source = small("Residual"), small("Plain")
    fused = assert_fused(plan_of(target, [make_branch(target, source, (1, 2))]), hazards.images(n_images))
    given = []
    fused.bodies[0].register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    with torch.no_grad():
        fused(hazards.images(n_images))
    assert given[0].is_contiguous() == (n_images == 1)


def rivals(n_rows, source):
    values = torch.randn(n_rows, source.features.n_channels + 1, generator=torch.Generator().manual_seed(n_rows))
    return tuple(map(tuple, values.tolist()))


def test_heads_of_every_kind_calibrated_or_not_and_the_base_priority():
    target, source = small("Residual"), small("Plain")
    branches = [
        make_branch(target, source, (0, 3), head=head, n_new=n_new, scalars=scalars, seed=n_new)
        for head in ("stacked", "discriminant", "source")
        for n_new in (1, 3)
        for scalars in (Scalars(), Scalars(0.7, (0.5,) * n_new), Scalars(0.7, None, rivals(n_new + 2, source)))
    ]
    fused = assert_fused(plan_of(target, branches, base_priority=1.5), hazards.images(4))
    assert len(fused.heads) == 2, "one batch for each number of classes"


# ------------------------------------------------------------------------------------------------ of a composite
@pytest.fixture
def net(stage):
    return pnc.attach(copy.deepcopy(stage.target), *stage.clones)


def test_the_composite_does_not_change_and_the_fused_form_keeps_its_clones(stage, net):
    before = pnc.snapshot(net.target)
    with torch.no_grad():
        expected = net(stage.images)
        fused = net.fused()
        assert fused.classes == net.classes
        found = fused(stage.images)
        assert torch.equal(found[:, :3], stage.base)
        # Rounding of folded weights; features of untrained networks hardly vary, so heads have large weights.
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-4)
        net.detach("dog")
        net.rescale({"gnu": Scalars(0.5)})
        assert torch.equal(fused(stage.images), found)
        net.attach(stage.clones[0])
        net.rescale({"gnu": Scalars()})
        with net.only("dog"):
            one = net.fused()
        assert one.classes == (*net.base_classes, "dog")
        assert torch.allclose(one(stage.images)[:, 3:], stage.alone[0], rtol=1e-5, atol=1e-5)  # rounding
        with net.disabled():
            assert torch.equal(net.fused()(stage.images), stage.base)
    assert pnc.verify(net.target, before).ok
    assert net.clones[-1] == "dog"
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    fused.train()
    assert not any(module.training for module in fused.modules() if module is not fused)


def test_it_has_tensors_of_its_own_and_is_not_moved(stage, net):
    fused = net.fused()
    with torch.no_grad():
        expected = fused(stage.images)
        for tensor in [*net.branches.parameters(), *net.branches.buffers()]:
            tensor.data.zero_()
        assert torch.equal(fused(stage.images), expected)
        assert torch.equal(copy.deepcopy(fused)(stage.images), expected)
    with pytest.raises(InputError, match=r"move or cast the composite itself, then call fused\(\) again"):
        fused.double()


def test_double_and_half_precision(stage, net):
    x = stage.images.double()
    net.double()
    with torch.no_grad():
        assert torch.allclose(net.fused()(x), net(x), rtol=1e-6, atol=1e-6)  # heads compute in float64 in both forms
    net.to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(net.fused()(x.bfloat16())[:, :3], net.target(x.bfloat16()))


def test_compiled_and_exported(stage, net):
    fused = net.fused()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = fused(stage.images)
        assert torch.equal(torch.compile(fused, backend="eager", fullgraph=True)(stage.images), expected)
        dims = ({0: torch.export.Dim("batch", min=2)},)
        program = torch.export.export(fused, (stage.images,), dynamic_shapes=dims).module()
        # Exported programs may multiply batches of matrices in another order.
        assert torch.allclose(program(stage.images), expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_a_wrong_rule_would_be_noticed(stage, net, monkeypatch):
    monkeypatch.setattr(fused_composite, "from_grid", lambda grid, prefix, cut: grid + 0.1)
    with pytest.raises(PNCError, match="the fused form differs from the composite by"):
        net.fused()


def test_clones_made_by_hand_can_be_attached():
    target, source = small("Residual"), small("Plain")
    net = pnc.attach(target.module, make_clone(target, source, "x"))
    assert net(hazards.images(2)).shape == (2, 7)
