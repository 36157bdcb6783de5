"""Networks that return several tensors: one clear choice, or an error that says how to choose."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import pnc
import small_pair
from pnc.foundation.errors import InputError, MismatchError, RecordingError
from pnc.foundation.fingerprints import fingerprint


class Exits(small_pair.Net):
    def __init__(self, n_classes):
        super().__init__(n_classes)
        self.early = nn.Linear(6, n_classes)

    def forward(self, x):
        early = self.early(self.act1(self.norm1(self.conv1(x))).mean((2, 3)))
        return self.shaped(early, super().forward(x))

    def shaped(self, early, late):
        return [early, late]


class WithFeatures(small_pair.Net):
    def forward(self, x):
        features = self.features(x)
        return features, self.fc(features)


class Named(Exits):
    def shaped(self, early, late):
        return {"early": early, "late": late}


@dataclass
class Answer:
    early: torch.Tensor
    late: torch.Tensor


class Object(Exits):
    def shaped(self, early, late):
        return Answer(early, late)


class Nested(Exits):
    def shaped(self, early, late):
        return {"all": (early, late)}


class Pooled(small_pair.Net):
    """A network with only one tensor that could be logits."""

    def forward(self, x):
        maps = self.act1(self.norm1(self.conv1(x)))
        return {"maps": maps, "scores": super().forward(x)}


def made(kind, n_classes):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return kind(n_classes).eval()


def cloned(source, target):
    support = small_pair.support(small_pair.BASE + small_pair.NEW)
    return pnc.clone(source, target, support, source_classes=small_pair.NEW, base_classes=small_pair.BASE)


CASES = [
    (Exits, 1, "0: .*1: .*Output.network, output=0"),
    (Exits, -1, "0: "),
    (WithFeatures, 1, r"0: \(2, 6\), 1: \(2, 3\)"),
    (Named, "late", "'early': .*'late': .*output='early'"),
    (Object, "late", "'early': "),
    (Nested, ("all", 1), r"\('all', 0\): .*\('all', 1\): "),
]


@pytest.mark.parametrize(("kind", "output", "words"), CASES)
def test_several_possible_logits_are_refused_until_one_is_chosen(kind, output, words, tmp_path):
    target, images = made(kind, 3), small_pair.images(5)
    with pytest.raises(RecordingError, match=rf"target .* several tensors that could be the logits .*{words}"):
        cloned(small_pair.source(), target)
    chosen = pnc.Output(target, output=output)
    assert fingerprint(chosen) == fingerprint(target)
    pnc.save(cloned(small_pair.source(), chosen), tmp_path / "f")
    clone = pnc.load(tmp_path / "f", source=small_pair.source())
    net = pnc.attach(chosen, clone)
    with torch.no_grad():
        assert torch.equal(net(images)[:, :3], chosen(images))
    assert net.verify().ok
    with pytest.raises(RecordingError, match="several tensors"):
        pnc.attach(target, clone)


def test_another_output_of_the_target_or_the_source_is_noticed(tmp_path):
    target, source = made(Exits, 3), made(Exits, 2)
    pnc.save(cloned(pnc.Output(source, -1), pnc.Output(target, -1)), tmp_path / "f")
    with pytest.raises(MismatchError, match="another source, with the same weights"):
        pnc.load(tmp_path / "f", source=pnc.Output(source, 0))
    clone = pnc.load(tmp_path / "f", source=pnc.Output(source, 1))
    with pytest.raises(MismatchError, match="another target, with the same weights|which this target does not have"):
        pnc.attach(pnc.Output(target, 0), clone)
    pnc.attach(pnc.Output(target, 1), clone)


def test_the_only_tensor_that_can_be_logits_is_taken():
    target, images = made(Pooled, 3), small_pair.images(5)
    net = pnc.attach(target, cloned(small_pair.source(), target))
    with torch.no_grad():
        assert torch.equal(net(images)[:, :3], target(images)["scores"])


class WithLogits(small_pair.Net):
    """Returns what classifiers of transformers return: an object with `logits`."""

    def forward(self, x):
        from types import SimpleNamespace

        return SimpleNamespace(logits=super().forward(x))


@pytest.mark.parametrize("kind", [WithLogits, Pooled])
def test_a_composite_is_measured_whatever_the_target_returns(kind):
    target, classes = made(kind, 3), small_pair.BASE + small_pair.NEW
    net = pnc.attach(target, cloned(small_pair.source(), target))
    report = pnc.evaluate(net, small_pair.support(classes))
    assert report.base_logits_equal and report.n_images


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_of_a_chosen_output_may_be_saved_with_or_without_it(wrapped, tmp_path):
    network = made(small_pair.Net, 3)
    (tmp_path / "nets.py").write_text(
        "import pnc, small_pair\n"
        "class Net(small_pair.Net):\n"
        "    def forward(self, x): return super().forward(x), x\n"
        "def f(): return pnc.Output(Net(3), 0)\n"
    )
    chosen = pnc.Output(network, 0) if wrapped else network
    torch.save(chosen.state_dict(), tmp_path / "weights.pth")
    spec = f"py:{tmp_path / 'nets.py'}:f"
    found = pnc.load_model(spec, tmp_path / "weights.pth", classes=small_pair.BASE, input_shape=(1, 8, 8))
    images = small_pair.images(3)
    with torch.no_grad():
        assert torch.equal(found.module(images), network(images))


@pytest.mark.parametrize("output", [None, 1.0, True, (), ("a", None)])
def test_what_is_no_index_or_key_is_refused(output):
    with pytest.raises(InputError, match="output: expected an index, a key, or a tuple of these"):
        pnc.Output(small_pair.target(), output)


@pytest.mark.parametrize(
    ("kind", "output", "there"),
    [
        (Exits, 2, "a list of 2"),
        (Exits, "late", "a list of 2"),
        (Named, "last", "the keys 'early', 'late'"),
        (Object, "x", "a Answer"),
    ],
)
def test_an_output_that_is_not_there_is_named(kind, output, there):
    with pytest.raises(InputError, match=f"output: the network returns {there}, without a part"):
        pnc.Output(made(kind, 3), output)(small_pair.images(2))
