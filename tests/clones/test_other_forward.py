"""Networks with the right weights but another forward pass are refused, as source and as target, with the reason."""

import copy

import pytest
import torch
from torch import nn

import pnc
import small_pair
from pnc.composite.clone_checks import check_forward
from pnc.composite.file_proof import prove
from pnc.foundation.errors import MismatchError
from pnc.graph.forward_prints import forward_difference, forward_print, pattern_images
from pnc.graph.recording import record

WORDS = {
    "GELU": "operation 4 is GELU where ReLU was",
    "eps": "operation 3 is BatchNorm2d with other settings or inputs",
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "dog.safetensors"
    pnc.save(small_pair.clone("dog"), path)
    return path


@pytest.mark.parametrize("name", small_pair.OTHERS)
def test_another_target_is_refused(name, file):
    other = small_pair.like(small_pair.target(), small_pair.OTHERS[name])
    clone = pnc.load(file, source=small_pair.source())
    with pytest.raises(MismatchError, match=f"another forward pass: .*{WORDS.get(name, '')}.*differ by"):
        pnc.attach(other, clone)
    net = pnc.attach(other, clone, allow_mismatch=True)
    assert any("answers to a test pattern differ by" in line for line in net.verify().differences)


@pytest.mark.parametrize("name", small_pair.OTHERS)
def test_another_source_is_refused(name, file, tmp_path):
    other = small_pair.like(small_pair.source(), small_pair.OTHERS[name])
    with pytest.raises(MismatchError, match=f"made from another source, .*{WORDS.get(name, '')}.*differ by"):
        pnc.load(file, source=other)
    pnc.load(file, source=other, allow_mismatch=True)
    pnc.save(small_pair.clone("dog"), tmp_path / "full", "full")
    with pytest.raises(MismatchError, match="made from another source, .* the graph differs"):
        pnc.load(tmp_path / "full", source=other)


def test_the_same_function_written_in_another_way_is_accepted_with_a_warning(file):
    source, target = (small_pair.like(one, small_pair.Rewritten) for one in (small_pair.source(), small_pair.target()))
    clone = small_pair.clone("dog")
    for network, expected in ((source, clone.source_forward), (target, clone.target_forward)):
        difference = forward_difference(forward_print(network, record(network, small_pair.images(2))), expected)
        assert difference.text == "the graph differs: operation 4 is clamp where ReLU was" and not difference.is_other
    with pytest.warns(UserWarning, match="4 is clamp where ReLU was, .* its answers to a test pattern are the same"):
        check_forward(forward_print(target, record(target, small_pair.images(2))), [clone])


def test_wrappers_threads_and_layouts_change_nothing(file):
    target = small_pair.target()
    expected = small_pair.clone("dog").target_forward
    for one in (nn.DataParallel(target), target.to(memory_format=torch.channels_last), copy.deepcopy(target)):
        found = forward_print(one, record(one, small_pair.images(3, seed=4)))
        assert found.digest == expected.digest and forward_difference(found, expected) is None
    assert len(expected.operations) == 13 and len(expected.answers) == 9


def test_many_classes_are_summed_and_the_pattern_is_the_same_everywhere():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = small_pair.Net(1000).eval()
    assert len(forward_print(net, record(net, small_pair.images(2))).answers) == 48
    pattern = pattern_images((2, 4, 4))
    assert pattern.shape == (3, 2, 4, 4) and pattern.min() >= 0 and pattern.max() <= 1
    assert (pattern * 65536).long()[0, 0, 0].tolist() == [53006, 16558, 48259, 18238]


def test_proving_a_file_names_another_forward_pass(file):
    checks = prove(file, small_pair.like(small_pair.target(), small_pair.OTHERS["GELU"]), small_pair.source())
    assert [check.what for check in checks] == ["file", "target", "source", "forward pass"]
    assert not checks[-1].ok and "operation 4 is GELU where ReLU was" in checks[-1].found
    assert all(check.ok for check in prove(file, small_pair.target(), small_pair.source()))
