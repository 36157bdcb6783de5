"""The metadata of clone files: the reader and the published schema accept and refuse the same."""

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

import pytest
from jsonschema import Draft202012Validator

import pnc
from pnc.bench.file_attacks import Material, material
from pnc.bench.file_damage import with_one_changed
from pnc.clones.clone_file import read_clone_file
from pnc.clones.manifest import Manifest, read_manifest
from pnc.foundation.class_names import MAX_TEXT
from pnc.foundation.errors import FileFormatError, InputError

SCHEMA = Path(__file__).parents[2] / "docs" / "clone-file.schema.json"
DIGEST = "0" * 64


@cache
def there() -> Material:
    return material()


@cache
def facts() -> dict:
    data = there().files[0]
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    found = json.loads(header["__metadata__"]["pnc"])
    assert len(found.pop("digest")) == 64
    return found


def changed(place: str, value: object) -> dict:
    """The metadata with another value at `a.b.c`; Ellipsis removes it."""
    found = copy.deepcopy(facts())
    *path, last = place.split(".")
    inner = found
    for key in path:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return found


@cache
def validator() -> Draft202012Validator:
    schema = json.loads(SCHEMA.read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_valid_metadata_is_read_and_written_unchanged():
    manifest = read_manifest("f", facts())
    assert manifest.facts() == facts()
    assert validator().is_valid({**facts(), "digest": DIGEST})
    assert isinstance(manifest, Manifest) and manifest.classes == ("u", "v", "w", "x")


WRONG = [
    ("format", "pnc-model", "is not a clone file: its format is 'pnc-model'"),
    ("format", None, "is not a clone file"),
    ("version", 99, "format version 99; this pnc reads up to 3: install a newer one"),
    ("version", 0, "version: expected a whole number from 1 to 3, got 0"),
    ("version", True, "version"),
    ("target.forward", 7, "target.forward: expected an object, got 7"),
    ("source.forward.digest", "00", "source.forward.digest: expected 32 hex digits, got '00'"),
    ("source.forward.operations", "relu", "source.forward.operations: expected names with four hex digits each"),
    ("source.forward.operations", "relu:00ff  gelu:1234", "source.forward.operations"),
    ("target.forward.answers", [], "target.forward.answers: expected 1 to 48 finite numbers"),
    ("target.forward.answers", [1, True], "target.forward.answers"),
    ("target.forward.answers", [1e300], "target.forward.answers"),
    ("target.forward.answers", [0.0] * 49, "target.forward.answers"),
    ("version", 3, "part is missing in version 3"),
    ("part", {}, "part is unknown in version 2"),
    ("kind", "thick", "kind: expected one of thin, full, got 'thick'"),
    ("kind", ["thin"], "kind"),
    ("name", "", "name: expected a printable text of 1 to 1000 characters, got ''"),
    ("name", "a\nb", "name: expected a printable text"),
    ("name", "a" * (MAX_TEXT + 1), "name: expected a printable text"),
    ("name", ..., "name is missing"),
    ("other", 1, "other is unknown"),
    ("classes", [], "classes: expected at least one name, and no duplicates"),
    ("classes", ["u", "u"], "no duplicates"),
    ("classes", ["u", 7], "classes: expected printable names"),
    ("classes", "uvwx", "classes: expected a list of names"),
    ("classes", ["a", "u", "v", "w"], "classes, base_classes: a name occurs twice"),
    ("head", "tail", "head: expected one of stacked, source, discriminant"),
    ("position", [], r"position: expected an object, got \[\]"),
    ("position.rectify", 1, "position.rectify: expected true or false, got 1"),
    ("position.source.shape", [6, 8], "position.source.shape: expected 3 whole numbers"),
    ("position.source.shape", [6, 8, 0], "position.source.shape"),
    ("position.source.shape", [6, 8, 1 << 40], "position.source.shape"),
    ("position.source.kind", "cube", "position.source.kind"),
    ("position.source.channel_dim", 2, "position.source: channel_dim 2"),
    ("position.source.n_prefix_tokens", 1, "position.source.n_prefix_tokens"),
    ("position.target.n_macs", 1.5, "position.target.n_macs: expected a whole number"),
    ("position.target.n_macs", 10**30, "position.target.n_macs"),
    ("position.target.depth", 1, "position.target.depth is unknown"),
    ("source.input_shape", [1, 8, 9], "source and target must take the same images"),
    ("source.structure", "0" * 31, "source.structure: expected 32 hex digits"),
    ("source.weights", "G" * 32, "source.weights"),
    ("target.tensors", "0" * 17, "target.tensors: expected a multiple of 16 hex digits"),
    ("target", None, "target: expected an object, got None"),
    ("recipe.score", 1.5, "recipe.score: expected a number from 0 to 1"),
    ("recipe.score", ..., "recipe.score"),
    ("recipe.n_new_samples", "20", "recipe.n_new_samples"),
]


@pytest.mark.parametrize(("place", "value", "words"), WRONG, ids=[f"{place}={str(v)[:20]}" for place, v, _ in WRONG])
def test_a_wrong_field_is_named(place, value, words):
    with pytest.raises(FileFormatError, match=words):
        read_manifest("f", changed(place, value))


@pytest.mark.parametrize(
    "value", [[[[[[1]]]]], "a\x07", {"a": "b" * 2000}, float("inf"), 10**30], ids=lambda value: str(value)[:20]
)
def test_a_recipe_holds_plain_values_only(value):
    assert read_manifest("f", changed("recipe.more", {"steps": [1, 2], "note": None, "ok": True}))
    with pytest.raises(FileFormatError, match="recipe: 'more' has the value"):
        read_manifest("f", changed("recipe.more", value))


def test_huge_images_are_refused():
    huge = changed("source.input_shape", [3, 1 << 12, 1 << 12])
    huge["target"]["input_shape"] = [3, 1 << 12, 1 << 12]
    with pytest.raises(FileFormatError, match="the same images, of 16777216 values at most"):
        read_manifest("f", huge)


def test_the_schema_refuses_nothing_that_the_reader_accepts():
    accepted = 0
    for seed in range(1500):
        found = with_one_changed(facts(), Random(seed))
        try:
            read_manifest("f", json.loads(json.dumps(found)))
        except FileFormatError:
            continue
        accepted += 1
        problems = [error.message for error in validator().iter_errors({**found, "digest": DIGEST})]
        assert not problems, (seed, problems)
    assert accepted > 30


@pytest.mark.parametrize("place", ["kind", "position.source.shape", "source.weights", "recipe.score", "classes"])
def test_the_schema_refuses_wrong_types_and_missing_fields(place):
    for value in (..., 7.5, {}):
        assert not validator().is_valid({**changed(place, value), "digest": DIGEST})
    assert not validator().is_valid(facts()), "without digest"


def test_what_no_reader_would_accept_is_not_written(tmp_path):
    made = there().clone
    for other, words in (
        (replace(made, classes=("u", "v", "w\n", "x")), r"clone: classes: .* got 'w\\n', so it cannot be saved"),
        (replace(made, name="n" * 2000), "clone: name: expected a printable text"),
        (replace(made, recipe={**made.recipe, "score": float("nan")}), "clone: recipe.score"),
    ):
        with pytest.raises(InputError, match=words):
            pnc.save(other, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_the_schema_accepts_the_metadata_of_saved_files(tmp_path):
    for kind in ("thin", "full"):
        pnc.save(there().clone, tmp_path / kind, kind)
        _, manifest = read_clone_file(tmp_path / kind)
        assert validator().is_valid({**manifest.facts(), "digest": DIGEST})


def test_the_schema_refuses_no_structure_that_the_reader_accepts():
    data = (Path(__file__).parents[1] / "golden" / "clone_v3_own_layer.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    whole, accepted = json.loads(header["__metadata__"]["pnc"]), 0
    del whole["digest"]
    for seed in range(600):
        found = {**whole, "part": with_one_changed(whole["part"], Random(seed))}
        try:
            read_manifest("f", json.loads(json.dumps(found)))
        except FileFormatError:
            continue
        accepted += 1
        problems = [error.message for error in validator().iter_errors({**found, "digest": DIGEST})]
        assert not problems, (seed, problems)
    assert accepted > 20
