"""Tiny networks for the tests of channel spaces, one hazard each, with the expected spaces."""

import torch
import torch.nn.functional as F
from torch import nn

CASES = {}


def case(spaces, frozen=()):
    """Register a network with expected {space: (units, channels per unit)} and frozen {layer: reason}."""

    def register(factory):
        CASES[factory.__name__] = (factory, spaces, dict(frozen))
        return factory

    return register


class Net(nn.Module):
    """A convolution to 8 channels, the hazard, a convolution to 5 channels, a head."""

    def __init__(self, **layers):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.last = nn.Conv2d(8, 5, 1)
        self.head = nn.Linear(5, 4)

    def middle(self, x):
        return x

    def forward(self, x):
        return self.head(self.last(self.middle(self.first(x))).mean((2, 3)))


LAST = {"last": "output of the segment"}


@case({"first": (8, 1)}, LAST)
class Chain(Net):
    def middle(self, x):
        return F.max_pool2d(F.relu(x), 2)


@case({"first": (8, 1)}, LAST)
class NormInBetween(Net):
    def __init__(self):
        super().__init__(norm=nn.BatchNorm2d(8), act=nn.Hardswish(inplace=True), drop=nn.Dropout())

    def middle(self, x):
        return self.drop(self.act(self.norm(x)))


@case({"first": (8, 1)}, LAST)
class NotZero(Net):
    """softplus(0) is not 0: a masked channel is masked again where the next layer reads it."""

    def middle(self, x):
        return F.softplus(x)


@case({"first": (8, 1)}, LAST)
class NotZeroBeforeNorm(Net):
    """The norm's zeroed weight and bias give 0 again."""

    def __init__(self):
        super().__init__(norm=nn.BatchNorm2d(8))

    def middle(self, x):
        return self.norm(torch.sigmoid(x))


@case({"first": (8, 1)}, LAST)
class NormWithoutAffine(Net):
    def __init__(self):
        super().__init__(norm=nn.BatchNorm2d(8, affine=False))

    def middle(self, x):
        return self.norm(x)


@case({"first": (8, 1)}, LAST)
class InstanceNorm(Net):
    def __init__(self):
        super().__init__(norm=nn.InstanceNorm2d(8))

    def middle(self, x):
        return self.norm(x)


@case({"first": (4, 2)}, LAST)
class GroupNorm(Net):
    def __init__(self):
        super().__init__(norm=nn.GroupNorm(4, 8))

    def middle(self, x):
        return self.norm(x)


@case({"first": (4, 2)}, LAST)
class GroupNormWithoutAffine(Net):
    def __init__(self):
        super().__init__(norm=nn.GroupNorm(4, 8, affine=False))

    def middle(self, x):
        return self.norm(x)


@case({"first": (8, 1)}, LAST)
class OneGroup(Net):
    """The norm still counts the removed channels, as zeros."""

    def __init__(self):
        super().__init__(norm=nn.GroupNorm(1, 8))

    def middle(self, x):
        return self.norm(x)


@case({"first": (8, 1)}, LAST)
class UnknownOperation(Net):
    """It receives its input in full size, with zeros for removed channels, and keeps all its outputs."""

    def middle(self, x):
        return x.cumsum(1)


@case({}, {"first": "no rule for cumsum"})
class UnknownOperationAfterOffset(Net):
    """Removed channels would not be zero in its input."""

    def middle(self, x):
        return torch.sigmoid(x).cumsum(1)


class Offset(nn.Module):
    """Elementwise, unknown, f(0) = 0."""

    def forward(self, x):
        return x * torch.sigmoid(1.7 * x)


class RollChannels(nn.Module):
    def forward(self, x):
        return x.roll(1, 1)


@case({"first": (8, 1)}, LAST)
class ForeignActivation(Net):
    def __init__(self):
        super().__init__(act=Offset())

    def middle(self, x):
        return self.act(x)


@case({"first": (8, 1)}, LAST)
class ForeignMixer(Net):
    def __init__(self):
        super().__init__(act=RollChannels())

    def middle(self, x):
        return self.act(x)


class FirstApart(nn.Module):
    def forward(self, x):
        return torch.cat([x[:, :1] * 2, x[:, 1:]], 1) + 1


@case({"first": (8, 1)}, LAST)
class ForeignPlaces(Net):
    """Entry by entry, but different for each channel."""

    def __init__(self):
        super().__init__(act=FirstApart())

    def middle(self, x):
        return self.act(x)


class LayerScale(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(n, 1, 1))

    def forward(self, x):
        return x * self.gamma


@case({"first": (8, 1)}, LAST)
class ForeignScale(Net):
    def __init__(self):
        super().__init__(scale=LayerScale(8), act=nn.PReLU(8))

    def middle(self, x):
        return self.act(self.scale(x))


class SamePadding(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


@case({"first": (8, 1), "conv": (8, 1)}, LAST)
class ConvolutionSubclass(Net):
    """Another padding: still a convolution whose module shrinks."""

    def __init__(self):
        super().__init__(conv=SamePadding(8, 8, 3))

    def middle(self, x):
        return self.conv(x)


@case({"first": (8, 1), "wide": (6, 1), "narrow": (8, 1)}, LAST)
class Depthwise(Net):
    def __init__(self):
        super().__init__(
            wide=nn.Conv2d(8, 6, 1), depthwise=nn.Conv2d(6, 12, 3, groups=6), narrow=nn.Conv2d(12, 8, 1, bias=False)
        )

    def middle(self, x):
        return self.narrow(F.relu(self.depthwise(F.relu(self.wide(x)))))


@case({"first": (2, 4)}, LAST)
class GroupedConvolution(Net):
    """Whole groups are removed, two inputs and four outputs each; the next layer ties two such groups together."""

    def __init__(self):
        super().__init__(grouped=nn.Conv2d(8, 16, 3, groups=4), back=nn.Conv2d(16, 8, 1, groups=2))

    def middle(self, x):
        return self.back(F.relu(self.grouped(x)))


@case({"first": (8, 1), "squeeze": (3, 1)}, LAST)
class SqueezeExcite(Net):
    def __init__(self):
        super().__init__(squeeze=nn.Conv2d(8, 3, 1), excite=nn.Conv2d(3, 8, 1))

    def middle(self, x):
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


@case({"gate": (8, 1), "first": (8, 1)}, LAST)
class FixedGate(Net):
    """A gate from an unknown operation shrinks with the tensor that it multiplies."""

    def __init__(self):
        super().__init__(gate=nn.Conv2d(3, 8, 1))

    def forward(self, x):
        gate = self.gate(x.mean((2, 3), keepdim=True)).cumsum(1)
        return self.head(self.last(self.first(x) * gate).mean((2, 3)))


@case({"first": (8, 1), "other": (8, 1)}, LAST)
class AddedToFixed(Net):
    """Zeros replace removed channels in a sum with channels that stay."""

    def __init__(self):
        super().__init__(other=nn.Conv2d(3, 8, 3, padding=1))

    def forward(self, x):
        return self.head(self.last(self.first(x) + self.other(x).cumsum(1)).mean((2, 3)))


@case({"first": (8, 1)}, LAST)
class ParametersInTheGraph(Net):
    """Scale, bias and a whole layer as parameters of the network itself."""

    def __init__(self):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(8, 1, 1)), nn.Parameter(torch.ones(1, 8, 1, 1))
        self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))

    def middle(self, x):
        x = F.relu(x * self.scale + self.bias)
        return F.batch_norm(
            x, self.scale.reshape(8), self.scale.reshape(8), self.bias.reshape(8), self.scale.reshape(8)
        )


@case({"first": (8, 1), "weight": (6, 1), "back": (8, 1)}, LAST)
class FunctionalLayers(Net):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 8, 1, 1)), nn.Parameter(torch.ones(6))
        self.depthwise, self.back = nn.Parameter(torch.randn(6, 1, 3, 3)), nn.Parameter(torch.randn(8, 6))

    def middle(self, x):
        x = F.conv2d(F.relu(x), self.weight, self.bias)
        x = F.conv2d(x, self.depthwise, groups=6, padding=1)
        x = F.group_norm(x, 6, weight=self.bias, bias=self.bias)
        return F.linear(x.permute(0, 2, 3, 1), self.back).movedim(-1, 1)


@case({"first": (8, 1), "a": (4, 1), "b": (3, 1), "c": (8, 1)}, LAST)
class Concatenation(Net):
    """Dense connections: one tensor is read as part of two concatenations."""

    def __init__(self):
        super().__init__(a=nn.Conv2d(8, 4, 1), b=nn.Conv2d(12, 3, 1), c=nn.Conv2d(15, 8, 1))
        self.norm = nn.BatchNorm2d(15)

    def middle(self, x):
        x = torch.cat([x, self.a(x)], 1)
        return self.c(F.relu(self.norm(torch.cat([x, self.b(x)], 1))))


@case({"first": (4, 2), "back": (8, 1)}, LAST)
class GatedHalves(Net):
    """chunk, then one half times the other: channels are removed in pairs."""

    def __init__(self):
        super().__init__(back=nn.Conv2d(4, 8, 1))

    def middle(self, x):
        a, b = x.chunk(2, dim=1)
        return self.back(a * b.sigmoid())


@case({"first": (4, 2), "wide": (8, 2)}, LAST)
class GatedLinearUnits(Net):
    def __init__(self):
        super().__init__(wide=nn.Conv2d(4, 16, 1), glu=nn.GLU(1))

    def middle(self, x):
        return self.glu(self.wide(F.glu(x, dim=1)))


@case({}, {"first": "returns more than a tensor"})
class SeveralResults(Net):
    def __init__(self):
        super().__init__(pool=nn.MaxPool2d(2, return_indices=True))

    def middle(self, x):
        values, places = self.pool(x)
        return values + places.remainder(2)


@case({"first": (8, 1)}, LAST)
class SizesByName(Net):
    def middle(self, x):
        return torch.reshape(torch.reshape(x, shape=(len(x), 8, 64)), (-1, 8, 8, 8))


@case({"first": (3, 1), "first#1": (5, 1), "left": (2, 1), "right": (6, 1)}, LAST)
class UnequalSplit(Net):
    def __init__(self):
        super().__init__(left=nn.Conv2d(3, 2, 1), right=nn.Conv2d(5, 6, 1))

    def middle(self, x):
        a, b = torch.split(x, [3, 5], 1)
        return torch.cat([self.left(a), self.right(b)], 1)


@case({"first": (3, 1), "first#1": (5, 1), "left": (4, 1), "right": (4, 1)}, LAST)
class Slices(Net):
    def __init__(self):
        super().__init__(left=nn.Conv2d(3, 4, 1), right=nn.Conv2d(5, 4, 1))

    def middle(self, x):
        return torch.cat([self.left(x[:, :3]), self.right(x[:, 3:, :, ::2].repeat_interleave(2, 3))], 1)


@case({"first": (4, 2)}, LAST)
class ChannelShuffle(Net):
    def middle(self, x):
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


@case({}, {"first": "takes single channels"})
class EveryOtherChannel(Net):
    def middle(self, x):
        return x[:, ::2].repeat(1, 2, 1, 1)


@case({"first": (6, 1), "wide": (2, 1)}, LAST)
class PaddedShortcut(Net):
    """ResNet's parameter-free shortcut: padded channels go with the channels that they are added to."""

    def __init__(self):
        super().__init__(wide=nn.Conv2d(6, 8, 3, 2, 1))
        self.first = nn.Conv2d(3, 6, 3, padding=1)

    def middle(self, x):
        return F.relu(self.wide(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)))


@case({"first": (8, 1)}, LAST)
class FlattenedMap(Net):
    """Each channel is read by a whole block of columns."""

    def __init__(self):
        super().__init__(pool=nn.AdaptiveAvgPool2d(2))
        self.last = nn.Linear(8 * 4, 5)

    def forward(self, x):
        return self.head(self.last(torch.flatten(self.pool(self.first(x)), 1)))


@case({"first": (8, 1), "hidden": (6, 1), "back": (8, 1)}, LAST)
class ChannelsLast(Net):
    def __init__(self):
        super().__init__(hidden=nn.Linear(8, 6), back=nn.Linear(6, 8, bias=False))

    def middle(self, x):
        return self.back(F.gelu(self.hidden(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


@case({"first": (8, 1)}, LAST)
class LayerNormOverChannels(Net):
    def __init__(self):
        super().__init__(norm=nn.LayerNorm(8))

    def middle(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@case({"last": (5, 1)}, {"first": "first is used more than once"})
class UsedTwice(Net):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.last, self.very_last, self.head = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.very_last(self.last(self.first(self.first(x)))).mean((2, 3)))


@case({"wide": (8, 1), "first": (8, 1)}, LAST)
class InPlaceSum(Net):
    """The sum is written into the removable part, which is expanded first if nothing reads it later."""

    def __init__(self):
        super().__init__(wide=nn.Conv2d(3, 8, 1))

    def forward(self, x):
        fixed, out = self.wide(x).cumsum(1), self.first(x)
        out += fixed
        return self.head(self.last(out.relu_()).mean((2, 3)))


@case({}, {"first": "added to fixed channels by add"})
class InPlaceSumSeenTwice(Net):
    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        out = self.first(x)
        view = out.flatten(2)
        out += x.repeat(1, 3, 1, 1)[:, :8]
        return self.head(self.last(view.unflatten(2, (8, 8))).mean((2, 3)))


@case({"first": (8, 1)}, LAST)
class ChannelConvolution(Net):
    """ECA: a gate from a convolution along the channels, in the shape of the tensor that it multiplies."""

    def __init__(self):
        super().__init__(along=nn.Conv1d(1, 1, 3, padding=1))

    def middle(self, x):
        gate = self.along(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1)
        return x * gate.sigmoid().expand_as(x)


@case({"second": (3, 1)}, {"first": "shares its weights", "third": "shares its weights"})
class TiedWeights(Net):
    def __init__(self):
        super().__init__(second=nn.Conv2d(8, 3, 1), third=nn.Conv2d(3, 8, 3, padding=1))
        self.third.weight = self.first.weight

    def middle(self, x):
        return self.third(self.second(x))


@case({"first": (8, 1)}, LAST)
class InPlace(Net):
    """The old name of a tensor is read after the tensor was overwritten."""

    def middle(self, x):
        y = x.flatten(2)
        F.relu_(x)
        x += 2 * y.unflatten(2, (8, 8))
        return x


@case({"first": (8, 1)}, LAST)
class NotZeroInPlace(Net):
    def middle(self, x):
        x.sigmoid_()
        return x


@case({}, {"first": "overwritten by setitem"})
class Overwritten(Net):
    def middle(self, x):
        x[:, :2] = x[:, 2:4].abs()
        return x


@case({"first": (8, 1)}, LAST)
class ConstantsAround(Net):
    def middle(self, x):
        return (2 * x / 3).clamp(-1, 1) - x * torch.linspace(0, 1, 8).reshape(8, 1, 1).to(x)


@case({"first": (8, 1)}, LAST)
class ConstantAdded(Net):
    def middle(self, x):
        return x + 1


@case({}, {"first": "of removed channels would be infinite"})
class Reciprocal(Net):
    def middle(self, x):
        return x.reciprocal()


@case({}, {"first": "divided by channels that would be 0"})
class DividedByChannels(Net):
    def middle(self, x):
        return torch.ones(8, 1, 1).to(x) / x


@case({"first": (8, 1)}, LAST)
class SummedChannels(Net):
    """Zeros add nothing to a sum over the channels, but count in a mean."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(1, 5, 1)

    def middle(self, x):
        return x.sum(1, keepdim=True)


@case({"first": (8, 1), "weigh": (4, 1)}, {"last": "output of the segment"})
class Pairwise(Net):
    """einsum over the channels of two layers."""

    def __init__(self):
        super().__init__(weigh=nn.Conv2d(8, 4, 1), other=nn.Conv2d(8, 4, 1))
        self.last = nn.Linear(64, 5)

    def forward(self, x):
        x = self.first(x)
        a, b = self.weigh(x).flatten(2), self.other(x).flatten(2)
        return self.head(self.last(torch.einsum("bcn,bcm->bnm", a, b).mean(1)))


@case({"first": (8, 1), "mid": (6, 1), "back": (8, 1)}, LAST)
class NormsThatCountChannels(Net):
    """Each of them still counts removed channels."""

    def __init__(self):
        super().__init__(mid=nn.Linear(8, 6), norm=nn.LayerNorm(8), rms=nn.RMSNorm(6), back=nn.Linear(6, 8))
        self.weight, self.bias = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))

    def middle(self, x):
        x = F.group_norm(x, 1, self.weight, self.bias).permute(0, 2, 3, 1)
        x = F.layer_norm(self.norm(x), (8,), self.weight)
        x = self.rms(self.mid(x))
        return x.permute(0, 3, 1, 2)

    def forward(self, x):
        return self.head(self.last(self.back(self.middle(self.first(x)).movedim(1, 3)).movedim(3, 1)).mean((2, 3)))


@case({}, {"first": "would count removed channels that are not 0"})
class LayerNormAfterOffset(Net):
    def __init__(self):
        super().__init__(norm=nn.LayerNorm(8))

    def middle(self, x):
        return self.norm((x + 1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@case({"first": (8, 1)}, LAST)
class MeanOverChannels(Net):
    def middle(self, x):
        return x * torch.sigmoid(x.mean(1, keepdim=True)) - x * x.mean(dim=(1, 2, 3), keepdim=True)


@case({"first": (8, 1)}, LAST)
class MaximumOverChannels(Net):
    def middle(self, x):
        return x * x.amax(1, keepdim=True)


@case({"first": (8, 1)}, LAST)
class TokenMixing(Net):
    """A linear layer along the positions: channels pass through one by one."""

    def __init__(self):
        super().__init__(mix=nn.Linear(64, 64))

    def middle(self, x):
        x = x.flatten(2)
        return (x * self.mix(x)).reshape_as(x).unflatten(2, (8, 8))


# --------------------------------------------------------------------------------- leaf modules that have to be opened


class StandardizedConv(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / w.std((1, 2, 3), keepdim=True), self.bias)


@case({"first": (8, 1), "conv": (8, 1)}, LAST)
class WeightFromAllChannels(Net):
    def __init__(self):
        super().__init__(conv=StandardizedConv(8, 8, 3))

    def middle(self, x):
        return self.conv(x)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ResponseNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(n)), nn.Parameter(torch.ones(n))

    def forward(self, x):
        size = x.norm(p=2, dim=(2, 3), keepdim=True)
        size = size / (size.mean(dim=1, keepdim=True) + 1e-6)
        return x + torch.addcmul(self.bias.view(1, -1, 1, 1), self.weight.view(1, -1, 1, 1), x * size)


class Blur(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.register_buffer("filter", torch.rand(1, 1, 3, 3).repeat(n, 1, 1, 1))

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.filter, stride=2, groups=len(self.filter))


@case({"first": (8, 1)}, LAST)
class ForeignNorms(Net):
    def __init__(self):
        super().__init__(norm=LayerNorm2d(8), grn=ResponseNorm(8), blur=Blur(8))

    def middle(self, x):
        return self.blur(self.grn(self.norm(x)))


class DrawsLots(nn.Module):
    """No two runs agree."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.scale * float(x.sum() > 0)


@case({"first": (8, 1)}, {"last": "output of the segment"})
class NotOpened(Net):
    """Its Python code depends on the values: it stays whole."""

    def __init__(self):
        super().__init__(lots=DrawsLots())

    def middle(self, x):
        return self.lots(x)


# ----------------------------------------------------------------------------------------------------------- attention


class Tokens(nn.Module):
    """Patches, a residual block with attention (3 heads of 4 channels) and an MLP, a head."""

    def __init__(self, **layers):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(12), nn.LayerNorm(12), nn.LayerNorm(12)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.proj = nn.Linear(12, 12)
        self.up, self.down, self.head = nn.Linear(12, 10), nn.Linear(10, 12), nn.Linear(12, 4)

    def attend(self, x):
        raise NotImplementedError

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.proj(self.attend(self.norm1(x)))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm3(x).mean(1))


STREAM = dict.fromkeys(("patches", "proj", "down"), "output of the segment")


@case({"qkv": (3, 12), "up": (10, 1)}, STREAM)
class FusedAttention(Tokens):
    def __init__(self):
        super().__init__(qkv=nn.Linear(12, 36))

    def attend(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)


@case({"query": (3, 4), "up": (10, 1)}, STREAM)
class ExplicitAttention(Tokens):
    """Separate projections, softmax written out, a bias per head from a table."""

    def __init__(self):
        super().__init__(query=nn.Linear(12, 12), key=nn.Linear(12, 12, bias=False), value=nn.Linear(12, 12))
        self.table = nn.Parameter(torch.randn(7, 3))
        self.register_buffer("index", torch.arange(16).reshape(4, 4) % 7, persistent=False)

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v = (part(x).view(b, n, -1, 4).transpose(1, 2) for part in (self.query, self.key, self.value))
        scores = (q * 0.5) @ k.transpose(-2, -1) + self.table[self.index.flatten()].view(4, 4, 3).permute(2, 0, 1)
        x = torch.matmul(F.dropout(scores.softmax(-1), 0.1, self.training), v)
        return x.permute(0, 2, 1, 3).contiguous().flatten(2)


@case({"qkv": (3, 12), "up": (10, 1)}, STREAM)
class NormalizedHeads(Tokens):
    """Norms per head, one scale per head, cosine attention by einsum, in windows."""

    def __init__(self):
        super().__init__(qkv=nn.Linear(12, 36), norm=nn.LayerNorm(4))
        self.scale = nn.Parameter(torch.ones(3, 1, 1))

    def attend(self, x):
        b, n, d = x.shape
        x = x.reshape(b * 2, n // 2, d)
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = torch.einsum("bhnd,bhmd->bhnm", F.normalize(self.norm(q), dim=-1), F.normalize(k, dim=-1)) * self.scale
        x = torch.einsum("bhnm,bhmd->bnhd", scores.softmax(dim=-1), v)
        return x.reshape(b, n, d)


@case({"qkv": (36, 1), "up": (10, 1)}, STREAM)
class OneHead(Tokens):
    """Without heads the scale of the scores depends on the channels, so it receives them in full size."""

    def __init__(self):
        super().__init__(qkv=nn.Linear(12, 36))

    def attend(self, x):
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))


@case({"qkv": (3, 12), "up": (10, 1)}, STREAM)
class ChannelAttention(Tokens):
    """XCiT: attention between the channels of a head."""

    def __init__(self):
        super().__init__(qkv=nn.Linear(12, 36))

    def attend(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 3, 4).permute(2, 0, 3, 4, 1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return (scores.softmax(dim=-1) @ v).permute(0, 3, 1, 2).reshape(b, n, d)


@case({"attention": (3, 12), "attention.out_proj": (12, 1), "up": (10, 1)}, STREAM)
class TorchAttention(Tokens):
    def __init__(self):
        super().__init__(attention=nn.MultiheadAttention(12, 3, batch_first=True))

    def attend(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@case({"attention": (3, 12), "attention.out_proj": (12, 1), "up": (10, 1)}, STREAM)
class TorchAttentionSequenceFirst(Tokens):
    def __init__(self):
        super().__init__(attention=nn.MultiheadAttention(12, 3, bias=False))

    def attend(self, x):
        x = x.transpose(0, 1)
        return self.attention(x, x, x)[0].transpose(0, 1)


@case({"up": (10, 1)}, STREAM)
class CrossAttention(Tokens):
    def __init__(self):
        super().__init__(attention=nn.MultiheadAttention(12, 3, batch_first=True))

    def attend(self, x):
        return self.attention(x, x.flip(1), x)[0]


@case({"patches": (4, 1), "merge": (6, 1), "up": (5, 1)}, {"out": "output of the segment"})
class SecondStage(nn.Module):
    """A separate residual stream after a reduction, as in Swin; it passes through LayerNorms."""

    def __init__(self):
        super().__init__()
        self.patches, self.merge = nn.Conv2d(3, 4, 2, 2), nn.Linear(16, 6, bias=False)
        self.norm0, self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(6), nn.LayerNorm(6)
        self.up, self.down, self.out, self.head = nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.patches(x).permute(0, 2, 3, 1)
        x = torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
        x = self.merge(self.norm0(x))
        x = x + self.down(F.gelu(self.up(self.norm1(x))))
        return self.head(self.out(self.norm2(x).mean((1, 2))))
