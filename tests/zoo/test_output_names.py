"""Which outputs of a source stand for requested classes."""

import pytest
import torch

import pnc
from pnc.zoo.output_names import check_names, outputs_by_name, renamed, stand_ins


def test_names_match_exactly_or_by_the_users_map() -> None:
    outputs = ["cat", "tabby", "hound", "Dog"]
    assert outputs_by_name(["cat", "dog"], {}, outputs) == [0, None]
    assert outputs_by_name(["cat", "dog"], {"dog": ("poodle", "hound")}, outputs) == [0, 2]
    assert outputs_by_name(["cat", "dog"], {"cat": ("tabby",)}, outputs) == [1, None]
    assert outputs_by_name(["cat", "dog"], {"cat": ("kitty",)}, outputs) == [None, None]
    assert outputs_by_name(["cat", "dog"], {"dog": ("cat",)}, outputs) == [None, 0]  # what the user says goes first


def test_outputs_that_answer_most_stand_in() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    answers = torch.full((6, 4), 0.05)
    answers[labels == 0, 3] = 0.85
    answers[labels == 1, 3] = 0.60  # the surer class gets this output, the other one its next best
    answers[labels == 1, 1] = 0.30
    answers[labels == 2, 0] = 0.85
    assert stand_ins([None, None, 0], answers.log(), labels) == [3, 1, 0]
    assert stand_ins([None, None, None], answers.log(), labels) == [3, 1, 0]
    assert stand_ins([2, 1, 0], answers.log(), labels) == [2, 1, 0]
    assert stand_ins([None, None, None], answers.log()[:, :2], labels) is None


def test_renamed_outputs_have_the_requested_names_and_differ() -> None:
    names = renamed(["tabby", "cat", "dog", "hen"], [0, 2], ["cat", "wolf"])
    assert names == ("cat", "cat (source)", "wolf", "hen")


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["cat"], "expected a mapping"),
        ({"cow": "vache"}, "cow not among the requested classes, which are cat, dog"),
        ({"cat": "pet", "dog": "pet"}, "'pet' is no name, or stands for two classes"),
        ({"cat": [3]}, "3 is no name"),
    ],
)
def test_a_wrong_map_is_refused(names: object, problem: str) -> None:
    with pytest.raises(pnc.InputError, match=f"names: .*{problem}"):
        check_names(names, ["cat", "dog"])
