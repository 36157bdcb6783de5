"""Clones that come and go: attached whole or not at all, kept over restarts, refused with the reason."""

import json
import re
from pathlib import Path

import pytest
import torch

import pnc
import small_pair
from pnc.serving import deployment as deployments
from pnc.serving.deployment import Deployment, Target
from pnc.serving.refusals import Refusal
from running_server import clone_file, deployment, served_target


def logits(found):
    with torch.inference_mode():
        return found.current.net(small_pair.images(4))


def test_a_set_is_replaced_as_a_whole_and_the_old_one_still_answers():
    found = deployment()
    alone = found.current
    assert found.attach("dog", clone_file("dog")) is True
    assert found.current.classes == (*small_pair.BASE, "dog") and found.current.generation == 1
    with torch.inference_mode():
        assert torch.equal(alone.net(small_pair.images(4)), small_pair.target()(small_pair.images(4)))
    assert torch.equal(logits(found)[:, :3], alone.net(small_pair.images(4)))
    found.detach("dog")
    assert torch.equal(logits(found), alone.net(small_pair.images(4)))


def test_a_name_that_is_taken_is_replaced():
    found = deployment(None, "dog", "elk")
    assert found.attach("dog", clone_file("dog")) is False
    assert set(found.current.names) == {"dog", "elk"}


@pytest.mark.parametrize("when", ["load", "attach", "fuse", "keep"])
def test_a_change_that_fails_changes_nothing(when, tmp_path, monkeypatch):
    found = deployment(tmp_path, "dog", "elk")
    before, kept = found.current, (tmp_path / "clones.json").read_text()
    content = clone_file("dog")
    if when == "load":
        content = content[:-1]
    elif when == "attach":
        content = clone_file("elk")  # its class is taken by the clone "elk"
    elif when == "fuse":
        monkeypatch.setattr(deployments.Composite, "fused", lambda self: 1 / 0)
    else:
        monkeypatch.setattr(deployments.StateFolder, "_write", lambda *_: 1 / 0)
    with pytest.raises((pnc.PNCError, ZeroDivisionError)):
        found.attach("dog", content)
    monkeypatch.undo()
    assert found.current is before and (tmp_path / "clones.json").read_text() == kept
    found.detach("elk")
    assert found.current.names == ("dog",)


def test_clones_survive_a_restart(tmp_path):
    first = deployment(tmp_path, "dog", "elk")
    expected = logits(first)
    first.close()
    again = Deployment(served_target(), [("the source", small_pair.source())], tmp_path)
    assert again.current.names == ("dog", "elk") and torch.equal(logits(again), expected)
    again.detach("dog")
    again.close()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    third = Deployment(served_target(), [("the source", small_pair.source())], tmp_path)
    assert third.current.names == ("elk",)
    with pytest.raises(pnc.InputError, match="state: another server uses"):
        Deployment(served_target(), [], tmp_path)
    third.close()
    with pytest.raises(pnc.MismatchError, match="this server has no source; start the server with --source"):
        Deployment(served_target(), [], tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "pnc-serve", "version": 2, "clones": []}'],
)
def test_a_damaged_state_folder_is_one_error(text, tmp_path):
    (tmp_path / "clones.json").write_text(text)
    with pytest.raises(pnc.FileFormatError, match=r"^state: .*clones\.json"):
        deployment(tmp_path)


def test_a_state_folder_names_no_files_outside(tmp_path):
    clones = [{"name": "dog", "file": "../dog.safetensors"}]
    (tmp_path / "clones.json").write_text(json.dumps({"format": "pnc-serve", "version": 1, "clones": clones}))
    with pytest.raises(pnc.FileFormatError, match="outside of its folder"):
        deployment(tmp_path)


def test_a_clone_of_another_target_is_refused_with_the_reason():
    other = small_pair.network(3, 5)
    found = Deployment(Target(other, small_pair.BASE, (1, 8, 8)), [("the source", small_pair.source())])
    with pytest.raises(pnc.MismatchError, match=r"'dog' was made for another target: the values of .* differ"):
        found.attach("dog", clone_file("dog"))
    assert found.current.names == ()
    named = Deployment(Target(small_pair.target(), ("x", "y", "z"), (1, 8, 8)), [("s", small_pair.source())])
    with pytest.raises(pnc.ClassNameError, match="calls the target's outputs"):
        named.attach("dog", clone_file("dog"))


def test_a_file_without_its_source_says_what_is_missing():
    found = Deployment(served_target(), [("other", small_pair.network(2, 7))])
    with pytest.raises(
        pnc.MismatchError, match=r"thin file, which needs the source .* this server has other; .*--source"
    ):
        found.attach("dog", clone_file("dog"))
    assert found.attach("dog", clone_file("dog", kind="full")) is True, "its structure is in the file"


def test_a_full_file_without_its_structure_needs_a_network_of_the_architecture(monkeypatch):
    def facts_of(path):
        return {**pnc.inspect(path), "needs_source": True}

    monkeypatch.setattr("pnc.serving.clone_sources.inspect", facts_of)
    found = Deployment(served_target(), [("other", small_pair.network(2, 7))])
    assert found.attach("dog", clone_file("dog", kind="full")) is True
    none = Deployment(served_target())
    with pytest.raises(pnc.MismatchError, match=r"needs a network of its source's architecture .* has no source"):
        none.attach("dog", clone_file("dog", kind="full"))


def test_files_are_called_by_their_clones_names():
    with pytest.raises(pnc.FileFormatError, match="the file of 'dog' is") as error:
        deployment().attach("dog", b"x" * 200)
    assert not re.search(r"/tmp|pnc-serve-", str(error.value))
    with pytest.raises(pnc.InputError, match="name: expected printable text"):
        deployment().attach("a\nb", clone_file("dog"))


def test_clones_belong_to_where_they_came_from(tmp_path):
    found = deployment(None, "dog")
    with pytest.raises(Refusal, match=r"another place \(http\)"):
        found.attach("dog", clone_file("dog"), "folder")
    found.attach("elk", clone_file("elk"), "folder")
    for change in (lambda: found.detach("elk"), lambda: found.attach("elk", clone_file("elk"))):
        with pytest.raises(Refusal, match="remove its file from the watched folder") as error:
            change()
        assert error.value.status == 409
    path = Path(tmp_path) / "any.safetensors"
    path.write_bytes(clone_file("dog"))
    found.detach("dog")
    found.attach_from(path)
    assert set(found.current.names) == {"elk", "dog"}, "a clone of the command line has its own name"
    found.detach("dog")
    assert found.current.names == ("elk",)


def test_changes_leave_no_memory_behind():
    import linecache

    found = deployment(None, "dog")
    before = len(linecache.cache)
    for _ in range(3):
        found.attach("elk", clone_file("elk"))
        found.detach("elk")
    assert len(linecache.cache) <= before
    assert not [key for key in linecache.cache if key.startswith("<eval_with_key>")]
