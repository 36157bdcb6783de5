"""Class names from mappings and other collections; tests/data/test_support.py tests lists of names."""

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

from pnc.data.image_set import ImageSet, class_subset, relabel
from pnc.data.support import Support, as_support, draw_support
from pnc.foundation.class_names import check_class_names, class_ids
from pnc.foundation.errors import ClassNameError
from pnc.models.model_specs import build_model

ORDER = ("Sandal", "Bag", "Shirt")


@pytest.mark.parametrize(
    "names",
    [
        {"0": "Sandal", "1": "Bag", "2": "Shirt"},
        {2: "Shirt", 0: "Sandal", 1: "Bag"},
        {"2": "Shirt", "1": "Bag", "0": "Sandal"},
        {np.int64(1): "Bag", np.int64(0): "Sandal", np.int64(2): "Shirt"},
        {"Bag": 1, "Sandal": 0, "Shirt": 2},
        OrderedDict(Shirt=2, Bag=1, Sandal=0),
        {"Shirt": np.int64(2), "Bag": np.int64(1), "Sandal": np.int64(0)},
        np.array(ORDER),
        iter(ORDER),
        dict.fromkeys(ORDER).keys(),
    ],
    ids=lambda names: type(names).__name__,
)
def test_names_are_read_by_their_ids_whatever_holds_them(names: Any) -> None:
    found = check_class_names(names, "classes")
    assert found == ORDER
    assert {type(name) for name in found} == {str}


def test_names_that_are_numbers_are_told_from_ids() -> None:
    assert check_class_names({"7": 1, "3": 0}, "x") == ("3", "7")
    assert check_class_names({0: "7", 1: "3"}, "x") == ("7", "3")
    assert check_class_names({"0": "1", "1": "0"}, "x") == ("1", "0")
    assert check_class_names({str(n): f"c{n}" for n in range(12)}, "x")[10] == "c10"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"Sandal", "Bag"}, "source_classes: a set has no order; give a list"),
        (frozenset(ORDER), "a set has no order"),
        ({0: "Sandal", 2: "Bag"}, "the ids of 2 classes are 0 to 1; 1 is missing"),
        ({1: "Sandal", 2: "Bag"}, "0 is missing"),
        ({"Sandal": 0, "Bag": 0}, "0 appears twice"),
        ({0: "a", "0": "b"}, "0 appears twice"),
        ({"Sandal": 0, "Bag": 5}, "1 is missing"),
        ({0: "Sandal", 1: "Sandal"}, "Sandal given twice"),
        ({"Sandal": "0"}, "a mapping must be {id: name} or {name: id}, got {'Sandal': '0'}"),
        ({"Sandal": True}, "a mapping must be"),
        ({0.5: "Sandal"}, "a mapping must be"),
        ({0: 1, 1: 0}, "class names are non-empty strings, got 1"),
        ({}, "at least one class name, got none"),
        (4, "expected a sequence of class names, got int; give a list"),
        (None, "got NoneType"),
        (torch.tensor([1]), "class names are non-empty strings"),
    ],
)
def test_collections_that_give_no_order_are_refused(names: Any, message: str) -> None:
    with pytest.raises(ClassNameError) as caught:
        check_class_names(names, "source_classes")
    assert message in str(caught.value)


def test_every_place_that_takes_names_takes_mappings() -> None:
    by_id: Any = {1: "Bag", 0: "Sandal"}
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 1, 0])
    data = ImageSet(images, labels, by_id)
    assert data.classes == Support(images, labels, by_id).names == ("Sandal", "Bag")
    assert as_support((images, labels), by_id).names == ("Sandal", "Bag")
    assert relabel(data, {"Bag": 0, "Sandal": 1}).labels.tolist() == [1, 0, 0, 1]  # type: ignore[arg-type]
    assert class_subset(data, {0: "Bag"}).classes == ("Bag",)  # type: ignore[arg-type]
    assert class_ids(by_id, ORDER) == [0, 1]
    drawn = draw_support(data, {0: "Bag"}, {0: "Sandal"}, 1, 1, torch.Generator())  # type: ignore[arg-type]
    assert drawn.names == ("Sandal", "Bag")
    assert build_model("zoo:cnn?width=0.25", {"b": 1, "a": 0}, (1, 8, 8)).classes == ("a", "b")  # type: ignore[arg-type]


class Series:
    """Stands for a Series of pandas: values with an index."""

    def __init__(self, values, index):
        self.values, self.index = values, index

    def __iter__(self):
        return iter(self.values)

    def to_dict(self):
        return dict(zip(self.index, self.values, strict=True))


def test_a_series_is_read_by_its_index():
    assert check_class_names(Series(["elk", "dog"], [1, 0]), "classes") == ("dog", "elk")
    assert check_class_names(Series([1, 0], ["elk", "dog"]), "classes") == ("dog", "elk")
    with pytest.raises(ClassNameError, match="1 appears twice"):
        check_class_names(Series([1, 1], ["elk", "dog"]), "classes")
