from functools import partial

import pytest
import torch
from torch import nn

from pnc.foundation.errors import InputError
from pnc.models.reference_networks import BasicBlock, InvertedResidual, Normalize, cnn, mobilenetv2, resnet, vit_tiny

BUILDERS = {
    "cnn": cnn,
    "resnet20": partial(resnet, n_blocks=3),
    "mobilenetv2": partial(mobilenetv2, width=0.25),
    "vit_tiny": partial(vit_tiny, dim=32, depth=2),
}


def n_params(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 24, 40)])
def test_every_network_takes_images_of_any_size_from_8x8(name: str, shape: tuple[int, int, int]) -> None:
    network = BUILDERS[name](shape, 7).eval()
    with torch.no_grad():
        logits = network(torch.rand(2, *shape))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", BUILDERS)
def test_every_part_of_a_network_is_trained(name: str) -> None:
    network = BUILDERS[name]((3, 16, 16), 3)
    network(torch.rand(4, 3, 16, 16)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


@pytest.mark.parametrize("name", BUILDERS)
def test_normalization_comes_first(name: str) -> None:
    """Scaled pixels with a matching normalisation give the same logits."""
    torch.manual_seed(0)
    network = BUILDERS[name]((3, 8, 8), 3).eval()
    images = torch.rand(2, 3, 8, 8)
    before = network(images)
    normalize = next(module for module in network.modules() if isinstance(module, Normalize))
    normalize.mean *= 4
    normalize.std *= 4
    assert torch.equal(network(images * 4), before)  # exact: a power of two scales without rounding


# The counts that the architectures are published with: ResNet-20 with 1x1 shortcuts (0.27 M), MobileNetV2 without its
# classifier (2,223,872)
def test_parameter_counts() -> None:
    assert n_params(resnet((3, 32, 32), 10, n_blocks=3)) == 272_474
    assert n_params(mobilenetv2((3, 32, 32), 10)) == 2_223_872 + 1_280 * 10 + 10


def test_resnets_have_the_depth_that_they_are_named_for() -> None:
    for n_blocks, depth in ((3, 20), (5, 32), (9, 56)):
        network = resnet((3, 8, 8), 2, n_blocks)
        kernels = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert len(kernels) + 1 == depth


def test_width_multiplies_the_channels() -> None:
    assert resnet((3, 8, 8), 2, 1, width=2).get_submodule("stem.0").weight.shape[0] == 32
    assert cnn((1, 8, 8), 2, width=0.5).get_submodule("block4.0").weight.shape[:2] == (64, 32)
    assert mobilenetv2((1, 8, 8), 2, width=0.5).get_submodule("classifier").weight.shape[1] == 640


def test_a_basic_block_adds_its_input() -> None:
    block = BasicBlock(4, 4, 1).eval()
    nn.init.zeros_(block.conv2[0].weight)
    features = torch.rand(2, 4, 3, 3)
    assert torch.equal(block(features), features)
    assert BasicBlock(4, 8, 2)(features).shape == (2, 8, 2, 2)


def test_an_inverted_residual_adds_its_input_only_where_the_shape_is_kept() -> None:
    features = torch.rand(2, 4, 3, 3)
    for n_out, stride, kept in ((4, 1, True), (4, 2, False), (6, 1, False)):
        block = InvertedResidual(4, n_out, stride, 2).eval()
        nn.init.zeros_(block.layers[-1][0].weight)
        out = block(features)
        assert torch.equal(out, features) if kept else not out.any()


@pytest.mark.parametrize(
    ("shape", "n_tokens"), [((1, 8, 8), 64), ((1, 28, 28), 49), ((3, 32, 32), 64), ((3, 24, 40), 15), ((1, 29, 29), 1)]
)
def test_patches_cut_the_image_into_at_most_8x8(shape: tuple[int, int, int], n_tokens: int) -> None:
    network = vit_tiny(shape, 2, dim=8, depth=1)
    assert network.get_parameter("positions").shape == (1, n_tokens + 1, 8)


def test_a_transformer_mixes_tokens_by_softmax_of_scaled_products() -> None:
    torch.manual_seed(0)
    attention = vit_tiny((1, 8, 8), 2, dim=8, depth=1, n_heads=2).get_submodule("blocks.0.attention").double()
    tokens = torch.randn(2, 5, 8, dtype=torch.float64)
    query, key, value = attention.qkv(tokens).split(8, dim=2)  # type: ignore[operator]
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = query[..., part] @ key[..., part].transpose(1, 2) / 2
        heads.append(scores.softmax(2) @ value[..., part])
    expected = attention.out(torch.cat(heads, 2))  # type: ignore[operator]
    # another order of summation
    torch.testing.assert_close(attention(tokens), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 3}, "patches of 3x3 do not tile images of 32x32"),
        ({"n_heads": 5}, "5 heads do not divide a token of 128"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        vit_tiny((3, 32, 32), 2, **options)
