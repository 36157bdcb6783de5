"""`only=`: each row of a batch runs only the clones that it asks for."""

import copy

import pytest
import torch

import pnc
from pnc.clones.branch import Scalars
from pnc.foundation.errors import InputError

N_BASE = 3


@pytest.fixture
def net(stage):
    return pnc.attach(copy.deepcopy(stage.target), *stage.clones)


def columns(net):
    """The columns of each clone's logits, by name."""
    found, start = {}, N_BASE
    for row in net.status():
        found[row.name] = slice(start, start + len(row.classes))
        start += len(row.classes)
    return found


def assert_rows(net, images, only, wanted):
    """Check logits; `wanted` has the names of the clones to expect for each row."""
    with torch.no_grad():
        full, found, base = net(images), net(images, only=only), net.target(images)
    assert torch.equal(found[:, :N_BASE], base)
    for name, place in columns(net).items():
        rows = torch.tensor([name in names for names in wanted])
        assert bool((found[~rows, place] == -torch.inf).all())
        # For another batch size kernels may sum in another order.
        torch.testing.assert_close(found[rows, place], full[rows, place], rtol=1e-5, atol=1e-5)


def test_each_row_gets_the_clones_that_it_asks_for(stage, net):
    dog, elk, gnu, hen = net.clones
    only = ["dog", (elk, hen), (), None, {gnu}]
    assert_rows(net, stage.images, only, [{dog}, {elk, hen}, set(), set(net.clones), {gnu}])
    net.base_priority = 1.5
    net.rescale({"dog": Scalars(0.5, (1.0,))})
    assert_rows(net, stage.images, tuple(only), [{dog}, {elk, hen}, set(), set(net.clones), {gnu}])
    with torch.no_grad():
        probabilities = net(stage.images, only=[()] * 5).softmax(1)
        assert torch.equal(probabilities[:, :N_BASE], net.target(stage.images).softmax(1))
        assert not probabilities[:, N_BASE:].any()


def test_where_all_rows_ask_for_the_same_the_bits_are_those_of_the_block(stage, net):
    dog, elk, *_ = net.clones
    with torch.no_grad():
        assert torch.equal(net(stage.images, only=[None] * 5), net(stage.images))
        found = net(stage.images, only=[(elk, dog)] * 5)
        with net.only(dog, elk):
            expected = net(stage.images)
            assert torch.equal(net(stage.images, only=[None] * 5), expected)
    assert torch.equal(found[:, : expected.shape[1]], expected)


def test_entries_that_make_no_sense_are_refused(stage, net):
    x = stage.images
    with pytest.raises(InputError, match="only: expected one entry for each of 5 images; got 2"):
        net(x, only=["dog", None])
    with pytest.raises(InputError, match=r"only: row 1: there is no enabled clone 'dig' \(did you mean 'dog'\?\)"):
        net(x, only=[None, ["dig"], None, None, None])
    for wrong in ("dog", 3, {"dog"}):
        with pytest.raises(InputError, match="only: expected a list with one entry for each image"):
            net(x, only=wrong)
    with pytest.raises(InputError, match="only: row 4: expected a name, several, or None"):
        net(x, only=[None, None, None, None, 7])
    with net.only("dog"), pytest.raises(InputError, match="row 0: there is no enabled clone 'gnu'.*there are dog"):
        net(x, only=["gnu", None, None, None, None])
    with net.disabled():
        assert torch.equal(net(x, only=[None, (), None, None, None]), net(x))


def test_it_compiles_and_gradients_flow(stage, net):
    torch._dynamo.reset()
    only = ["dog", None, (), "gnu", "gnu"]
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(stage.images, only=only), net(stage.images, only=only))
    torch._dynamo.reset()
    x = stage.images.clone().requires_grad_()
    net(x, only=only).softmax(1).square().sum().backward()
    assert bool(x.grad.isfinite().all()) and bool(x.grad.flatten(1).any(1).all())
