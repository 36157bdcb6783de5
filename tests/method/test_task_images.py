"""Images of a task: within the range that the networks declare, and fit to learn from."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import pnc
from pnc.data.image_range import image_range
from pnc.data.image_store import ImageStore
from pnc.foundation.errors import InputError, PNCWarning
from pnc.method.task import prepare_task

NAMES: dict[str, Any] = {"source_classes": ["c", "d"], "base_classes": ["a", "b"]}


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()


def wrapped() -> nn.Module:
    return pnc.Preprocessed(net(), (3, 8, 8), 0.5, 0.25).eval()


def support(low: float, high: float) -> tuple[torch.Tensor, list[str]]:
    images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images.flatten()[:2] = torch.tensor([0.0, 1.0])
    return images * (high - low) + low, list("abcd") * 4


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (0, 255, r"values lie in \[0, 255\], but .* takes images in \[0, 1\]; give images / 255"),
        (-2.1, 2.6, r"values lie in \[-2.1, 2.6\], but .*; give them before any normalisation"),
        (-1, 1, r"values lie in \[-1, 1\]"),
        (0, 1.1, r"values lie in \[0, 1.1\]"),
        (-0.01, 1, ".* before any normalisation"),
    ],
)
@pytest.mark.parametrize("role", ["source", "target"])
def test_images_out_of_range_are_refused_before_the_work(role: str, low: float, high: float, message: str) -> None:
    networks = {"source": net(), "target": net(), role: wrapped()}
    data = support(low, high)
    for given in (data, torch.utils.data.DataLoader(list(zip(*data, strict=True)), batch_size=5)):  # type: ignore[arg-type]
        with pytest.raises(InputError, match=f"support: {message}") as caught:
            prepare_task(**networks, support=given, classes=None, **NAMES)
        assert f"but {role} does its own preprocessing" in str(caught.value)
    with pytest.raises(InputError, match=r"background: values lie in"):
        prepare_task(**networks, support=support(0, 1), classes=None, background=data[0], **NAMES)


def test_images_in_range_and_networks_without_a_range_are_accepted() -> None:
    pixels = (support(0, 1)[0] * 255).byte()
    for images in (support(0, 1)[0], support(-1e-4, 1 + 1e-4)[0], pixels):
        prepare_task(wrapped(), net(), (images, list("abcd") * 4), classes=None, **NAMES)
    prepare_task(net(), net(), support(-2, 2), classes=None, **NAMES)


def test_the_outermost_network_decides() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = wrapped()

        def forward(self, images: torch.Tensor) -> Any:
            return self.inner(images / 255)

    for inside in (wrapped(), nn.DataParallel(wrapped()), nn.Sequential(wrapped(), nn.Identity())):
        assert image_range(inside) == (0.0, 1.0)
    for other in (net(), Scaled(), nn.Sequential(nn.Identity(), wrapped())):
        assert image_range(other) is None


def test_a_store_knows_the_range_of_what_came_in_floating_point() -> None:
    store = ImageStore(2**30)
    store.add(torch.full((1, 1, 2, 2), 200, dtype=torch.uint8))
    assert store.value_range == (0.0, 1.0)
    store.add(torch.tensor([0.5, -3.0, 2.0, 0.0]).reshape(1, 1, 2, 2))
    store.keep(torch.full((1, 1, 2, 2), 2.5))
    assert store.value_range == (-3.0, 2.5)


@pytest.fixture(scope="module")
def composite() -> pnc.Composite:
    torch.manual_seed(0)
    target = wrapped()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # networks with random weights
        return pnc.attach(target, pnc.clone(net(), target, support(0, 1), effort="seconds", **NAMES))


@pytest.mark.parametrize("images", [support(0, 255)[0], support(-2, 2)[0], support(0, 1)[0] + 0.5])
def test_a_composite_refuses_images_outside_its_targets_range(composite: pnc.Composite, images: torch.Tensor) -> None:
    labelled = images, list("abcd") * 4
    for call in (
        lambda: composite(images),
        lambda: pnc.calibrate(composite, labelled),
    ):
        with pytest.raises(InputError, match="images: values lie in .*, but the target does its own preprocessing"):
            call()


def test_a_composite_gives_the_targets_bits_in_range_and_if_values_cannot_be_read(composite: pnc.Composite) -> None:
    images = support(0, 1)[0]
    assert torch.equal(composite(images)[:, :2], composite.target(images))
    assert composite(images[:0]).shape == (0, 4)
    assert composite.verify().ok
    program = torch.export.export(composite, (images,)).module()
    assert torch.equal(program(images), composite(images))
    data = images[:12], list("abc") * 4
    assert prepare_task(composite, net(), data, classes=["c"], source_classes=list("abcd"), base_classes=list("ab"))


# --------------------------------------------------------------------------------------------------- doubts
def test_a_degenerate_support_is_one_warning_with_figures() -> None:
    images, labels = support(0, 1)
    images[0::4] = images[0]
    images[3::4] = 0
    images[1] = images[2]
    with pytest.warns(PNCWarning) as caught:
        prepare_task(net(), net(), (images, labels), classes=None, **NAMES)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert text.startswith(
        "support: all 4 images of 'a' are equal; all 4 images of 'd' are equal; one image is in two "
    )
    assert text.endswith("such as numbers 1 (b) and 2 (c); were the images read correctly?")


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_equal_images_are_one_warning(value: float) -> None:
    with pytest.warns(PNCWarning, match="support: all 16 images are equal; were the images read correctly"):
        prepare_task(net(), net(), (torch.full((16, 3, 8, 8), value), list("abcd") * 4), classes=None, **NAMES)
