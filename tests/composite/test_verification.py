import copy
import re

import pytest
import torch
from torch import nn

import pnc
from digits import NEW, held_out_images, network, pair, support
from pnc.composite.verification import Report, verify_composite
from pnc.foundation.errors import InputError, MismatchError

MADE = []


def clone() -> pnc.Clone:
    if not MADE:
        nets = pair()
        MADE.append(pnc.clone(nets.source.module, nets.target.module, support(), effort="seconds", **nets.names()))
    return MADE[0]


def images(n: int = 8) -> torch.Tensor:
    return held_out_images().images[:n]


def target() -> nn.Module:
    return copy.deepcopy(pair().target.module)


def test_verify_shows_that_attach_and_detach_do_not_change_the_target():
    model = target()
    model.train()
    model[1].register_forward_hook(lambda *_: None)
    before = pnc.snapshot(model, images())
    net = pnc.attach(model, clone())
    net(images())
    net.detach(clone().name)
    report = pnc.verify(model, before)
    assert report.ok
    assert report.compared["parameters and buffers"] == len([*model.parameters(), *model.buffers()])
    assert report.compared["submodules with their flags"] == len(list(model.modules()))
    assert report.compared["hooks"] == 1
    assert report.compared["logits"] == 8 * 5
    assert str(report).startswith("all equal, bit for bit: ") and "40 logits" in str(report)
    assert model.training, "flags come back after the probe"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: next(m.buffers()).view(-1)[0].add_(1), "values of normalize.mean changed"),
        (lambda m: m.classifier.requires_grad_(False), "requires_grad of classifier.bias changed"),
        (lambda m: m.classifier.register_forward_pre_hook(lambda *_: None), "hooks of submodule classifier changed"),
        (lambda m: m.flatten.train(), "training flag of submodule flatten changed"),
    ],
)
def test_what_changed_is_named(change, words):
    model = target()
    before = pnc.snapshot(model, images())
    change(model)
    report = pnc.verify(model, before)
    assert not report.ok
    assert any(re.search(words, line) for line in report.differences)
    assert re.match(r"\d+ differences?; compared: ", str(report)) and words in str(report)


def test_logits_may_change_where_no_tensor_does():
    model = target()
    before = pnc.snapshot(model, images())
    model.forward = lambda x: nn.Sequential.forward(model, x) + 1
    assert pnc.verify(model, before).differences == ("logits of the probe batch changed",)
    without = pnc.snapshot(target())
    assert "logits" not in pnc.verify(target(), without).compared, "what was not compared is not claimed"


def test_the_random_state_is_left_alone():
    state = torch.get_rng_state()
    model = target()
    pnc.verify(model, pnc.snapshot(model, images()))
    pnc.attach(model, clone()).verify()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_snapshot_is_needed():
    with pytest.raises(InputError, match="before: expected the result of pnc.snapshot.*, got OrderedDict"):
        pnc.verify(target(), target().state_dict())


@pytest.mark.parametrize("images", [torch.rand(1, 8, 8), [1, 2]])
def test_images_are_a_batch(stage, images):
    net = pnc.attach(stage.target, stage.clones[0])
    with pytest.raises(InputError, match="images: expected a tensor .N, C, H, W."):
        net.verify(images=images)
    with pytest.raises(InputError, match="images: expected a tensor .N, C, H, W."):
        pnc.verify(stage.target, pnc.snapshot(stage.target), images=images)


def test_a_composite_proves_its_base_logits_and_its_target():
    model = target()
    before = pnc.snapshot(model)
    net = pnc.attach(model, clone())
    report = net.verify(before)
    assert report.ok
    assert report.compared["base logits"] == (1 + 3 + 4) * 5
    assert report.compared["fingerprints"] == 1
    assert report.compared["parameters and buffers"] > 0
    assert "gradients" not in net.verify().compared
    with torch.no_grad():
        model.classifier.bias[0] += 1
    found = net.verify(before).differences
    assert found[0] == f"clone {clone().name!r} was made for another target: the values of 'classifier.bias' differ"
    assert "values of classifier.bias changed" in found
    assert not any("base logits" in line for line in found), "the composite follows its target"


def test_base_logits_that_are_not_the_targets_are_found():
    class Off(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([target()(x) * (1 + 1e-7 * (len(x) == 3)), torch.zeros(len(x), 2)], 1)

    report = verify_composite(Off(), target(), None, [clone()], images(3))
    assert report.differences == (
        "base logits differ from the target's own on 3 images",
        "base logits differ from the target's own on 3 of the given images",
    )
    assert isinstance(report, Report)


def test_allow_mismatch_attaches_to_a_fine_tuned_target_and_verify_says_so():
    model = target()
    with torch.no_grad():
        model.classifier.bias.add_(0.125)
    with pytest.raises(MismatchError, match="values of 'classifier.bias' differ; .* allow_mismatch=True"):
        pnc.attach(model, clone())
    net = pnc.attach(model, clone(), allow_mismatch=True)
    with torch.no_grad():
        assert torch.equal(net(images())[:, :5], model(images()))
    assert [line for line in net.verify().differences if "another target" in line]


def test_allow_mismatch_still_needs_shapes_and_classes_that_fit():
    narrow = network(("0", "1", "2", "3", "4"), "zoo:cnn?width=0.5").module
    with pytest.raises(MismatchError, match=r"reads '.*' with shape \(.*\), which this target does not have"):
        pnc.attach(narrow, clone(), allow_mismatch=True)
    fewer = target()
    fewer.classifier = nn.Linear(fewer.classifier.in_features, 4)
    with pytest.raises(MismatchError, match="made for 5 base classes, this target has 4"):
        pnc.attach(fewer, clone(), allow_mismatch=True)
    assert clone().classes == NEW
