"""Labelled images in other containers than pairs of tensors: read if unambiguous, else refused with a way out."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

import pnc
from pnc.data.image_store import ImageStore
from pnc.data.support import as_support, doubts
from pnc.foundation.errors import ClassNameError, InputError

NAMES = ("ant", "bee", "cat", "dog")
IMAGES = torch.arange(8.0).reshape(4, 1, 1, 2)
IDS = torch.tensor([0, 1, 1, 2])
ONE_HOT = torch.nn.functional.one_hot(IDS, 4)


class Rows(Dataset[Any]):
    """Returns the items of a list; may have any attributes."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items = items
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def rows(key: str = "image", label: str = "label", **attributes: Any) -> Rows:
    pairs = zip(IMAGES, IDS.tolist(), strict=True)
    return Rows([{key: image, label: one, "id": "x"} for image, one in pairs], **attributes)


@pytest.mark.parametrize(
    "data",
    [
        (IMAGES, ONE_HOT),
        (IMAGES, ONE_HOT.float()),
        (IMAGES, ONE_HOT.bool()),
        (IMAGES, ONE_HOT.numpy()),
        (IMAGES, list(ONE_HOT)),
        (list(IMAGES), IDS),
        (tuple(IMAGES), IDS.tolist()),
        [list(IMAGES), ["ant", "bee", "bee", "cat"]],
        list(zip(IMAGES, IDS.tolist(), strict=True)),
        tuple(zip(IMAGES, ("ant", "bee", "bee", "cat"), strict=True)),
        {"image": IMAGES, "label": IDS},
        {"pixel_values": IMAGES, "labels": IDS},
        {"images": list(IMAGES), "labels": ONE_HOT},
        rows(),
        rows("pixel_values", "labels"),
        rows("img", "fine_label"),
        DataLoader(rows(), batch_size=3),
        TensorDataset(IMAGES, ONE_HOT),
        DataLoader(TensorDataset(IMAGES, ONE_HOT), batch_size=3),
    ],
)
def test_other_ways_to_hold_samples_give_the_same_support(data: Any) -> None:
    support = as_support(data, NAMES)
    assert torch.equal(support.images, IMAGES)
    assert torch.equal(support.labels, IDS)


def test_uint8_is_divided_wherever_it_comes_from() -> None:
    pixels = torch.full((2, 1, 2, 2), 51, dtype=torch.uint8)
    for data in ((pixels, [0, 1]), (list(pixels), [0, 1]), {"image": pixels, "label": [0, 1]}):
        assert torch.equal(as_support(data, NAMES).images, torch.full((2, 1, 2, 2), 0.2))


def test_data_sets_of_datasets_are_read_through_a_loader_by_their_own_names() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["yak", "ant"]))
    pictures = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (0, 255)]
    table = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1]}, features=features)
    with pytest.raises(InputError, match=r"got datasets.Dataset; pass .*DataLoader\(data.with_format\('torch'\)"):
        as_support(table, NAMES)
    support = as_support(DataLoader(table.with_format("torch"), batch_size=2), NAMES)
    assert (support.names, support.labels.tolist()) == (("yak", "ant"), [0, 1])
    assert support.images[1].flatten(1).mean(1).tolist() == [1, 0, 0]


PICTURE = Image.new("RGB", (4, 4))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (([PICTURE] * 4, IDS), r"got a Pillow image; add transform=torchvision.transforms.ToTensor\(\)"),
        (Rows([(PICTURE, 0)]), "got a Pillow image; add transform="),
        ((IMAGES.numpy(), IDS), r"got ndarray; use torch.from_numpy\(images\)"),
        ([(PICTURE, 0), (PICTURE, 1)], "got a Pillow image; add transform="),
        ([(IMAGES[0], 0), IMAGES[1]], r"every item must be a pair \(image, label\), got Tensor"),
        (([torch.zeros(1, 2, 2), torch.zeros(1, 3, 3)], [0, 1]), "2 shapes, .*; give all one shape"),
        ((IMAGES, IDS.float()), r"got 0.0; use labels.long\(\)"),
        ((IMAGES, torch.full((4, 4), 0.25)), r"must be zeros with a single one; .* labels.argmax\(1\)"),
        ((IMAGES, ONE_HOT * 2), "must be zeros with a single one"),
        ((IMAGES, torch.ones(4, 2)), "must be zeros with a single one"),
        ((IMAGES, IDS[:, None]), r"labels.flatten\(\) if there is one column"),
        ((IMAGES, ONE_HOT[:, :3]), "rows of 3 columns, but there are 4 class names"),
        ({"image": IMAGES}, "one of the keys label, labels, fine_label, got image"),
        ({"image": IMAGES, "img": IMAGES, "label": IDS}, "a dictionary must have one of the keys image, images"),
        (Rows([{"x": IMAGES[0], "y": 0}]), r"got x, y; give pairs \(item\[KEY\], item\[KEY\]\)"),
        ((IMAGES, [2**70] * 4), "label ids must fit in int64"),
    ],
)
def test_what_is_ambiguous_is_refused_with_the_line_that_mends_it(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_support(data, NAMES)


# --------------------------------------------------------------------------------------------------- what ids mean
def pairs(**attributes: Any) -> Rows:
    return Rows(list(zip(IMAGES, IDS.tolist(), strict=True)), **attributes)


@pytest.mark.parametrize("classes", [4, lambda: list("abcd"), None, 4.0, "abcd", torch.nn.Identity()])
def test_a_dataset_whose_classes_are_no_names_is_read_by_the_names_given(classes: Any) -> None:
    data = pairs(classes=classes)
    for one in (data, Subset(data, range(4)), DataLoader(data), ConcatDataset([data, data])):
        assert as_support(one, NAMES).names == NAMES


@pytest.mark.parametrize(
    "classes", [{"yak": 1, "emu": 0, "gnu": 2}, {0: "emu", 1: "yak", 2: "gnu"}, np.array(["emu", "yak", "gnu"])]
)
def test_classes_of_a_dataset_may_be_mappings(classes: Any) -> None:
    data = pairs(classes=classes)
    for one in (data, ConcatDataset([data, Subset(data, [0])])):
        assert as_support(one, NAMES).names == ("emu", "yak", "gnu")


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        (
            [("tench", "Tinca tinca"), ("goldfish",)],
            InputError,
            "of Rows must name the ids, but contains tuple",
        ),
        ([["a"], ["b"]], InputError, "contains list, not names; set it to a list of names"),
        ([0, 1, 2], InputError, "contains int, not names"),
        ([], InputError, "contains nothing"),
        ({"a", "b", "c"}, ClassNameError, "a set has no order"),
        (["a", "a", "b"], ClassNameError, "a given twice"),
        (["a", "b"], InputError, "ids must lie in 0-1"),
    ],
)
def test_classes_that_say_something_else_are_refused(classes: Any, error: Any, message: str) -> None:
    data = pairs(classes=classes)
    for one in (data, DataLoader(data), ConcatDataset([data] * 2)):
        with pytest.raises(error, match=message):
            as_support(one, NAMES)


# --------------------------------------------------------------------------------------------------- degenerate
def found(images: torch.Tensor, labels: list[int]) -> list[str]:
    store = ImageStore(2**30)
    store.keep(images)
    return doubts(store, torch.tensor(labels), NAMES)


def some(n: int) -> torch.Tensor:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def test_a_support_of_different_images_is_not_doubted() -> None:
    assert found(some(8), [0, 0, 1, 1, 2, 2, 3, 3]) == []
    assert found((some(8) * 255).byte(), [0] * 8) == []
    assert found(some(1), [0]) == []


def test_doubts_have_figures() -> None:
    assert found(some(1).expand(6, -1, -1, -1), [0, 0, 1, 1, 2, 2]) == ["all 6 images are equal"]
    assert found(torch.zeros(3, 1, 4, 4), [0, 1, 2]) == ["all 3 images are equal"]
    images = some(8)
    images[2:4] = images[2]
    assert found(images, [0, 0, 1, 1, 2, 2, 3, 3]) == ["all 2 images of 'bee' are equal"]
    images = some(8)
    images[5:7] = 0
    assert found(images, [0, 0, 1, 1, 2, 2, 2, 2]) == ["2 of 4 images of 'cat' are black"]
    images = some(4)
    images[3] = 0
    assert found(images, [0, 1, 2, 3]) == ["1 of 1 images of 'dog' are black"]
    assert found(images, [0, 1, 2, 2]) == []
    images = some(8)
    images[7], images[6] = images[0], images[1]
    text = "2 images are in two classes, such as numbers 1 (ant) and 6 (dog)"
    assert found(images, [0, 0, 1, 1, 2, 2, 3, 3]) == [text]


def test_public_functions_take_what_is_read_here() -> None:
    assert isinstance(as_support((IMAGES, ONE_HOT), NAMES), pnc.Support)
