"""Clones as folders and repositories of a model hub: the file and its card."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from pnc.clones.clone import Clone
from pnc.clones.clone_file import load, save
from pnc.clones.manifest import FileKind
from pnc.composite.evaluation import EvaluationReport
from pnc.foundation.errors import InputError
from pnc.foundation.file_writing import write_file
from pnc.report.model_card import FILE, model_card


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
    """Save a clone with a model card: a folder that `from_pretrained` reads and a model hub understands.

    Args:
        clone: What to save, as `clone.safetensors`.
        folder: Made where it is not there; its `README.md` and `clone.safetensors` are replaced.
        kind: As in `pnc.save`.
        base_models: IDs of the target and of the source on the hub, such as "timm/resnet18.a1_in1k", as far as they are
            there.
        licence: Identifier, such as "mit".
        evaluation: From `pnc.evaluate`: its accuracies go into the card.
        dataset: Name of the images that it was measured on; needed with `evaluation`.
    Raises:
        InputError: `evaluation` comes without `dataset`, or the folder cannot be written.
    """
    _check(clone, evaluation, dataset)
    card = model_card(clone, kind, Path(folder).name, base_models, licence, evaluation, dataset)
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
        clone: What to upload.
        repository: "OWNER/NAME"; made where it is not there.
        kind: As in `save_pretrained`, like the four that follow.
        base_models: IDs of target and source.
        licence: Identifier.
        evaluation: From `pnc.evaluate`.
        dataset: Name of the images that it was measured on.
        private: Whether a new repository is; None for the default of its owner.
        token: Of access; None takes the one that `hf auth login` keeps.
    Returns:
        The address of the commit.
    Raises:
        InputError: as `save_pretrained`, or the hub refuses or cannot be reached.
    """
    _check(clone, evaluation, dataset)
    hub = _hub()
    card = model_card(clone, kind, repository, base_models, licence, evaluation, dataset)
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
    source: nn.Module,
    revision: str | None = None,
    token: str | None = None,
) -> Clone:
    """Load a clone from a folder of `save_pretrained` or from the Hugging Face hub.

    Args:
        name: A folder, or the "OWNER/NAME" of a repository: its file is downloaded once, into the hub library's own
            cache. Where both could be meant, the folder is.
        source: As in `pnc.load`.
        revision: Branch, tag or commit of a repository; None for its newest state.
        token: Of access to a private repository.
    Raises:
        InputError: there is no such folder or repository, it holds no clone, or the hub cannot be reached; `revision`
            or `token` is given for a folder.
        MismatchError, FileFormatError: as `pnc.load`.
    """
    folder = Path(name)
    if folder.is_dir():
        if revision is not None or token is not None:
            raise InputError(f"name: {name} is a folder; leave out revision and token, or give OWNER/NAME of the hub")
        if not (folder / FILE).is_file():
            raise InputError(f"name: the folder {name} has no {FILE}; expected what save_pretrained wrote")
        return load(folder / FILE, source=source)
    hub = _hub()
    with _hub_errors(hub, str(name)):
        path = hub.hf_hub_download(str(name), FILE, revision=revision, token=token, library_name="pnc")
    return load(path, source=source)


def _check(clone: Clone, evaluation: EvaluationReport | None, dataset: str | None) -> None:
    if not isinstance(clone, Clone):
        raise InputError(f"clone: expected what pnc.clone or pnc.load gives, got {type(clone).__name__}")
    if evaluation is not None and dataset is None:
        raise InputError("dataset: evaluation needs the name of the images that it was measured on; give dataset=")


def _write(clone: Clone, folder: Path, kind: FileKind, card: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder: cannot make {folder}: {error.strerror}; choose another one") from error
    save(clone, folder / FILE, kind)
    write_file(folder / "README.md", card)


def _hub() -> Any:
    try:
        import huggingface_hub.errors
    except ImportError as error:
        raise InputError('hub: huggingface_hub is needed for this; pip install "pnc[hub]"') from error
    return huggingface_hub


@contextmanager
def _hub_errors(hub: Any, repository: str) -> Iterator[None]:
    """Turn what the hub library raises into one line."""
    errors = hub.errors
    network_error = errors.HfHubHTTPError.__bases__[0]  # of the client that this version of the library uses
    try:
        yield
    except errors.GatedRepoError as error:
        raise InputError(f"name: {repository} asks for your consent on the hub first; then give token=") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"revision: {repository} has no such branch, tag or commit") from error
    except errors.RepositoryNotFoundError as error:
        reason = "there is no such folder, nor such a repository on the hub that you may read"
        raise InputError(f"name: {repository}: {reason}; check the name, or give token=") from error
    except errors.LocalEntryNotFoundError as error:
        reason = f"there is no such folder, no {FILE} of it in the cache, and the hub cannot be reached"
        raise InputError(f"name: {repository}: {reason}; connect, or give a folder") from error
    except errors.EntryNotFoundError as error:
        raise InputError(f"name: {repository} has no {FILE}, so it is no clone of pnc") from error
    except errors.HFValidationError as error:
        raise InputError(f"name: {repository} is neither a folder nor an OWNER/NAME of the hub") from error
    except (OSError, ValueError, network_error) as error:  # whatever else the hub answers or the network does
        raise InputError(f"name: {repository}: the hub failed: {' '.join(str(error).split())[:300]}") from error
