import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from pnc.data.image_set import ImageSet, class_subset, images_as_float, relabel, sample_per_class, select
from pnc.data.support import Support, as_support, draw_support
from pnc.foundation.class_names import check_class_names, class_ids, listed, parse_classes
from pnc.foundation.errors import ClassNameError, InputError

NAMES = ("ant", "bee", "cat", "dog")


def image_set(labels: list[int], names: tuple[str, ...] = NAMES) -> ImageSet:
    """Make images that have their own number in every pixel."""
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2).clone()
    return ImageSet(images, torch.tensor(labels), names)


def numbers(data: ImageSet) -> list[int]:
    return data.images[:, 0, 0, 0].tolist()


# ------------------------------------------------------------------------------------------------ class names
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cat", "the one string 'cat'"),
        ([], "at least one"),
        (["cat", ""], "non-empty strings, got ''"),
        ([1, 2], "got 1; pass names, not ids"),
        (["cat", "dog", "cat"], "new_classes: cat given twice"),
    ],
)
def test_bad_class_names_are_refused(names: Any, message: str) -> None:
    with pytest.raises(ClassNameError, match=re.escape(message)):
        check_class_names(names, "new_classes")


def test_class_ids_follow_the_order_asked_for() -> None:
    assert class_ids(["dog", "ant"], NAMES) == [3, 0]


def test_an_unknown_class_is_answered_with_the_nearest_name_and_all_names() -> None:
    with pytest.raises(ClassNameError, match=r"no class 'cta' \(did you mean 'cat'\?\); there are ant, bee, cat, dog"):
        class_ids(["cta"], NAMES)


def test_long_lists_are_cut() -> None:
    assert listed(["a", "b", "c"], 2) == "a, b, ... (3 in all)"
    assert listed(["a", "b"], 2) == "a, b"
    assert listed([]) == "none"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat", ("cat",)),
        (" dog , ant", ("dog", "ant")),
        ("0-2", ("ant", "bee", "cat")),
        ("3,0", ("dog", "ant")),
        ("1 - 2,dog,", ("bee", "cat", "dog")),
    ],
)
def test_parse_classes(text: str, expected: tuple[str, ...]) -> None:
    assert parse_classes(text, NAMES) == expected


def test_names_win_over_indices() -> None:
    assert parse_classes("1,2-3", ["3", "2", "1", "2-3"]) == ("1", "2-3")


def test_where_names_are_numbers_numbers_are_names() -> None:
    known = ["9", "7", "8", "6", "other"]
    assert parse_classes("7-9,6", known) == ("7", "8", "9", "6")
    for text, missing in (("4", "4"), ("6-12", "10"), ("0-99999999999", "0"), ("8-7", "8-7")):
        with pytest.raises(ClassNameError, match=f"there is no class '{missing}'"):
            parse_classes(text, known)


def test_names_with_commas() -> None:
    known = ["tench, Tinca tinca", "goldfish", "tench"]
    assert parse_classes("goldfish, tench, Tinca tinca", known) == ("goldfish", "tench, Tinca tinca")
    assert parse_classes("tench,goldfish", known) == ("tench", "goldfish")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cow", "there is no class 'cow'"),
        ("0-4", "'0-4' is not a range within 0-3; the classes are ant, bee, cat, dog"),
        ("2-1", "'2-1' is not a range"),
        ("7", "'7' is not a range"),
        ("cat,2", "cat given twice"),
        (" , ", "at least one"),
    ],
)
def test_bad_class_lists_are_refused(text: str, message: str) -> None:
    with pytest.raises(ClassNameError, match=re.escape(message)):
        parse_classes(text, NAMES)


@given(st.lists(st.text("ab0-9, ", min_size=1).map(str.strip).filter(bool), min_size=1, unique=True))
def test_one_name_alone_always_means_itself(names: list[str]) -> None:
    for name in names:
        assert parse_classes(name, names) == (name,)


# ------------------------------------------------------------------------------------------------ image sets
@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 4), [0, 0], "expected a non-empty tensor (N, C, H, W), got (2, 3, 4)"),
        (torch.zeros(0, 1, 2, 2), [], "expected a non-empty tensor"),
        (np.zeros((2, 1, 2, 2)), [0, 0], "got ndarray"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.int32), [0, 0], "expected uint8 or floating point, got torch.int32"),
        (torch.full((2, 1, 2, 2), 1.5), [0, 0], "must lie in [0, 1], these lie in [1.5, 1.5]"),
        (
            torch.tensor([0.0, float("nan")])[:, None, None, None],
            [0, 0],
            "1 of 2 hold NaN or infinity, first at index 1",
        ),
        (torch.zeros(2, 1, 2, 2), [0, 4], "ids must lie in 0-3 (4 class names), these lie in 0-4"),
        (torch.zeros(2, 1, 2, 2), [-1, 0], "these lie in -1-0"),
        (torch.zeros(2, 1, 2, 2), [0], "labels: there are 1 for 2 images; give one for each"),
        (torch.zeros(2, 1, 2, 2), [0.0, 1.0], "got torch.float32 (2,)"),
    ],
)
def test_bad_image_sets_are_refused(images: Any, labels: list[float], message: str) -> None:
    dtype = torch.int64 if not labels else None
    with pytest.raises(InputError, match=re.escape(message)):
        ImageSet(images, torch.tensor(labels, dtype=dtype), NAMES)


def test_an_image_set_knows_its_counts_and_shape() -> None:
    data = image_set([0, 3, 3, 1])
    assert len(data) == 4
    assert data.counts() == {"ant": 1, "bee": 1, "cat": 0, "dog": 2}
    assert data.input_shape == (1, 2, 2)


def test_pixels_become_floats_in_the_unit_range() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert torch.equal(images_as_float(pixels), torch.tensor([0.0, 0.2, 1.0]))
    assert images_as_float(torch.zeros(1, dtype=torch.float64)).dtype == torch.float32
    kept = torch.rand(3)
    assert images_as_float(kept) is kept


def test_class_subset_keeps_the_order_of_the_images() -> None:
    subset = class_subset(image_set([0, 1, 2, 3, 2, 0]), ["cat", "ant"])
    assert subset.classes == ("cat", "ant")
    assert numbers(subset) == [0, 2, 4, 5]
    assert subset.labels.tolist() == [1, 0, 0, 1]


def test_class_subset_without_images_is_refused() -> None:
    with pytest.raises(InputError, match="no image of dog"):
        class_subset(image_set([0, 1]), ["dog"])


def test_relabel_matches_by_name() -> None:
    data = relabel(image_set([0, 1, 1]), ["bee", "yak", "ant"])
    assert data.labels.tolist() == [2, 0, 0]
    with pytest.raises(ClassNameError, match="bee missing, but the data has images of it"):
        relabel(image_set([0, 1]), ["ant"])


def test_select_takes_indices_in_order() -> None:
    assert numbers(select(image_set([0, 1, 2]), torch.tensor([2, 0]))) == [2, 0]


def test_sample_per_class_takes_the_first_the_last_or_all() -> None:
    data = image_set([0, 1, 0, 1, 0], ("ant", "bee"))
    assert numbers(sample_per_class(data, 2, "first")) == [0, 2, 1, 3]
    assert numbers(sample_per_class(data, 1, "last")) == [4, 3]
    assert numbers(sample_per_class(data, None)) == [0, 2, 4, 1, 3]


def test_a_random_draw_repeats_with_its_seed_and_has_no_sample_twice() -> None:
    data = image_set([0] * 50 + [1] * 50, ("ant", "bee"))
    first, again, other = (
        numbers(sample_per_class(data, 20, generator=torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(set(first)) == 40
    assert all(number < 50 for number in first[:20]) and all(number >= 50 for number in first[20:])


@pytest.mark.parametrize(
    ("n_samples", "message"),
    [(2, "asked for 2 images of class 'bee', which has 1"), (0, "asked for 0 images of class 'ant', which has 2")],
)
def test_too_few_images_are_refused(n_samples: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sample_per_class(image_set([0, 0, 1], ("ant", "bee")), n_samples, "first")


def test_a_draw_of_too_many_images_names_the_number_that_is_too_large() -> None:
    data = image_set([0, 0, 1], ("ant", "bee"))
    with pytest.raises(InputError, match="n_new: asked for 2 images of class 'bee', which has 1"):
        draw_support(data, ["bee"], ["ant"], 2, 1)
    with pytest.raises(InputError, match="n_base: asked for 3 images of class 'ant', which has 2"):
        draw_support(data, ["bee"], ["ant"], 1, 3)


def test_a_random_draw_needs_a_generator() -> None:
    with pytest.raises(InputError, match="generator: a random draw needs one"):
        sample_per_class(image_set([0], ("ant",)), 1)


# ------------------------------------------------------------------------------------------------ support
IMAGES = torch.arange(8.0).reshape(4, 1, 1, 2)
IDS = torch.tensor([0, 1, 1, 2])
LABEL_NAMES = ["ant", "bee", "bee", "cat"]


class Pairs(Dataset[Any]):
    def __init__(self, labels: list[Any], classes: list[str] | None = None) -> None:
        self.labels = labels
        if classes is not None:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        return IMAGES[index], self.labels[index]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[torch.Tensor, str]]:
        return iter(zip(IMAGES, LABEL_NAMES, strict=True))


@pytest.mark.parametrize(
    "data",
    [
        (IMAGES, IDS),
        [IMAGES, IDS.to(torch.int32)],
        (IMAGES, IDS.tolist()),
        (IMAGES, LABEL_NAMES),
        (IMAGES, np.array(LABEL_NAMES)),
        TensorDataset(IMAGES, IDS),
        Pairs(IDS.tolist()),
        Pairs([np.int64(label) for label in IDS.tolist()]),
        Pairs(LABEL_NAMES),
        Stream(),
        DataLoader(TensorDataset(IMAGES, IDS), batch_size=3),
        DataLoader(Pairs(LABEL_NAMES), batch_size=3),
        Support(IMAGES, IDS, NAMES),
    ],
    ids=lambda data: type(data).__name__,
)
def test_every_kind_of_labelled_samples_becomes_the_same_support(data: Any) -> None:
    support = as_support(data, NAMES)
    assert torch.equal(support.images, IMAGES)
    assert torch.equal(support.labels, IDS)
    assert support.labels.dtype == torch.int64
    assert support.names == NAMES
    assert len(support) == 4


def test_image_sets_become_floats() -> None:
    support = as_support(ImageSet(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8), torch.tensor([2]), NAMES))
    assert torch.equal(support.images, torch.ones(1, 1, 2, 2))
    assert support.names == NAMES


def test_names_as_labels_need_no_list_of_names() -> None:
    support = as_support((IMAGES, ["dog", "ant", "dog", "cat"]))
    assert support.names == ("ant", "cat", "dog")
    assert support.labels.tolist() == [2, 0, 2, 1]


def test_ids_of_a_dataset_that_names_its_classes_mean_those_names() -> None:
    dataset = Pairs([0, 1, 1, 0], classes=["zebra", "yak"])
    joined = ConcatDataset([dataset, Subset(dataset, [0, 1])])
    for data in (dataset, DataLoader(dataset, batch_size=2), Subset(dataset, [0, 1]), joined, DataLoader(joined)):
        assert as_support(data, NAMES).names == ("zebra", "yak")


def test_joined_datasets_whose_ids_mean_different_classes_are_refused() -> None:
    for other in (Pairs([0, 1], classes=["yak", "zebra"]), Pairs([0, 1])):
        with pytest.raises(InputError, match="joined datasets do not have the same classes"):
            as_support(ConcatDataset([Pairs([0, 1], classes=["zebra", "yak"]), other]), NAMES)


def test_reading_a_loader_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    as_support(DataLoader(TensorDataset(IMAGES, IDS), shuffle=True), NAMES)
    assert torch.equal(torch.get_rng_state(), before)


class Sizeless(Dataset[Any]):
    pass


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (IMAGES, "an ImageSet, or a Dataset or DataLoader of torch.utils.data, got torch.Tensor"),
        ((IMAGES, IDS, IDS), "got tuple"),
        ((IMAGES[0], IDS), "expected a non-empty tensor (N, C, H, W), got (1, 1, 2)"),
        ((IMAGES.numpy(), IDS), "images must be tensors, got ndarray"),
        ((IMAGES, IDS[:3]), "labels: there are 3 for 4 images; give one for each"),
        ((IMAGES, LABEL_NAMES[:3]), "labels: there are 3 for 4 images; give one for each"),
        ((IMAGES, IDS + 2), "ids must lie in 0-3"),
        ((IMAGES, IDS.float()), "all class names or all integer ids, got 0.0"),
        ((IMAGES, ["ant", "bee", 1, "bee"]), "got a mix of both"),
        ((IMAGES, None), "a sequence of labels with the images, one for each; got NoneType"),
        ((IMAGES, "bees"), "one for each; got str"),
        ((IMAGES, IDS[0]), "one for each; got Tensor"),
        ((IMAGES / 0, IDS), "hold NaN or infinity"),
        (TensorDataset(IMAGES), "every item must be a pair (image, label), got tuple of 1"),
        (Pairs([]), "at least one sample, got none"),
        (Sizeless(), "Sizeless has no length"),
        ([(torch.zeros(1, 2, 2), 0), (torch.zeros(1, 3, 3), 0)], "the images have several shapes"),
    ],
)
def test_bad_supports_are_refused(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        as_support(data, NAMES)


def test_samples_of_several_shapes_are_refused() -> None:
    class Uneven(Pairs):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
            return torch.zeros(1, 2, 2 + index), 0

    with pytest.raises(InputError, match=r"several shapes, \(1, 2, 2\) and, at index 1, \(1, 2, 3\); give all one"):
        as_support(Uneven([0] * 4), NAMES)


def test_ids_without_names_are_refused() -> None:
    with pytest.raises(InputError, match="names: the labels are ids; give names="):
        as_support((IMAGES, IDS))


def test_unknown_names_as_labels_are_refused() -> None:
    with pytest.raises(ClassNameError, match="labels: there is no class 'dgo' .did you mean 'dog'"):
        as_support((IMAGES, ["dgo"] * 4), NAMES)


def test_draw_support_groups_by_class_base_first() -> None:
    data = image_set([0, 1, 2, 3] * 10)
    support = draw_support(data, ["dog"], ["bee", "ant"], 4, 2, torch.Generator().manual_seed(0))
    assert support.names == ("bee", "ant", "dog")
    assert support.labels.tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    drawn = (support.images[:, 0, 0, 0] * 255).round().to(torch.int64)
    assert (drawn % 4).tolist() == [1, 1, 0, 0, 3, 3, 3, 3]
    assert len(drawn.unique()) == 8


def test_new_samples_do_not_depend_on_the_base_samples_and_small_draws_begin_large_ones() -> None:
    data = image_set([0, 1, 2, 3] * 10)

    def draw(n_new: int | None, n_base: int) -> Support:
        return draw_support(data, ["cat", "dog"], ["ant"], n_new, n_base, torch.Generator().manual_seed(5))

    alone, with_base, everything = draw(3, 0), draw(3, 2), draw(None, 0)
    assert alone.names == with_base.names == ("ant", "cat", "dog")
    assert torch.equal(with_base.images[2:], alone.images)
    assert len(everything) == 20
    assert torch.equal(draw(5, 0).images[:3], alone.images[:3])


def test_without_base_samples_the_data_need_not_know_the_base_classes() -> None:
    data = image_set([0, 1, 1])
    support = draw_support(data, ["bee"], ["yak", "emu"], 2, 0, torch.Generator().manual_seed(0))
    assert support.names == ("yak", "emu", "bee")
    assert support.labels.tolist() == [2, 2]


def test_draw_support_refuses_what_the_data_lacks() -> None:
    data, generator = image_set([0, 1, 1, 3]), torch.Generator()
    with pytest.raises(InputError, match="asked for 3 images of class 'bee', which has 2"):
        draw_support(data, ["bee"], ["ant"], 3, 1, generator)
    with pytest.raises(ClassNameError, match="new_classes and base_classes: ant given twice"):
        draw_support(data, ["ant"], ["ant"], 1, 1, generator)
    with pytest.raises(ClassNameError, match="there is no class 'yak'"):
        draw_support(data, ["yak"], ["ant"], 1, 1, generator)
