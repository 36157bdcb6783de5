"""Clones as folders and as repositories of a model hub: the clone file and its model card."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from pnc.clones.clone import Clone
from pnc.clones.clone_file import inspect, load, save
from pnc.clones.manifest import FileKind
from pnc.composite.evaluation import EvaluationReport
from pnc.foundation.errors import InputError
from pnc.foundation.file_writing import write_file
from pnc.report.model_card import FILE, CardFacts, model_card


def save_pretrained(
    clone: Clone,
    folder: str | Path,
    *,
    kind: FileKind = "thin",
    base_models: Sequence[str] = (),
    licence: str | None = None,
    evaluation: EvaluationReport | None = None,
    dataset: str | None = None,
) -> None:
    """Save a clone with a model card in a folder for `from_pretrained` or a model hub.

    Args:
        clone: The clone, saved as `clone.safetensors`.
        folder: Created if missing; its `README.md` and `clone.safetensors` are replaced.
        kind: As in `pnc.save`.
        base_models: IDs of the target and of the source on the hub, if they are there, such as "timm/resnet18.a1_in1k".
        licence: Identifier, such as "mit".
        evaluation: From `pnc.evaluate`; its accuracies are put into the card.
        dataset: Name of the images that were measured; required with `evaluation`.
    Raises:
        InputError: `evaluation` is given without `dataset`, or the folder cannot be written.

    >>> pnc.save_pretrained(clone, "more-pets")
    >>> pnc.from_pretrained("more-pets", source=source).classes
    ('cat', 'dog')
    """
    _check(clone, evaluation, dataset)
    card = CardFacts(Path(folder).name, base_models, licence, evaluation, dataset)
    _write(clone, Path(folder), kind, card)


def push_to_hub(
    clone: Clone,
    repository: str,
    *,
    kind: FileKind = "thin",
    base_models: Sequence[str] = (),
    licence: str | None = None,
    evaluation: EvaluationReport | None = None,
    dataset: str | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Upload a clone with a model card to the Hugging Face hub; it needs the extra `hub`.

    Args:
        clone: The clone.
        repository: "OWNER/NAME"; created if missing.
        kind: As in `save_pretrained`, like the next four arguments.
        base_models: IDs of target and source.
        licence: Identifier.
        evaluation: From `pnc.evaluate`.
        dataset: Name of the images that were measured.
        private: Whether a new repository is private; None for the owner's default.
        token: Access token; None takes the one stored by `hf auth login`.
    Returns:
        The URL of the commit.
    Raises:
        InputError: as `save_pretrained`, or the hub refuses or cannot be reached.
    """
    _check(clone, evaluation, dataset)
    hub = _hub()
    card = CardFacts(repository, base_models, licence, evaluation, dataset)
    with tempfile.TemporaryDirectory() as folder:
        _write(clone, Path(folder), kind, card)
        with _hub_errors(hub, repository):
            hub.create_repo(repository, token=token, private=private, exist_ok=True)
            commit = hub.upload_folder(
                repo_id=repository, folder_path=folder, token=token, commit_message=f"Clone {clone.name}"
            )
    return str(commit.commit_url)


def from_pretrained(
    name: str | Path,
    *,
    source: nn.Module | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Clone:
    """Load a clone from a folder of `save_pretrained` or from the Hugging Face hub.

    Args:
        name: A folder, or the "OWNER/NAME" of a repository, whose file is downloaded once, into the hub library's own
            cache. An existing folder takes precedence.
        source: As in `pnc.load`.
        revision: Branch, tag or commit of a repository; None for the latest.
        token: Access token for a private repository.
    Raises:
        InputError: there is no such folder or repository, it has no clone, or the hub cannot be reached; or `revision`
            or `token` is given for a folder.
        MismatchError, FileFormatError: as `pnc.load`.

    >>> _ = pnc.save_pretrained(clone, "pets")
    >>> pnc.from_pretrained("pets", source=source).classes
    ('cat', 'dog')
    """
    folder = Path(name)
    if folder.is_dir():
        if revision is not None or token is not None:
            raise InputError(f"name: {name} is a folder; leave out revision and token, or give OWNER/NAME on the hub")
        if not (folder / FILE).is_file():
            raise InputError(f"name: the folder {name} has no {FILE}; expected a folder from save_pretrained")
        return load(folder / FILE, source=source)
    hub = _hub()
    with _hub_errors(hub, str(name)):
        path = hub.hf_hub_download(str(name), FILE, revision=revision, token=token, library_name="pnc")
    return load(path, source=source)


def _check(clone: Clone, evaluation: EvaluationReport | None, dataset: str | None) -> None:
    if not isinstance(clone, Clone):
        raise InputError(f"clone: expected a clone from pnc.clone or pnc.load, got {type(clone).__name__}")
    if evaluation is not None and dataset is None:
        raise InputError("dataset: evaluation needs the name of the images that were measured; give dataset=")


def _write(clone: Clone, folder: Path, kind: FileKind, card: CardFacts) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder: cannot create {folder}: {error.strerror}; choose another one") from error
    save(clone, folder / FILE, kind)
    needs_source = bool(inspect(folder / FILE)["needs_source"])
    write_file(folder / "README.md", model_card(clone, kind, needs_source, card))


def _hub() -> Any:
    try:
        import huggingface_hub.errors
    except ImportError as error:
        raise InputError('hub: huggingface_hub is needed for this; pip install "pnc[hub]"') from error
    return huggingface_hub


@contextmanager
def _hub_errors(hub: Any, repository: str) -> Iterator[None]:
    """Turn errors of the hub library into an `InputError` of one line."""
    errors = hub.errors
    network_error = errors.HfHubHTTPError.__bases__[0]  # depends on the client that this version of the library uses
    try:
        yield
    except errors.GatedRepoError as error:
        raise InputError(f"name: {repository} is gated: accept its terms on the hub, then give token=") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"revision: {repository} has no such branch, tag or commit") from error
    except errors.RepositoryNotFoundError as error:
        reason = "there is no such folder, and no such repository on the hub that you may read"
        raise InputError(f"name: {repository}: {reason}; check the name, or give token=") from error
    except errors.LocalEntryNotFoundError as error:
        reason = f"there is no such folder, no {FILE} of it in the cache, and the hub cannot be reached"
        raise InputError(f"name: {repository}: {reason}; connect, or give a folder") from error
    except errors.EntryNotFoundError as error:
        raise InputError(f"name: {repository} has no {FILE}, so it is not a clone of pnc") from error
    except errors.HFValidationError as error:
        raise InputError(f"name: {repository} is neither a folder nor an OWNER/NAME of the hub") from error
    except (OSError, ValueError, network_error) as error:  # other errors of the hub or the network
        raise InputError(f"name: {repository}: the hub failed: {' '.join(str(error).split())[:300]}") from error
