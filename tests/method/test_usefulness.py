"""Useless clones are made, but with a warning."""

import copy
import warnings

import pytest
import torch
from torch import nn

import pnc
from digits import BASE, NEW, pair, support
from pnc.foundation.errors import InputError, PNCWarning
from pnc.method.usefulness import usefulness


class Constant(nn.Module):
    """A network whose logits hardly depend on the image."""

    def __init__(self, network, share):
        super().__init__()
        self.network, self.share = network, share

    def forward(self, images):
        return 2.0 + self.share * self.network(images)


def task_of(source, target, n_new=20, n_base=5, **changes):
    nets = pair()
    data = changes.pop("support", support(n_new, n_base))
    names = {**nets.names(), **changes}
    return pnc.prepare_task(source, target, data, classes=None, **names)


def doubts_of(task):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = usefulness(task)
        assert usefulness(task) is found
    assert [str(one.message) for one in said if one.category is PNCWarning] == (
        ["; ".join(found.doubts)] if found.doubts else []
    ), "once"
    return found


@pytest.mark.parametrize(("n_new", "n_base"), [(20, 5), (1, 1), (2, 0), (5, 5)])
def test_networks_that_know_their_classes_are_not_doubted(n_new, n_base):
    nets = pair()
    found = doubts_of(task_of(nets.source.module, nets.target.module, n_new, n_base))
    assert found.doubts == () and found.source_score is not None and found.source_score > 0.9


def reinitialised(network):
    fresh = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)
    for parameter in fresh.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    return fresh


@pytest.mark.parametrize("n_new", [20, 5])
def test_a_source_that_is_right_by_chance_is_doubted_with_the_figures(n_new):
    nets = pair()
    order = [*NEW[1:], NEW[0]]
    for source, changes in (
        (nets.source.module, {"source_classes": order}),  # wrong order of names
        (reinitialised(nets.source.module), {}),  # random weights
        (nn.Sequential(Flipped(), nets.source.module), {}),  # images that it was not made for
    ):
        found = doubts_of(task_of(source, nets.target.module, n_new, **changes))
        assert len(found.doubts) >= 1, changes
        n_samples, chance = 5 * n_new, "chance is 20%: order of source_classes? preprocessing? weights?"
        assert found.doubts[0].startswith(f"the source is right on {found.source_score:.0%} of your {n_samples} new")
        assert found.doubts[0].endswith(chance)


class Flipped(nn.Module):
    """Inverts images and makes them a hundred times as bright."""

    def forward(self, images):
        return 50 * (1 - images) - 25


def test_swapped_networks_are_noticed():
    nets = pair()
    found = doubts_of(task_of(nets.target.module, nets.source.module, n_base=20))
    assert found.doubts[-1] == "are source and target swapped?"
    assert any(one.startswith("the target is right on ") and "of your 100 base samples" in one for one in found.doubts)


def test_a_source_with_equal_logits_for_all_images_is_doubted():
    nets = pair()
    found = doubts_of(task_of(Constant(nets.source.module, 1e-6), nets.target.module))
    assert any("the source's logits of 5, 6, 7" in one and "hardly vary over your 100" in one for one in found.doubts)
    assert doubts_of(task_of(Constant(nets.source.module, 1.0), nets.target.module)).doubts == ()


def test_one_class_alone_is_judged_among_all_of_the_source():
    nets = pair()
    names = {"source_classes": nets.source.classes, "base_classes": nets.target.classes}
    data = support(20, 5, ("7",))
    task = pnc.prepare_task(nets.source.module, nets.target.module, data, classes=["7"], **names)
    found = doubts_of(task)
    assert found.doubts == () and found.source_score > 0.8
    names["source_classes"] = ("7", "5", "6", "8", "9")
    task = pnc.prepare_task(nets.source.module, nets.target.module, data, classes=["7"], **names)
    assert "right on 0% of your 20 new samples; chance is 20%" in doubts_of(task).doubts[0]


def test_clone_warns_once_and_its_report_says_it_too():
    nets = pair()
    names = {**nets.names(), "source_classes": [*NEW[1:], NEW[0]]}
    with pytest.warns(PNCWarning, match=r"the source is right on \d+% of your 100 new samples") as said:
        made = pnc.clone(nets.source.module, nets.target.module, support(), **names)
    assert len(said) == 1 and said[0].filename == __file__
    assert made.recipe["doubts"] == [str(said[0].message)]
    assert "doubts" in str(made) and "right on" in str(made)


def test_the_held_out_score_is_split_and_described():
    nets = pair()
    made = pnc.clone(nets.source.module, nets.target.module, support(20, 5), **nets.names())
    held_out = made.held_out
    assert held_out.score == pytest.approx((held_out.base + held_out.new) / 2)
    assert 0 <= held_out.base_drop <= 1 - held_out.base + 1e-9 and held_out.n_base == 25 and held_out.is_held_out
    assert f"base {held_out.base:.3f}, new {held_out.new:.3f}; base drop" in str(held_out)
    alone = pnc.clone(nets.source.module, nets.target.module, support(20, 0), **nets.names()).held_out
    assert (alone.base, alone.base_drop, alone.n_base) == (None, None, 0)
    assert str(alone).endswith("among the new classes only, without base images")
    single = pnc.clone(nets.source.module, nets.target.module, support(1, 1), **nets.names()).held_out
    assert not single.is_held_out and single.base_drop is None
    assert "on the images that it was fitted on" in str(single)


def test_every_public_value_prints_on_one_screen():
    nets = pair()
    task = task_of(nets.source.module, nets.target.module)
    found = pnc.scan(task)
    made = pnc.fit(task, found.adapter(found.choose()))
    net = pnc.attach(nets.target.module, made)
    data = pnc.load_data("digits")
    before = pnc.snapshot(nets.target.module)
    values = [found, found.positions[0], task, made, net, net.status()[0], pnc.verify(nets.target.module, before)]
    values += [net.verify(), pnc.calibrate(net, support()), nets.source, support(), data, net.fused()]
    for value in values:
        for text in (str(value), repr(value)):
            assert len(text.splitlines()) <= 25, type(value)
            assert len(text) <= 2500, (type(value), len(text))
            assert type(value).__name__ in text or text != repr(value), type(value)
    assert repr(made).startswith("Clone('5+6+7+8+9': 5, 6, 7, 8, 9; ")
    assert "held-out score" in str(made) and "added MACs" in str(made)
    assert repr(task) == (
        "CloneTask(5, 6, 7, 8, 9 of 5 source classes, for a target of 5; support of 100 new and 25 base images)"
    )
    assert BASE[0] in repr(net)


def test_a_single_image_is_refused_where_channels_are_chosen():
    nets = pair()
    data = support(1, 0, NEW[:1])
    names = {**nets.names(), "classes": NEW[:1]}
    for settings in ({}, {"density": 0.5, "tune": "none"}, {"strategy": "sequential"}):
        with pytest.raises(
            InputError, match="support: it has one image in all, and choosing channels needs at least two"
        ):
            pnc.clone(nets.source.module, nets.target.module, data, **settings, **names)
    assert pnc.clone(nets.source.module, nets.target.module, data, density=1.0, **names).classes == NEW[:1]
