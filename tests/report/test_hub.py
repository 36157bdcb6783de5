"""Clones as folders and repositories of a hub: read from the hub library's own cache, without a connection."""

import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

import pnc
from digits import NEW, held_out_images, pair, support
from pnc.composite.batched_logits import logits_of
from pnc.foundation.errors import FileFormatError, InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def clone() -> pnc.Clone:
    nets = pair()
    return pnc.clone(nets.source.module, nets.target.module, support(), name="digits | <5>", **nets.names())


@pytest.fixture(scope="module")
def folder(clone: pnc.Clone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = pnc.attach(pair().target.module, clone)
    place = tmp_path_factory.mktemp("hub") / "new" / "more-digits"
    measured = pnc.evaluate(net, held_out_images())
    given: Any = {"licence": "mit", "evaluation": measured, "dataset": "digits: 8x8"}
    pnc.save_pretrained(clone, place, base_models=["me/target", "me/source"], **given)
    return place


@pytest.fixture
def cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub library as after a download of that folder, without a connection."""
    repository = tmp_path / "models--me--more-digits"
    (repository / "refs").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    for ref in ("main", "v1"):
        (repository / "refs" / ref).write_text(COMMIT)
    for file in folder.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        (repository / "snapshots" / COMMIT / file.name).symlink_to(Path("../../blobs") / blob.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (found,) = huggingface_hub.scan_cache_dir(tmp_path).repos
    assert found.repo_id == "me/more-digits" and found.refs.keys() == {"main", "v1"}, "laid out as the library does it"
    return tmp_path


def logits(clone: pnc.Clone) -> torch.Tensor:
    return logits_of(pnc.attach(pair().target.module, clone), held_out_images().images)


def test_a_folder_holds_the_clone_and_its_card(folder: Path, clone: pnc.Clone) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "clone.safetensors"]
    for name in (folder, str(folder)):
        found = pnc.from_pretrained(name, source=pair().source.module)
        assert torch.equal(logits(found), logits(clone)) and found.name == clone.name


@pytest.mark.parametrize("revision", [None, "main", "v1", COMMIT])
def test_a_repository_is_read_from_the_cache(cache: Path, clone: pnc.Clone, revision: str | None) -> None:
    found = pnc.from_pretrained("me/more-digits", source=pair().source.module, revision=revision)
    assert torch.equal(logits(found), logits(clone))


def test_the_hub_library_understands_the_card(folder: Path, clone: pnc.Clone) -> None:
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    facts = card.data.to_dict()
    assert (facts["library_name"], facts["pipeline_tag"], facts["license"]) == ("pnc", "image-classification", "mit")
    assert (facts["base_model"], facts["base_model_relation"]) == (["me/target", "me/source"], "adapter")
    measured = pnc.evaluate(pnc.attach(pair().target.module, clone), held_out_images())
    assert card.data.model_name == clone.name
    found = {one.metric_name: one.metric_value for one in card.data.eval_results}
    assert found["accuracy on new classes"] == measured.new_accuracy
    assert {one.dataset_name for one in card.data.eval_results} == {"digits: 8x8"}
    assert {one.metric_type for one in card.data.eval_results} == {"accuracy"}


def test_the_card_tells_people_what_it_is(folder: Path, clone: pnc.Clone) -> None:
    text = (folder / "README.md").read_text()
    assert "# digits \\| \\<5\\>" in text and f"| new classes | {', '.join(NEW)} |" in text
    assert 'clone = pnc.from_pretrained("more-digits", source=source)' in text
    assert clone.target.weights in text and "needs the weights of the source" in text
    assert "Made for me/target and me/source." in text
    assert f"On {len(held_out_images())} images of digits: 8x8." in text


def test_without_measurements_the_card_claims_none(clone: pnc.Clone, tmp_path: Path) -> None:
    pnc.save_pretrained(clone, tmp_path, kind="full")
    facts = huggingface_hub.ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert set(facts) == {"library_name", "pipeline_tag", "tags"}
    text = (tmp_path / "README.md").read_text()
    assert "Measured" not in text and "includes the weights of the source" in text
    assert pnc.inspect(tmp_path / "clone.safetensors")["kind"] == "full"


def test_pushing_uploads_the_folder(clone: pnc.Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def create_repo(repository: str, **given: Any) -> None:
        seen["repository"] = repository, given

    def upload_folder(**given: Any) -> Any:
        there = {path.name: path.read_bytes() for path in Path(given.pop("folder_path")).iterdir()}
        seen["upload"] = there, given
        return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    assert pnc.push_to_hub(clone, "me/more", private=True, token="t") == "https://hub/commit"
    assert seen["repository"] == ("me/more", {"token": "t", "private": True, "exist_ok": True})
    files, given = seen["upload"]
    assert given == {"repo_id": "me/more", "token": "t", "commit_message": "Clone digits | <5>"}
    assert set(files) == {"README.md", "clone.safetensors"} and b'from_pretrained("me/more"' in files["README.md"]


# ------------------------------------------------------------------------------------------------ refused
@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("me/nothing", {}, "name: me/nothing: there is no such folder, no clone.safetensors of it in the cache"),
        ("me/more-digits", {"revision": "v2"}, "name: me/more-digits: .* the hub cannot be reached; connect"),
        ("a/b/c", {}, "name: a/b/c is neither a folder nor an OWNER/NAME of the hub"),
    ],
)
def test_a_missing_repository_is_one_line(cache: Path, name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as failed:
        pnc.from_pretrained(name, source=pair().source.module, **settings)
    assert "\n" not in str(failed.value)


def answering(status: int) -> Any:
    """A response of the hub, as its errors require one."""
    return SimpleNamespace(status_code=status, headers={}, request=SimpleNamespace(url="u", method="GET"), text="")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError, "name: me/it is gated: accept its terms on the hub, then give token="),
        (errors.RevisionNotFoundError, "revision: me/it has no such branch, tag or commit"),
        (errors.RepositoryNotFoundError, "no such repository on the hub that you may read"),
        (errors.RemoteEntryNotFoundError, "name: me/it has no clone.safetensors, so it is not a clone of pnc"),
        (errors.HfHubHTTPError, "name: me/it: the hub failed: two lines"),
    ],
)
def test_what_the_hub_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Any, message: str) -> None:
    def refuse(*given: Any, **settings: Any) -> None:
        raise error("two\nlines", response=answering(404))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(InputError, match=message) as failed:
        pnc.from_pretrained("me/it", source=pair().source.module)
    assert "\n" not in str(failed.value)


def test_a_broken_connection_is_one_line(clone: pnc.Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = errors.HfHubHTTPError.__bases__[0]

    def break_off(*given: Any, **settings: Any) -> None:
        raise broken("name not known")

    monkeypatch.setattr(huggingface_hub, "create_repo", break_off)
    with pytest.raises(InputError, match="name: me/it: the hub failed: name not known"):
        pnc.push_to_hub(clone, "me/it")


def test_folders_that_hold_no_clone_are_refused(clone: pnc.Clone, tmp_path: Path, monkeypatch: Any) -> None:
    source = pair().source.module
    with pytest.raises(InputError, match=r"has no clone.safetensors; expected a folder from save_pretrained"):
        pnc.from_pretrained(tmp_path, source=source)
    with pytest.raises(InputError, match="is a folder; leave out revision and token"):
        pnc.from_pretrained(tmp_path, source=source, revision="main")
    (tmp_path / "clone.safetensors").write_bytes(b"no")
    with pytest.raises(FileFormatError):
        pnc.from_pretrained(tmp_path, source=source)
    net = pnc.attach(pair().target.module, clone)
    with pytest.raises(InputError, match="dataset: evaluation needs the name of the images"):
        pnc.save_pretrained(clone, tmp_path / "new", evaluation=pnc.evaluate(net, held_out_images()))
    with pytest.raises(InputError, match="clone: expected a clone from pnc.clone or pnc.load, got Composite"):
        pnc.save_pretrained(net, tmp_path / "new")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="folder: cannot create .*clone.safetensors"):
        pnc.save_pretrained(clone, tmp_path / "clone.safetensors")
    assert not (tmp_path / "new").exists()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r'hub: huggingface_hub is needed for this; pip install "pnc\[hub\]"'):
        pnc.from_pretrained("me/more-digits", source=source)
