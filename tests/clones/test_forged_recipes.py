"""A recipe that was changed together with its digest is refused, or shown; it never breaks `print(clone)`."""

import pytest

import pnc
import small_pair
from pnc.foundation.errors import FileFormatError, InputError
from pnc.foundation.tensor_files import read_tensors, write_tensors

WRONG = {
    "base_score": [[], "x", -1, True],
    "new_score": [{}, 2],
    "expected_base_drop": ["x", 1e9],
    "doubts": [None, 3, [1], "text", [""]],
    "n_folds": [None, "x", -1, 1.5],
    "n_background_samples": [None, []],
    "max_base_drop": ["x", None],
}


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "dog.safetensors"
    pnc.save(small_pair.clone("dog"), path)
    return read_tensors(path)


@pytest.mark.parametrize("key", WRONG)
def test_wrong_facts_are_refused(key, content, tmp_path):
    tensors, facts = content
    facts = {name: value for name, value in facts.items() if name != "digest"}
    for value in WRONG[key]:
        write_tensors(tmp_path / "forged", tensors, {**facts, "recipe": {**facts["recipe"], key: value}})
        with pytest.raises(FileFormatError, match=key):
            pnc.load(tmp_path / "forged", source=small_pair.source())


@pytest.mark.parametrize("path", [3, None, b"clone"])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(InputError, match="expected a path, got"):
        pnc.load(path, source=small_pair.source())
    with pytest.raises(InputError, match="expected a path, got"):
        pnc.save(small_pair.clone("dog"), path)
