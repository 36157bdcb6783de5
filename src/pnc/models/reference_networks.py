"""Reference networks: small classifiers of four kinds, built for any image shape and number of classes."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnc.foundation.errors import InputError

Shape = tuple[int, int, int]


class Normalize(nn.Module):
    """Subtract the mean and divide by the standard deviation of each channel; takes images in [0, 1], (B, C, H, W).

    It is the first step of each reference network, so that all take the same pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((n_channels, 1, 1), 0.5))
        self.register_buffer("std", torch.full((n_channels, 1, 1), 0.25))

    def forward(self, images: Tensor) -> Tensor:
        """Return the normalised images, (B, C, H, W)."""
        return (images - self.mean) / self.std


def _conv_norm(
    n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1, activation: nn.Module | None = None
) -> nn.Sequential:
    conv = nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(n_out)]
    return nn.Sequential(*layers, activation) if activation else nn.Sequential(*layers)


def _pooled_network(input_shape: Shape, n_classes: int, n_features: int, **steps: nn.Module) -> nn.Module:
    """Chain normalisation, the named steps, global average pooling and a linear classifier."""
    network = nn.Sequential(
        OrderedDict(
            normalize=Normalize(input_shape[0]),
            **steps,
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(n_features, n_classes),
        )
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def cnn(input_shape: Shape, n_classes: int, width: float = 1.0) -> nn.Module:
    """Build four 3x3 convolutions with BatchNorm and ReLU, two of stride 2; for images from 8x8 up.

    Args:
        input_shape: (C, H, W).
        n_classes: Number of logits.
        width: Multiple of the channel numbers 32, 32, 64, 128.
    """
    a, b, c = (max(1, round(n * width)) for n in (32, 64, 128))
    return _pooled_network(
        input_shape,
        n_classes,
        c,
        block1=_conv_norm(input_shape[0], a, 3, activation=nn.ReLU()),
        block2=_conv_norm(a, a, 3, activation=nn.ReLU()),
        block3=_conv_norm(a, b, 3, 2, activation=nn.ReLU()),
        block4=_conv_norm(b, c, 3, 2, activation=nn.ReLU()),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut, with a 1x1 convolution on it if the shape changes.

    He et al., 2016 (arXiv:1512.03385), option B. Their option A pads missing channels with zeros: it has no parameters,
    but ties the channels of all stages together, so that none could be removed. B costs 1% more parameters.
    """

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv_norm(n_in, n_out, 3, stride, activation=nn.ReLU())
        self.conv2 = _conv_norm(n_out, n_out, 3)
        self.shortcut = _conv_norm(n_in, n_out, 1, stride) if stride != 1 or n_in != n_out else nn.Identity()
        self.activation = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, n_in, H, W) to (B, n_out, H / stride, W / stride)."""
        out: Tensor = self.activation(self.conv2(self.conv1(features)) + self.shortcut(features))
        return out


def resnet(input_shape: Shape, n_classes: int, n_blocks: int, width: float = 1.0) -> nn.Module:
    """Build the CIFAR network of He et al., 2016, section 4.2: three stages of `n_blocks` basic blocks.

    Args:
        input_shape: (C, H, W).
        n_classes: Number of logits.
        n_blocks: Blocks per stage: 3, 5, 9 for 20, 32, 56 layers.
        width: Multiple of the channel numbers 16, 32, 64.
    """
    widths = [max(1, round(n * width)) for n in (16, 32, 64)]
    steps: dict[str, nn.Module] = {"stem": _conv_norm(input_shape[0], widths[0], 3, activation=nn.ReLU())}
    for stage, n_out in enumerate(widths):
        first = BasicBlock(widths[max(0, stage - 1)], n_out, stride=2 if stage else 1)
        steps[f"stage{stage + 1}"] = nn.Sequential(first, *(BasicBlock(n_out, n_out, 1) for _ in range(n_blocks - 1)))
    return _pooled_network(input_shape, n_classes, widths[-1], **steps)


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, filter each channel by a depthwise 3x3, project by a linear 1x1.

    Sandler et al., 2018 (arXiv:1801.04381). The input is added if the shape stays.
    """

    def __init__(self, n_in: int, n_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        n_hidden = n_in * expansion
        layers: list[nn.Module] = [_conv_norm(n_in, n_hidden, 1, activation=nn.ReLU6())] if expansion != 1 else []
        layers.append(_conv_norm(n_hidden, n_hidden, 3, stride, groups=n_hidden, activation=nn.ReLU6()))
        layers.append(_conv_norm(n_hidden, n_out, 1))
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and n_in == n_out

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, n_in, H, W) to (B, n_out, H / stride, W / stride)."""
        out: Tensor = self.layers(features)
        return features + out if self.residual else out


def mobilenetv2(input_shape: Shape, n_classes: int, width: float = 1.0) -> nn.Module:
    """Build MobileNetV2 for small images: as published, but stride 1 in the stem and the second stage (32x32 -> 4x4).

    Args:
        input_shape: (C, H, W).
        n_classes: Number of logits.
        width: Multiple of the channel numbers, rounded to multiples of 8.
    """

    def scaled(n_channels: int) -> int:
        return max(8, round(n_channels * width / 8) * 8)

    n_in = scaled(32)
    steps: dict[str, nn.Module] = {"stem": _conv_norm(input_shape[0], n_in, 3, activation=nn.ReLU6())}
    stages = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for stage, (expansion, n_channels, n_blocks, stride) in enumerate(stages, start=1):
        n_out = scaled(n_channels)
        first = InvertedResidual(n_in, n_out, stride, expansion)
        rest = (InvertedResidual(n_out, n_out, 1, expansion) for _ in range(n_blocks - 1))
        steps[f"stage{stage}"] = nn.Sequential(first, *rest)
        n_in = n_out
    steps["last"] = _conv_norm(n_in, scaled(1280), 1, activation=nn.ReLU6())
    return _pooled_network(input_shape, n_classes, scaled(1280), **steps)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, N, D)."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of the same shape, (B, N, D)."""
        batch, n_tokens, dim = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, n_tokens, 3, self.n_heads, dim // self.n_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, D / heads)
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2).reshape(batch, n_tokens, dim)
        out: Tensor = self.out(mixed)
        return out


class TransformerBlock(nn.Module):
    """Attention and a two-layer perceptron, each after a LayerNorm and added to its input."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, n_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of the same shape, (B, N, D)."""
        tokens = tokens + self.attention(self.norm1(tokens))
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


class VisionTransformer(nn.Module):
    """Transformer over image patches with a class token and learned positions; pre-norm.

    Dosovitskiy et al., 2021 (arXiv:2010.11929), with a perceptron of twice the token size instead of four times.
    """

    def __init__(self, input_shape: Shape, n_classes: int, patch: int, dim: int, depth: int, n_heads: int) -> None:
        # Six arguments: each is a published size of the architecture.
        super().__init__()
        n_channels, height, width = input_shape
        self.normalize = Normalize(n_channels)
        self.patches = nn.Conv2d(n_channels, dim, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, (height // patch) * (width // patch) + 1, dim).normal_(std=0.02))
        self.blocks = nn.Sequential(*(TransformerBlock(dim, n_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, n_classes)."""
        tokens = self.patches(self.normalize(images)).flatten(2).transpose(1, 2)  # (B, N, D)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), tokens], dim=1) + self.positions
        logits: Tensor = self.classifier(self.norm(self.blocks(tokens))[:, 0])
        return logits


def vit_tiny(
    input_shape: Shape, n_classes: int, patch: int = 0, dim: int = 128, depth: int = 6, n_heads: int = 4
) -> nn.Module:
    """Build a small vision transformer.

    Args:
        input_shape: (C, H, W).
        n_classes: Number of logits.
        patch: Side of a patch in pixels; 0 takes the smallest that gives at most 8x8 patches, or else the largest that
            tiles the image.
        dim: Size of a token.
        depth: Number of blocks.
        n_heads: Attention heads per block; must divide `dim`.

    Raises:
        InputError: `patch` does not divide the image, or `n_heads` not `dim`.
    """
    _, height, width = input_shape
    if not patch:
        common = [side for side in range(1, min(height, width) + 1) if height % side == 0 and width % side == 0]
        patch = next((side for side in common if max(height, width) <= 8 * side), common[-1])
    if height % patch or width % patch:
        raise InputError(
            f"patch: patches of {patch}x{patch} do not tile images of {height}x{width}; choose another side"
        )
    if dim % n_heads:
        raise InputError(f"n_heads: {n_heads} heads do not divide a token of {dim}; choose another number")
    return VisionTransformer(input_shape, n_classes, patch, dim, depth, n_heads)
