"""A composite whose target has changed refuses calls, says what changed, and is recorded again on request."""

import copy
import os
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import pnc
import small_pair
from pnc.composite import composite as composite_file
from pnc.foundation.errors import InputError, MismatchError

HOOKS = []


def doubled(module, inputs, output):
    return output * 2


def assigned(t):
    t.load_state_dict({k: v.clone() for k, v in small_pair.network(3, 7).state_dict().items()}, assign=True)


def transposed(t):
    t.conv2.weight.data = t.conv2.weight.data.transpose(0, 1)


class Shifted(small_pair.Net):
    def forward(self, x):
        return super().forward(x) + 1


CHANGES = {
    "another class": (lambda t: setattr(t, "__class__", Shifted), "a Net has become a Shifted"),
    "transposed memory": (transposed, "conv2.weight has new memory"),
    "load_state_dict(assign=True)": (assigned, "conv1.weight was replaced"),
    "another parameter": (lambda t: setattr(t.fc, "weight", nn.Parameter(torch.zeros(3, 6))), "fc.weight was replaced"),
    "another buffer": (lambda t: setattr(t.norm2, "running_mean", torch.ones(6)), "norm2.running_mean was replaced"),
    "x.data = y": (lambda t: setattr(t.fc.weight, "data", torch.zeros(3, 6)), "fc.weight has new memory"),
    "half": (lambda t: t.half(), "norm1.running_mean was replaced"),
    "another epsilon": (lambda t: setattr(t.norm1, "eps", 1.0), "norm1.eps is 1.0, was 1e-05"),
    "another activation": (lambda t: setattr(t, "act1", nn.GELU()), "the network has other layers"),
    "a layer in a container": (lambda t: t.body.append(nn.Tanh()), "body has other layers"),
    "forward hook": (lambda t: t.conv2.register_forward_hook(doubled), "a hook or a layer was added"),
    "hook of a container": (lambda t: t.body.register_forward_hook(doubled), "a hook or a layer was added"),
    "pruning": (lambda t: prune.l1_unstructured(t.fc, "weight", 0.5), "fc.weight was replaced"),
    "parametrization": (lambda t: parametrizations.weight_norm(t.fc), "fc.weight was replaced"),
    "another forward": (lambda t: setattr(t.act2, "forward", torch.tanh), "a forward replaced"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_target_is_refused_by_calls_attach_and_verify(name):
    change, words = CHANGES[name]
    target, images = small_pair.target(), small_pair.images(5)
    net = pnc.attach(target, small_pair.clone("dog"))
    fused, base = net.fused(), target(images)
    assert torch.equal(net(images)[:, :3], base)
    change(target)
    for call in (lambda: net(images), lambda: fused(images), lambda: net.attach(small_pair.clone("elk"))):
        with pytest.raises(
            MismatchError, match=rf"has changed since .*{words}.*; call net.refresh\(\) to record it again"
        ):
            call()
    report = net.verify()
    assert not report.ok
    assert any(words in line for line in report.differences)
    with pytest.raises(MismatchError, match="made for another target"):
        net.refresh()
    with pytest.raises(MismatchError, match="has changed since"):
        net(images)


def test_what_is_written_in_place_is_followed():
    target, images = small_pair.target(), small_pair.images(5)
    net = pnc.attach(target, small_pair.clone("dog"))
    target.train()
    with torch.no_grad():
        target.fc.weight.mul_(2)
        target(images)
    target.eval()
    target.load_state_dict({name: value + 1 for name, value in target.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(net(images)[:, :3], target(images))


def test_a_target_that_still_does_the_same_is_recorded_again():
    target, images, seen = small_pair.target(), small_pair.images(5), []
    net = pnc.attach(target, small_pair.clone("dog"))
    before = net(images)
    target.conv2.register_forward_hook(lambda module, inputs, output: seen.append("layer"))
    target.body.register_forward_hook(lambda module, inputs, output: seen.append("container"))
    net.refresh()
    seen.clear()
    assert torch.equal(net(images), before)
    assert seen == ["layer"]  # a container's hook runs only while recording
    report = net.verify()
    assert report.ok
    assert "hooks of body ran when the target was recorded" in report.notes[0] and "note: hooks" in str(report)


def test_another_target_is_accepted_on_request():
    target, images = small_pair.target(), small_pair.images(5)
    net = pnc.attach(target, small_pair.clone("dog"))
    target.act1 = nn.GELU()
    net.refresh(allow_mismatch=True)
    with torch.no_grad():
        assert torch.equal(net(images)[:, :3], target(images))
    assert not net.verify().ok


def test_copies_and_moves_watch_their_own_target():
    net, images = pnc.attach(small_pair.target(), small_pair.clone("dog")), small_pair.images(5)
    before, fused = net(images), net.fused()
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), copy.deepcopy(net).to("cpu")]  # noqa: S301 - our own
    net.target.act1 = nn.GELU()
    for one in copies:
        assert torch.equal(one(images), before)
    assert torch.allclose(copy.deepcopy(fused)(images), before, atol=1e-5)


def test_quantizing_the_layers_of_a_composite_is_refused():
    net = copy.deepcopy(pnc.attach(small_pair.target(), small_pair.clone("dog")))
    net.target.fc = nn.Linear(6, 3)
    with pytest.raises(MismatchError, match="the network has other layers|fc"):
        net(small_pair.images(2))


def test_swapped_values_are_seen_by_attach_of_a_composite():
    target = small_pair.target()
    net = pnc.attach(target, small_pair.clone("dog"))
    values = target.fc.weight.detach().numpy()
    values[[0, 1]] = values[[1, 0]].copy()
    with pytest.raises(MismatchError, match="values of 'fc.weight' differ"):
        net.attach(small_pair.clone("elk"))


class Gated(small_pair.Net):
    """Its Python code depends on a class attribute, which no recording sees."""

    shift = 0.0

    def forward(self, x):
        return super().forward(x) + Gated.shift


def test_verify_takes_images_and_runs_the_targets_own_forward(monkeypatch):
    net, images = pnc.attach(small_pair.target(), small_pair.clone("dog")), small_pair.images(130)
    assert net.verify(images=images).compared["base logits"] == (1 + 3 + 4 + 130) * 3
    target = small_pair.like(small_pair.target(), Gated)
    before = pnc.snapshot(target, images)
    assert pnc.verify(target, before, images=images).compared["logits of the recording"] == 130 * 3
    net = pnc.attach(target, small_pair.clone("dog"), allow_mismatch=True)
    monkeypatch.setattr(Gated, "shift", 1.0)
    assert "base logits differ from the target's own on 64 of the given images" in net.verify(images=images).differences
    assert "logits of the probe batch changed" in pnc.verify(target, before).differences


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_the_child_of_a_fork_can_change_a_composite():
    net, held, done = pnc.attach(small_pair.target(), small_pair.clone("dog")), threading.Event(), threading.Event()

    def hold():
        with composite_file._LOCK:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        threading.Timer(20, os._exit, (1,)).start()
        net.base_priority = 1.0
        os._exit(0)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_unpickling_leaves_the_modules_of_other_threads_alone():
    data, net = pickle.dumps(small_pair.clone("dog")), pnc.attach(small_pair.target(), small_pair.clone("dog"))
    other, errors, ended = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 2)), [], threading.Event()

    def call(module):
        while not ended.is_set():
            try:
                module(small_pair.images(2))
            except NameError as error:
                errors.append(error)

    threads = [threading.Thread(target=call, args=(module,)) for module in (other, net)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        pickle.loads(data)  # noqa: S301 - our own bytes
        copy.deepcopy(net)
    ended.set()
    for thread in threads:
        thread.join()
    assert not errors


class Slow(torch.utils.data.Dataset):
    """A support that changes the composite while it is read."""

    def __init__(self, change):
        self.images, self.labels = small_pair.support((*small_pair.BASE, "dog"))
        self.change = change

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        if i == 0:
            self.change()
        return self.images[i], self.labels[i]


def exchanged(net):
    net.detach("dog")
    net.attach(small_pair.clone("elk"))


CHANGED_MEANWHILE = [exchanged, lambda net: net.detach("dog"), lambda net: net.rescale({"dog": pnc.Scalars(2.0)})]


@pytest.mark.parametrize("change", CHANGED_MEANWHILE)
def test_calibration_is_for_one_set_of_clones(change):
    net = pnc.attach(small_pair.target(), small_pair.clone("dog"))
    with pytest.raises(InputError, match="clone 'dog' was detached, replaced or rescaled meanwhile; calibrate again"):
        pnc.calibrate(net, Slow(lambda: change(net)))


def test_calibration_allows_attaching_a_clone_meanwhile():
    net = pnc.attach(small_pair.target(), small_pair.clone("dog"))
    found = pnc.calibrate(net, Slow(lambda: "elk" in net.clones or net.attach(small_pair.clone("elk"))))
    assert list(found.scalars) == ["dog"] and net.clones == ("dog", "elk")
