"""Sizes that depend on the images: a network that reads one is refused, one that only uses such tensors is recorded."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hazards
from pnc.foundation.errors import RecordingError
from pnc.foundation.tensor_bits import same_bits
from pnc.graph.recording import record

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.jit:DeprecationWarning"),
]


class Middle(hazards.Around):
    """A network with a function in its middle."""

    def __init__(self, function):
        super().__init__()
        self.function, self.linear = function, nn.Linear(4, 4)
        self.scripted = torch.jit.script(_scripted)

    def middle(self, x):
        return self.function(self, x)


def _scripted(x):
    chosen = torch.nonzero(x > 1.0)
    if chosen.numel() == 0:
        return x.exp()
    return x + 1


def chosen_rows(x):
    """The feature vectors of some positions, (n, 4)."""
    return x.permute(0, 2, 3, 1)[x.mean(1) > 0.5]


def with_each(x, parts):
    for part in parts:
        x = x + part.sum()
    return x


def with_split(self, x):
    for part in x.masked_select(x > 0.5).split(3):
        x = x + part.sum()
    return x


def count_of(x):
    """How many numbers a boolean tensor has that are true, as a tensor."""
    return (x.mean((1, 2, 3)) > 0.5).sum().clamp(max=1)


def packed(self, x):
    lengths = (x.mean((2, 3)) > 0.5).sum(1).clamp(min=1)
    rows = nn.utils.rnn.pack_padded_sequence(x.mean(3), lengths, batch_first=True, enforce_sorted=False)
    return x + rows.data.shape[0]


def caught(self, x):
    try:
        return x + x[x > 1e9].max()
    except RuntimeError:
        return x


READ = {
    "parts of tensor_split": ("shape", lambda self, x: x + x.tensor_split(count_of(x)[None].cpu())[0].shape[0]),
    "number of parts of tensor_split": (
        "tensor_split",
        lambda self, x: x + len(x.tensor_split((x.mean((1, 2, 3)) > 0.5).nonzero().flatten())),
    ),
    "packed sequence": ("shape", packed),
    "storage_offset": ("storage_offset", lambda self, x: x + x[count_of(x) :].storage_offset()),
    "an error that is caught": ("max in the network, failing", caught),
    "numel of nonzero": ("numel", lambda self, x: x + 1 if (x > 0.5).nonzero().numel() else x),
    "torch.numel": ("numel", lambda self, x: x * torch.numel(x[x > 0.5])),
    "shape of a masked tensor": ("shape", lambda self, x: x + 1 if x[x > 0.5].shape[0] > 3 else x),
    "len of masked_select": ("__len__", lambda self, x: x + 1 if len(x.masked_select(x > 0.5)) else x),
    "size of argwhere": ("size", lambda self, x: x * torch.argwhere(x > 0.5).size(0)),
    "where with one argument": ("numel", lambda self, x: x * torch.where(x > 0.5)[0].numel()),
    "unique": ("__len__", lambda self, x: x * len(torch.unique(x.round()))),
    "unique_consecutive": ("numel", lambda self, x: x + x.flatten().unique_consecutive().numel()),
    "bincount": ("size", lambda self, x: x * torch.bincount(x.flatten().abs().long()).size(0)),
    "one_hot without a number": ("shape", lambda self, x: x + F.one_hot(x.mean((2, 3)).argmax(1)).shape[1]),
    "repeat_interleave": (
        "shape",
        lambda self, x: x * torch.arange(4).repeat_interleave(x.mean((0, 2, 3)).abs().long()).shape[0],
    ),
    "slice with a tensor": ("shape", lambda self, x: x + x[:, : x.mean((0, 2, 3)).argmax()].shape[1]),
    "iteration over nonzero": ("unbind", lambda self, x: with_each(x, (x.mean((1, 2, 3)) > 0.5).nonzero())),
    "unbind": ("unbind", lambda self, x: with_each(x, x[:, 0, 0][x[:, 0, 0] > 0.5].unbind())),
    "chunk": ("chunk", lambda self, x: with_each(x, x[x > 0.5].chunk(4))),
    "split": ("split", with_split),
    "stride": ("stride", lambda self, x: x + chosen_rows(x).T.contiguous().stride(0)),
    "behind a layer": ("shape", lambda self, x: x + self.linear(chosen_rows(x)).relu().shape[0]),
    "behind cat": ("shape", lambda self, x: x + torch.cat([x[x > 0.5], x[x < 0.2]]).shape[0]),
    "of zeros_like": ("size", lambda self, x: x * torch.zeros_like(x[x > 0.5]).size()[0]),
    "compiled code": ("compiled code", lambda self, x: self.scripted(x)),
}


def put(self, x):
    chosen, y = x.mean(1) > 0.5, x.permute(0, 2, 3, 1).clone()
    y[chosen] = self.linear(y[chosen])
    return y.reshape(y.shape).permute(0, 3, 1, 2)


def experts(self, x):
    features = x.mean((2, 3))
    rows = (features.sum(1) > 0.5).nonzero().flatten()
    out = torch.zeros_like(features).index_add(0, rows, self.linear(features[rows]))
    return x + out.view(out.shape[0], out.shape[1], 1, 1)


def scattered(self, x):
    features = x.mean((2, 3))
    chosen = features.sum(1) > 0
    out = torch.zeros_like(features)
    out = out.masked_scatter(chosen[:, None].expand(features.shape), self.linear(features[chosen]))
    return x + out[:, :, None, None].expand(x.shape)


def known_dims(self, x):
    rows = chosen_rows(x)
    one, two = rows.chunk(2, -1)
    return x + (one * two).sum(0).repeat(2).view(1, 4, 1, 1) * rows.size(-1)


def normalised(self, x):
    total = F.layer_norm(chosen_rows(x), (4,)).sum(0)
    return x + total.view(1, total.shape[0], 1, 1)


def constant_mask(self, x):
    mask = torch.tensor([True, False, True, True])
    return x * x[:, mask].shape[1] + mask.nonzero().shape[0]


WORKED_WITH = {
    "rows written back": put,
    "index_add": experts,
    "masked_scatter": scattered,
    "sizes that are known": known_dims,
    "reduced over the open dim": normalised,
    "a mask that is a constant": constant_mask,
    "mean": lambda self, x: x + x[x > 0.5].mean().expand(x.shape),
    "a channel by a tensor": lambda self, x: x * x[:, x.mean((0, 2, 3)).argmax()].shape[1],
    "one_hot with a number": lambda self, x: (
        x + F.one_hot(x.mean((2, 3)).argmax(1), 4)[..., None, None].expand(x.shape)
    ),
}


@pytest.mark.parametrize("name", READ)
def test_reading_a_size_that_depends_on_the_images_is_refused(name):
    what, function = READ[name]
    network = hazards.build(lambda: Middle(function))
    with pytest.raises(RecordingError, match=rf"reads values that depend on the images \({what} .* depends on them"):
        record(network, hazards.images(4))


@pytest.mark.parametrize("name", WORKED_WITH)
def test_tensors_of_such_sizes_are_recorded_exactly(name):
    network = hazards.build(lambda: Middle(WORKED_WITH[name])).eval()
    recording = record(network, hazards.images(4))
    for factor in (0.1, 1, 3):
        x = factor * hazards.images(5, seed=5)
        with torch.no_grad():
            assert same_bits(recording.module(x.clone()), network(x)), factor


def test_a_layer_that_reads_sizes_in_its_own_forward_runs_as_it_is():
    class Layer(nn.Module):
        def forward(self, x):
            return x * x[x > 0.5].numel()

    network = hazards.build(lambda: Middle(lambda self, x: self.layer(x)))
    network.layer = Layer()
    recording, x = record(network.eval(), hazards.images(4)), hazards.images(5, seed=5)
    with torch.no_grad():
        assert same_bits(recording.module(x), network(x))


class Leaf(nn.Module):
    """A layer of the user's without children, which runs as one operation."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def keeps(self, x):
    self.rows = (x.mean((1, 2, 3)) > 0.5).nonzero()
    return x.exp()


def keeps_a_flag(self, x):
    self.flag = x.mean() > 0.5
    return x.exp()


LEAVES = {
    "a truth value": (lambda self, x: bool(x.mean() > 0.5), lambda found, x, leaf: x + 1 if found else x),
    "a size": (lambda self, x: len(x[x > 0.5]), lambda found, x, leaf: x * found),
    "a number from numpy": (lambda self, x: x.numpy().mean().round().item(), lambda found, x, leaf: x * found),
    "a number beside a tensor": (lambda self, x: (x, x.mean().item() > 0.5), lambda found, x, leaf: x + found[1]),
    "a list of rows": (lambda self, x: list(x[x > 0.5]), lambda found, x, leaf: with_each(x, found)),
    "a tensor or None": (
        lambda self, x: x.exp() if x.mean() > 0.5 else None,
        lambda found, x, leaf: x if found is None else found,
    ),
    "an attribute of such a size": (keeps, lambda found, x, leaf: x + len(leaf.rows)),
    "an attribute whose value is read": (keeps_a_flag, lambda found, x, leaf: x + bool(leaf.flag)),
    "text": (lambda self, x: x.exp(), lambda found, x, leaf: x if f"{x.mean():.1f}" == "0.0" else found),
}


@pytest.mark.parametrize("name", LEAVES)
def test_a_layer_that_hands_on_what_it_reads_is_refused(name):
    layer, use = LEAVES[name]
    network = hazards.build(lambda: Middle(lambda self, x: use(self.leaf(x), x, self.leaf)))
    network.leaf = Leaf(layer)
    with pytest.raises(RecordingError, match="reads values that depend on the images"):
        record(network.eval(), hazards.images(4))


def test_a_layer_whose_results_are_tensors_may_read():
    network = hazards.build(lambda: Middle(lambda self, x: self.leaf(x)[0]))
    network.leaf = Leaf(lambda self, x: (x * x[x > 0.5].numel(), x.mean().item() * torch.ones(1)))
    recording, x = record(network.eval(), hazards.images(4)), hazards.images(5, seed=5)
    with torch.no_grad():
        assert same_bits(recording.module(x), network(x))


def test_an_operator_of_another_library_is_asked_for_its_shape():
    @torch.library.custom_op("pnc_test::some", mutates_args=())
    def some(x: torch.Tensor) -> torch.Tensor:
        return x[x > 0.5]

    @torch.library.custom_op("pnc_test::same", mutates_args=())
    def same(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @same.register_fake
    def _(x):
        return torch.empty_like(x)

    with pytest.raises(RecordingError, match="numel in the network, of a tensor whose size depends on them"):
        record(hazards.build(lambda: Middle(lambda self, x: x * some(x).numel())), hazards.images(4))
    record(hazards.build(lambda: Middle(lambda self, x: x * same(x).shape[1])), hazards.images(4))
    record(hazards.build(lambda: Middle(lambda self, x: x * some(x).sum())), hazards.images(4))
