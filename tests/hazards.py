"""Tiny classifiers, one hazard each, for images (B, 3, 8, 8) and 5 classes.

`REPRODUCED` are to be recorded exactly, `REFUSED` are to be refused with a reason that matches the given expression.
Both map a name to something that builds a network; weights are random, so build them under a fixed seed (`build`).
"""

import enum
import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

N_CLASSES = 5

REPRODUCED: dict[str, Callable[[], nn.Module]] = {}
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {}


def images(n, seed=0):
    return torch.randn((n, 3, 8, 8), generator=torch.Generator().manual_seed(seed))


def data_parallel(network):
    """Wrapped as on a machine without GPUs: where there is one, the wrapper would move the network there."""
    with patch("torch.nn.parallel.data_parallel._get_available_device_type", lambda: None):
        return nn.DataParallel(network)


def build(factory):
    """The network of a factory, with the same random weights every time; the global random state is not touched."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these are deprecated on purpose: networks that use them still exist
        torch.manual_seed(0)
        return factory()


def reproduced(factory):
    REPRODUCED[factory.__name__] = factory
    return factory


def refused(reason):
    def register(factory):
        REFUSED[factory.__name__] = (factory, reason)
        return factory

    return register


def stem(channels=4):
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())


def tail(channels=4):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, N_CLASSES))


class Around(nn.Module):
    """A stem, the hazard (`middle`, on maps with 4 channels), a convolution and a head."""

    def __init__(self):
        super().__init__()
        self.stem = stem()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.tail = tail()

    def middle(self, x):
        return x

    def forward(self, x):
        return self.tail(self.conv(self.middle(self.stem(x))))


# -------------------------------------------------------------------------------------------------- ordinary structure


@reproduced
class Plain(Around):
    pass


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu(out)


@reproduced
class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layers, self.tail = stem(), nn.Sequential(Block(4, 4), Block(4, 6, 2), Block(6, 6)), tail(6)

    def forward(self, x):
        return self.tail(self.layers(self.stem(x)))


@reproduced
class Concatenated(Around):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 3, padding=1)

    def middle(self, x):
        return torch.cat([self.one(x), self.two(x)], 1)


@reproduced
class Grouped(Around):
    def __init__(self):
        super().__init__()
        self.depthwise, self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1, groups=2)

    def middle(self, x):
        return F.gelu(self.grouped(F.hardswish(self.depthwise(x))))


@reproduced
class DynamicWeights(Around):
    """A convolution whose weights are scaled by what it is given."""

    def middle(self, x):
        return F.conv2d(x, self.conv.weight * x.mean((0, 2, 3)).sigmoid().view(1, 4, 1, 1), padding=1)


@reproduced
class ConditionalConvolution(Around):
    """Filters mixed for each image, run as one convolution with a group per image."""

    def __init__(self):
        super().__init__()
        self.route, self.filters = nn.Linear(4, 2), nn.Parameter(torch.randn(2, 4 * 4 * 9))

    def middle(self, x):
        batch, channels, height, width = x.shape
        weight = (self.route(x.mean((2, 3))).softmax(1) @ self.filters).view(batch * 4, channels, 3, 3)
        x = F.conv2d(x.reshape(1, batch * channels, height, width), weight, padding=1, groups=batch)
        return x.view(batch, 4, height, width)


@reproduced
class SqueezeExcite(Around):
    def __init__(self):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def middle(self, x):
        return x * self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class Attention(nn.Module):
    def __init__(self, width=8, heads=2):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, scale=None, *, mask=None):
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        queries, keys, values = qkv
        scores = (queries @ keys.transpose(-2, -1)) * (scale or (width // self.heads) ** -0.5)
        if mask is not None:
            scores = scores.masked_fill(mask, -math.inf)
        return self.proj((scores.softmax(-1) @ values).transpose(1, 2).reshape(batch, tokens, width))


@reproduced
class VisionTransformer(nn.Module):
    """Class and register tokens, position embeddings, pre-norm blocks."""

    def __init__(self, n_prefix=2):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.prefix = nn.Parameter(torch.randn(1, n_prefix, 8))
        self.position = nn.Parameter(torch.randn(1, 4 + n_prefix, 8))
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(8), Attention(), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, N_CLASSES)

    def tokens(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        x = x + self.attention(self.norm1(x), mask=None)
        return self.norm(x + self.mlp(self.norm2(x)))

    def forward(self, x):
        return self.head(self.tokens(x)[:, 0])


@reproduced
class InterpolatedPositions(VisionTransformer):
    """Position embeddings of another grid, resized to the one of the image."""

    def __init__(self):
        super().__init__()
        self.grid = nn.Parameter(torch.randn(1, 8, 3, 3))

    def tokens(self, x):
        x = self.patches(x)
        grid = F.interpolate(self.grid, size=x.shape[-2:], mode="bicubic", antialias=True)
        x = (x + grid).flatten(2).transpose(1, 2)
        x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], 1)
        return self.norm(x + self.attention(self.norm1(x)))


@reproduced
class Distilled(VisionTransformer):
    """Two heads on two tokens, averaged."""

    def __init__(self):
        super().__init__()
        self.head_dist = nn.Linear(8, N_CLASSES)

    def forward(self, x):
        x = self.tokens(x)
        return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2


@reproduced
class Windows(Around):
    """Tensors whose first dimension is a multiple of the batch."""

    def middle(self, x):
        batch, channels, height, width = x.shape
        x = x.permute(0, 2, 3, 1).reshape(batch, height // 4, 4, width // 4, 4, channels)
        windows = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, channels)
        windows = windows.softmax(1).view(windows.shape[0] // 4, 2, 2, 4, 4, channels)
        return windows.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)


@reproduced
class ChannelsLastMaps(Around):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def middle(self, x):
        x = x.permute(0, 2, 3, 1)
        x = x + self.mlp(self.norm(x))
        return x.permute(0, 3, 1, 2)


@reproduced
class ConvolutionHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head, self.pool = stem(), nn.Conv2d(4, N_CLASSES, 1), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return self.pool(self.head(self.stem(x))).squeeze(-1).squeeze(-1)


@reproduced
class HeadWithoutBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.weight = stem(), nn.Parameter(torch.randn(N_CLASSES, 4))

    def forward(self, x):
        return F.linear(self.stem(x).amax((2, 3)), self.weight)


@reproduced
class HiddenLayerHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.flatten = stem(), nn.Flatten()
        self.head = nn.Sequential(nn.Linear(256, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, N_CLASSES))

    def forward(self, x):
        return self.head(self.flatten(self.stem(x)))


@reproduced
class TorchTransformer(nn.Module):
    """Layers of torch.nn that contain layers, with fused kernels of their own."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.patches, self.encoder = nn.Conv2d(3, 8, 4, 4), nn.TransformerEncoder(layer, 2)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, N_CLASSES)

    def forward(self, x):
        x = self.encoder(self.patches(x).flatten(2).transpose(1, 2))
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x.mean(1))


@reproduced
class Recurrent(nn.Module):
    """A leaf that returns nested tuples."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(24, 6, batch_first=True, bidirectional=True), nn.Linear(6, N_CLASSES)

    def forward(self, x):
        _, (hidden, _) = self.lstm(x.transpose(1, 2).flatten(2))
        return self.head(hidden[-1])


# ------------------------------------------------------------------------------------------------------ writes in place


@reproduced
class OverwrittenCuts(Around):
    def middle(self, x):
        kept = x.mean((2, 3), keepdim=True)
        x.mul_(2).sub_(kept)
        x[:, 0] = 0.5
        x = F.relu(x, inplace=True)
        x[:, 1:3, ::2].add_(1)
        return x.clamp_(max=3)


@reproduced
class OverwrittenInput(Around):
    def forward(self, x):
        x.sub_(0.1)
        x /= 2
        return super().forward(x)


@reproduced
class WrittenThroughView(Around):
    def middle(self, x):
        flat = x.view(x.shape[0], -1)
        flat.relu_()
        first, second = x.chunk(2, dim=1)
        second.copy_(first)
        return x


@reproduced
class FilledBuffer(Around):
    """A result gathered in memory that a factory function made."""

    def middle(self, x):
        out = x.new_zeros(x.shape)
        for channel in range(x.shape[1]):
            out[:, channel] = x[:, -1 - channel]
        torch.add(out, x, out=out)
        return out


# ---------------------------------------------------------------------------------------------- modules and their calls


@reproduced
class AppliedThreeTimes(Around):
    def __init__(self):
        super().__init__()
        self.block = Block(4, 4)

    def middle(self, x):
        for _ in range(3):
            x = self.block(x)
        return x


@reproduced
class SharedModules(Around):
    """One module under two names, and one weight in two modules."""

    def __init__(self):
        super().__init__()
        self.again, self.tied = self.conv, nn.Conv2d(4, 4, 3, padding=1)
        self.tied.weight = self.conv.weight

    def middle(self, x):
        return self.tied(self.again(x)).relu()


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x, bias=None, *, power=1, options=None):
        x = x * self.factor**power
        return x if bias is None else x + bias[options["channel"]]


@reproduced
class KeywordArguments(Around):
    def __init__(self):
        super().__init__()
        self.scale, self.bias = Scale(), nn.Parameter(torch.randn(4))

    def middle(self, x):
        return self.scale(x=self.scale(x, self.bias, power=2, options={"channel": 3}), power=3)

    def forward(self, x, labels=None, return_loss=False, **extra):
        logits = super().forward(x)
        return (F.cross_entropy(logits, labels), logits) if return_loss else logits


@reproduced
class DictionaryOutput(Plain):
    def forward(self, x):
        features = self.stem(x)
        return {"features": features, "logits": self.tail(self.conv(features))}


@dataclass
class Answer:
    loss: torch.Tensor | None
    logits: torch.Tensor
    features: torch.Tensor


@reproduced
class DataclassOutput(Plain):
    def forward(self, x):
        features = self.stem(x)
        return Answer(None, self.tail(self.conv(features)), features)


@reproduced
class TupleOutput(Plain):
    def forward(self, x):
        features = self.stem(x)
        return self.tail(self.conv(features)), features


class Pair(NamedTuple):
    low: torch.Tensor
    high: torch.Tensor


class ManyResults(nn.Module):
    """A leaf that returns a mapping with a named tuple and a dataclass."""

    def forward(self, x):
        return {"pair": Pair(x.clamp(max=0), x.clamp(min=0)), "answer": Answer(None, x, x.exp()), "name": "many"}


@reproduced
class NestedResults(Around):
    def __init__(self):
        super().__init__()
        self.many = ManyResults()

    def middle(self, x):
        out = self.many(x - 0.5)
        return out["pair"].high - out["pair"].low + out["answer"].features


@reproduced
class DataclassArgument(Around):
    """A childless module that takes what a graph cannot hold is opened."""

    class Unpack(nn.Module):
        def forward(self, answer):
            return answer.logits * answer.features

    def __init__(self):
        super().__init__()
        self.unpack = self.Unpack()

    def middle(self, x):
        return self.unpack(Answer(None, x, x.sigmoid()))


@reproduced
class ModuleMadeOnTheFly(Around):
    def middle(self, x):
        return nn.LeakyReLU(0.3)(nn.AvgPool2d(3, 1, 1)(x))


@reproduced
class RootIsLeaf(nn.Module):
    """No submodule at all."""

    def __init__(self):
        super().__init__()
        self.filters, self.weight = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4, N_CLASSES))

    def forward(self, x):
        return F.conv2d(x, self.filters).relu().mean((-1, -2)) @ self.weight


@reproduced
class OwnCall(Around):
    """A layer that overrides `__call__`, and one whose `forward` is called directly."""

    class Doubling(nn.Conv2d):
        def __call__(self, x):
            return self.forward(x) * 2

    def __init__(self):
        super().__init__()
        self.doubling = self.Doubling(4, 4, 1)

    def middle(self, x):
        return self.conv.forward(self.doubling(x))


@reproduced
class UnregisteredModule(Around):
    def __init__(self):
        super().__init__()
        self.hidden = [nn.Conv2d(4, 4, 1)]

    def middle(self, x):
        return self.hidden[0](x)


@reproduced
class WeightsForOneCall(Around):
    """The same layer with its own weights and, for one call, with others."""

    def middle(self, x):
        weights = {"weight": self.conv.weight * 2, "bias": self.conv.bias - 1}
        return torch.func.functional_call(self.conv, weights, (x,))


@reproduced
class HookForOneCall(Around):
    def middle(self, x):
        handle = self.conv.register_forward_hook(lambda module, args, out: out * 2)
        x = self.conv(x)
        handle.remove()
        return x


@reproduced
class ChildlessBranch(Around):
    """A data-dependent branch inside a leaf runs again each time, so it does no harm."""

    class Branch(nn.Module):
        def forward(self, x):
            return x.relu() if x.mean() > 0 else x.exp()

    def __init__(self):
        super().__init__()
        self.branch = self.Branch()

    def middle(self, x):
        return self.branch(x - 0.7) + self.branch(x)


# ----------------------------------------------------------------------------------------------------- hidden machinery


@reproduced
class Hooked(Around):
    """Hooks that change what passes, on leaves and on containers."""

    def __init__(self):
        super().__init__()
        self.conv.register_forward_hook(lambda module, args, out: out * 2)
        self.stem.register_forward_hook(lambda module, args, kwargs, out: out + 1, with_kwargs=True)
        self.tail.register_forward_pre_hook(lambda module, args: (args[0].relu(),))
        self.stem[1].register_forward_hook(self.halve)

    def halve(self, module, args, out):
        return out / 2


@reproduced
class CapturedFeatures(Around):
    """The head reads what a hook has put aside."""

    def __init__(self):
        super().__init__()
        self.caught = None
        self.conv.register_forward_hook(self.catch)

    def catch(self, module, args, out):
        self.caught = out

    def forward(self, x):
        super().forward(x)
        return self.tail(self.caught.relu())


@reproduced
class ParallelPart(Around):
    """`DataParallel` inside, as torchvision's first VGGs had it."""

    def __init__(self):
        super().__init__()
        self.stem = data_parallel(self.stem)


@torch.library.custom_op("zoo::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@reproduced
class CustomOperators(Around):
    """Operators below PyTorch's functions: a registered one, by name and as a function, and ATen's own."""

    def middle(self, x):
        return torch.ops.aten.relu(doubled(x) + torch.ops.zoo.doubled(x)) - torch.ops.aten.exp.default(x)


@reproduced
class WeightNormalized(Around):
    def __init__(self):
        super().__init__()
        self.conv = nn.utils.weight_norm(self.conv)
        self.old = nn.utils.spectral_norm(nn.Conv2d(4, 4, 1))

    def middle(self, x):
        return self.old(x)


@reproduced
def quantized():
    """Layers whose weights are no tensors."""
    return torch.ao.quantization.quantize_dynamic(HiddenLayerHead().eval(), {nn.Linear}, torch.qint8)


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight + weight.transpose(0, 1)


@reproduced
class Parametrized(Around):
    def __init__(self):
        super().__init__()
        parametrizations.weight_norm(self.conv)
        parametrizations.spectral_norm(self.tail[2])
        self.mix = HeadWithoutBias()
        self.mix.stem, self.mix.weight = nn.Identity(), nn.Parameter(torch.randn(4, 4))
        parametrize.register_parametrization(self.mix, "weight", Symmetric())

    def middle(self, x):
        return x + self.mix(x)[:, :, None, None]


@reproduced
class Pruned(Around):
    """Masks of `torch.nn.utils.prune`: the weight is made by a hook."""

    def __init__(self):
        super().__init__()
        prune.l1_unstructured(self.conv, "weight", 0.5)
        prune.ln_structured(self.stem[0], "weight", 0.5, n=2, dim=0)


@reproduced
class InferenceTensors(Around):
    """Weights that were made under `inference_mode`."""

    def __init__(self):
        with torch.inference_mode():
            super().__init__()


@reproduced
class Checkpointed(Around):
    def __init__(self):
        super().__init__()
        self.one, self.two = Block(4, 4), Block(4, 4)

    def middle(self, x):
        return checkpoint(self.two, checkpoint(self.one, x, use_reentrant=True), use_reentrant=False)


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, digits):
        return (x * 10**digits).round() / 10**digits

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Reversed(torch.autograd.Function):
    """Returns its input, which comes out as another tensor object for the same memory."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


@reproduced
class CustomFunctions(Around):
    def middle(self, x):
        return Reversed.apply(Rounded.apply(x, 1)) + Reversed.apply(x)


@reproduced
class CachedTensors(Around):
    """Caches that are filled by the first forward: an attribute, a dictionary in eval mode, one that carries grad."""

    def __init__(self):
        super().__init__()
        self.bias, self.grid, self.cache, self.old = nn.Parameter(torch.randn(4)), None, {}, None

    def middle(self, x):
        if self.grid is None or self.grid.shape[-1] != x.shape[-1]:
            self.grid = torch.linspace(-1, 1, x.shape[-1], device=x.device)
        if self.training or x.device not in self.cache:
            self.cache[x.device] = self.bias[torch.arange(3, -1, -1)][:, None, None]
        with torch.enable_grad():
            self.old = self.bias.exp() if self.old is None else self.old
        return x * self.grid + self.cache[x.device] + self.old[:, None, None]


@reproduced
class PlainTensorAttributes(Around):
    def __init__(self):
        super().__init__()
        self.offset, self.table = torch.randn(4, 1, 1), [torch.randn(4, 1, 1), np.linspace(0, 1, 8, dtype=np.float32)]

    def middle(self, x):
        return (x + self.offset) * self.table[0] * torch.from_numpy(self.table[1]) * np.float32(1.5) + np.sqrt(2.0)


@reproduced
class Counting(Around):
    """Writes that no logit depends on."""

    def __init__(self):
        super().__init__()
        self.calls, self.seen = 0, []
        self.register_buffer("n_images", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(4))

    def middle(self, x):
        self.calls += 1
        self.seen.append(tuple(x.shape))
        self.n_images += len(x)
        self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 2, 3))
        return x


@reproduced
class NestedCaches(Around):
    """Containers within containers, and flags and gradients, that every forward changes."""

    def __init__(self):
        super().__init__()
        self.cache = {"shapes": {"all": []}, "last": [None]}
        for parameter in self.parameters():
            parameter.grad = torch.ones_like(parameter)

    def middle(self, x):
        self.cache["shapes"]["all"].append(tuple(x.shape))
        self.cache["last"][0] = x.mean()
        self.stem.requires_grad_(False)
        self.conv.zero_grad()
        self.tail[2].bias.grad.zero_()
        return x


@reproduced
class TrainMode(Around):
    """Dropout and BatchNorm as they are in training; one BatchNorm is frozen."""

    def __init__(self):
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm2d(4)
        self.train()
        self.norm.eval()

    def middle(self, x):
        x = F.dropout(self.norm(self.drop(x)), training=self.training)
        return x * torch.rand(len(x), 1, 1, 1) if self.training else x


@reproduced
class DropoutBesideShortcut(Around):
    """In eval mode dropout returns the very tensor that it was given."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def middle(self, x):
        return x + self.drop(x) * 2


@reproduced
class OverriddenTrain(Around):
    """A network whose own train() does more than to set flags."""

    def train(self, mode=True):
        self.n_switches = getattr(self, "n_switches", 0) + 1
        return super().train(mode)


@reproduced
class FrozenWeights(Around):
    """`matmul` chooses its kernel, and so the bits, by `requires_grad`."""

    def __init__(self):
        super().__init__()
        self.linear, self.frozen = nn.Linear(256, 192, bias=False), nn.Linear(192, 256, bias=False)
        self.frozen.requires_grad_(False)

    def middle(self, x):
        tokens = x.flatten(1).view(-1, 1, 256)
        return self.frozen(self.linear(torch.stack([tokens, tokens + 1], 1)[:, 0])).view(x.shape)


# --------------------------------------------------------------------------------------------------------------- values


@reproduced
class Operators(Around):
    def middle(self, x):
        y = (2 - x) ** 2 + 1 / (x + 2) - (-x).abs() // 2
        y = torch.where(x > 0.5, y, x) * (x <= 1) + 2**x + x % 2
        return y.mT.T.mT.real.data if y.dim() == 2 else (y.mT @ x).mT


@reproduced
class Indexing(Around):
    def middle(self, x):
        batch = torch.arange(x.shape[0], device=x.device)
        best = x.mean((2, 3)).argmax(1)
        order = x[0, :, 0, 0].detach().new_tensor([2, 0, 1, 3]).long()
        top = x.flatten(2).topk(4, dim=2)
        x = x[..., None].squeeze(-1)[:, order][:, torch.tensor([True, True, True, True])]
        return x + x[batch, best][:, None] + top.values.sum(2)[..., None, None] + top.indices[:, :, :1, None]


@reproduced
class DataDependentShapes(Around):
    """How many entries are chosen depends on the images, what is done with them does not."""

    def middle(self, x):
        chosen = x > 0.5
        out = torch.zeros_like(x)
        out[chosen] = x[chosen] * 2
        return out + (x > 0.5).nonzero().float().mean() + x.masked_select(chosen).sum()


@reproduced
class ShapeArithmetic(Around):
    def middle(self, x):
        batch, channels, height, width = x.size()
        pad = (4 - height % 4) % 4 + 1
        x = F.pad(x, (0, pad, 0, pad)).unfold(2, height, 1)[:, :, 0].transpose(2, 3)[..., :width]
        x = (
            x.reshape(batch * channels, 1, height, -1)
            .expand(-1, 2, -1, -1)
            .mean(1)
            .view(batch, channels, height, width)
        )
        x = F.interpolate(x, size=(height // 2, int(width * 0.5)), mode="bilinear")
        return F.interpolate(x, scale_factor=2) * (x.numel() / x.shape[0] / 64) * math.sqrt(x.shape[1])


@reproduced
class SqueezedBatch(Around):
    """Cannot take a single image."""

    def forward(self, x):
        features = self.stem(x).mean((2, 3)).squeeze(0)
        return torch.stack([features.sum(1), features.amax(1)], 1) @ self.tail[2].weight[:, :2].T


@reproduced
class BatchInArguments(Around):
    def middle(self, x):
        zeros = torch.zeros(x.shape[0], 1, *x.shape[2:], device=x.device)
        parts = torch.split(torch.cat([x, x + 1]), len(x))
        scores = torch.einsum("bchw,dchw->bd", *parts)
        return x + zeros + scores.diagonal()[:, None, None, None] * torch.eye(len(x)).sum(1).view(-1, 1, 1, 1)


def _scripted_sum(x, y):
    for _ in range(y.shape[1]):
        x = x + y * 0.1
    return x.relu()


@reproduced
class ScriptedFunction(Around):
    def __init__(self):
        super().__init__()
        self.function = torch.jit.script(_scripted_sum)

    def middle(self, x):
        return self.function(x, x.exp())


@reproduced
class GradientModes(Around):
    @torch.no_grad()
    def middle(self, x):
        with torch.enable_grad():
            x = x.exp()
        return x.detach()


class Mode(enum.StrEnum):
    NEAREST = "nearest"


@reproduced
class OddNumbers(Around):
    def middle(self, x):
        x = F.interpolate(x, scale_factor=np.float64(2), mode=Mode.NEAREST)[:, :, ::2, ::2]
        x = x.masked_fill(x < -math.inf, math.nan).clamp(-math.inf, float("inf"))
        return torch.nan_to_num(x / x.new_tensor(1e-45), posinf=2.0).sign() + x


@reproduced
class MixedTypes(Around):
    def middle(self, x):
        return (x.double() + x.to(torch.bfloat16).float() * x.int()).type_as(x)


# -------------------------------------------------------------------------------------------------------------- refused


@refused(r"values that depend on the images \(__bool__ in the network\)")
class DataBranch(Around):
    def middle(self, x):
        return x + 1 if x.mean() > 0.5 else x


@refused(r"values that depend on the images \(item in block\)")
class DataAsNumber(Around):
    class Inner(nn.Sequential):
        def forward(self, x):
            return x / x.abs().max().item()

    def __init__(self):
        super().__init__()
        self.block = self.Inner(nn.ReLU())

    def middle(self, x):
        return self.block(x)


@refused(r"depends on the batch size: __getitem__ .* at batch size 2, conv .*|depends on the batch size")
class LoopOverBatch(Around):
    def middle(self, x):
        return torch.stack([self.conv(image[None])[0] for image in x])


@refused("depends on the batch size")
class LoopOverBatchIndex(Around):
    def middle(self, x):
        out = torch.zeros_like(x)
        for i in range(x.shape[0]):
            out[i] = x[i] / x[i].norm()
        return out


@refused("depends on the batch size")
class BatchBranch(Around):
    def middle(self, x):
        return x.relu() if x.shape[0] > 2 else x.exp()


@refused("is not reproduced|cannot process")
class LargeBatchBranch(Around):
    def middle(self, x):
        return x * 2 if x.shape[0] > 3 else x


@refused("depends on the batch size, but not as a multiple of it: 3 at batch size 2, 4 at 3")
class BatchPlusOne(Around):
    def middle(self, x):
        return F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1)).narrow(0, 0, len(x) + 1)[:-1]


@refused("depends on the batch size, but not as a multiple of it: 0.5 at")
class DividedByBatch(Around):
    def middle(self, x):
        return x * (1 / len(x))


@refused("scaled_dot_product_attention in .* under autocast|conv2d in .* under autocast|conv in .* under autocast")
class AutocastInside(Around):
    def middle(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.conv(x).float()


@refused(r"values that depend on the images \(numpy in the network\)")
class NumpyRoundTrip(Around):
    def middle(self, x):
        return torch.from_numpy(np.tanh(x.numpy()))


@refused(r"values that depend on the images \(__array__ in the network\)")
class NumpyFunction(Around):
    def middle(self, x):
        return torch.as_tensor(np.tanh(np.asarray(x)))


@refused(r"values that depend on the images \(tolist in the network\)")
class ListRoundTrip(Around):
    def middle(self, x):
        return torch.tensor(x.tolist())


@refused("created outside of PyTorch .* another thread")
class OtherThread(Around):
    def middle(self, x):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self.conv, x).result()


@refused("without memory of its own")
class Vmapped(Around):
    def middle(self, x):
        return torch.vmap(lambda image: image / image.norm())(x)


@refused("without memory of its own")
class SparseTensors(Around):
    def middle(self, x):
        return x.to_sparse().to_dense()


def _scripted(x):
    return x.exp() if bool(x.mean() > 0.5) else x.relu()


@refused(r"values that depend on the images \(compiled code in the network\)")
class ScriptedBranch(Around):
    def __init__(self):
        super().__init__()
        self.function = torch.jit.script(_scripted)

    def middle(self, x):
        return self.function(x)


@refused("TorchScript cannot be recorded .the network is")
def scripted():
    return torch.jit.script(Plain())


@refused(r"TorchScript cannot be recorded .tail is")
def scripted_part():
    network = Plain()
    network.tail = torch.jit.trace(network.tail.eval(), torch.randn(2, 4, 8, 8))
    return network


@refused("the network gives a tensor other memory")
class OverwrittenWeight(Around):
    def middle(self, x):
        self.conv.weight.data = self.conv.weight.data.sign()
        return x


@refused("runs under inference_mode")
class InferenceMode(Around):
    @torch.inference_mode()
    def middle(self, x):
        return x.relu_()


@refused("different logits for the same images")
class RandomNumbers(Around):
    def middle(self, x):
        return x + torch.randn_like(x)


@refused("different logits for the same images")
class Stateful(Around):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def middle(self, x):
        self.calls += 1
        return x + torch.ones(()) * self.calls if self.calls > 3 else x


@refused("writes to its own weights or buffers: running_mean, running_var")
class AlwaysTraining(Around):
    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def middle(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, training=True)


@refused("writes to its own weights or buffers: norm.running_mean")
class StubbornNorm(Around):
    """A leaf that writes to its buffers even in eval mode."""

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(4))

        def forward(self, x):
            self.running_mean.lerp_(x.mean((0, 2, 3)), 0.1)
            return x

    def __init__(self):
        super().__init__()
        self.norm = self.Norm()

    def middle(self, x):
        return self.norm(x)


@refused("different logits for the same images")
class StatefulNorm(StubbornNorm):
    """What it wrote, also while its recording was verified, is taken back."""

    class Norm(StubbornNorm.Norm):
        def forward(self, x):
            return super().forward(x) - self.running_mean[:, None, None]


@refused("tail.2.weight has no values yet")
def lazy():
    network = Plain()
    network.tail[2] = nn.LazyLinear(N_CLASSES)
    return network


@refused(r"must return logits \(B, K\), but returns a tensor \(2, 5, 8, 8\)")
class MapOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = stem(), nn.Conv2d(4, N_CLASSES, 1)

    def forward(self, x):
        return self.head(self.stem(x))


@refused(r"must return logits \(B, K\), but returns a tensor \(2,\) of torch.float32")
class OneScore(Plain):
    def forward(self, x):
        return super().forward(x)[:, 0]


@refused(r"must return logits \(B, K\), but returns a tensor \(2, 5\) of torch.int64")
class Decisions(Plain):
    def forward(self, x):
        return F.one_hot(super().forward(x).argmax(1), N_CLASSES)


@refused(r"must return logits \(B, K\), but returns list")
class NoTensorOutput(Plain):
    def forward(self, x):
        return ["cat", "dog"]


@refused("returns 4 rows of logits for 2 images")
class TwoCrops(Plain):
    def forward(self, x):
        return super().forward(torch.cat([x, x.flip(3)]))


@refused(r"cannot process images of shape \(2, 3, 8, 8\), torch.float32: AssertionError: wrong size")
class AnotherSize(Plain):
    def forward(self, x):
        assert x.shape[-1] == 224, "wrong size"
        return super().forward(x)
