"""A client of `pnc serve`."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from pnc.clones.clone import Clone
from pnc.clones.clone_file import FileKind, save
from pnc.composite.answering import Prediction
from pnc.data.image_files import read_file, required
from pnc.foundation.errors import InputError, MismatchError, ServerError

Image = str | Path | bytes
"""A path, or the bytes of an image file."""

_BUSY = frozenset({429, 503})


class Client:
    """Talks to a running `pnc serve`; needs the extra `serve`.

    Args:
        url: Such as "http://127.0.0.1:8000".
        token: The server's token, for `attach` and `detach`.
        patience: Seconds for which requests are repeated while the server is busy.
        timeout: Seconds to wait for one answer.
    Raises:
        InputError: httpx is not installed, or the URL cannot be one.

    >>> with pnc.Client("http://127.0.0.1:8000", token="...") as client:  # doctest: +SKIP
    ...     client.attach("pets", "pets.safetensors")
    ...     print(client.predict("rex.jpg")[0])
    """

    def __init__(self, url: str, token: str | None = None, *, patience: float = 10.0, timeout: float = 60.0) -> None:
        self._httpx: Any = required("httpx", "serve", "url")
        if not url.startswith(("http://", "https://")):
            raise InputError(f"url: expected http://HOST:PORT or https://..., got {url!r:.200}")
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._patience = patience
        self._http = self._httpx.Client(base_url=url, headers=headers, timeout=timeout)

    def predict(
        self, images: Image | Sequence[Image], *, clones: Sequence[str] | None = None, top: int = 1000
    ) -> tuple[Prediction, ...]:
        """Classify images; all of them by one set of clones.

        Args:
            images: Paths or bytes of image files, one or several, at most as many as the server computes at a time.
            clones: Names of the clones whose classes may be answered, besides the target's own; None for all.
            top: Number of classes to return for each image.
        Raises:
            InputError: the server refuses the images or knows no such clone.
            ServerError: it cannot be reached, or stays busy.
        """
        given = [images] if isinstance(images, str | Path | bytes) else list(images)
        files = [_file(one) for one in given]
        query: dict[str, Any] = {"top": top}
        if clones is not None:
            query["clones"] = list(clones) or [""]
        answer = self._ask("POST", "/predict", params=query, files=[("images", one) for one in files])
        names = [str(one) if isinstance(one, str | Path) else None for one in given]
        return tuple(_prediction(*one) for one in zip(names, answer["predictions"], strict=True))

    def clones(self) -> Mapping[str, tuple[str, ...]]:
        """Classes of the attached clones, by name."""
        return {one["name"]: tuple(one["classes"]) for one in self.status()["clones"]}

    def status(self) -> Mapping[str, Any]:
        """What is attached, as the server lists it."""
        found: Mapping[str, Any] = self._ask("GET", "/clones")
        return found

    def attach(self, name: str, clone: Clone | str | Path, *, kind: FileKind = "thin") -> None:
        """Attach a clone, or replace the one of that name.

        Args:
            name: Its name at the server.
            clone: A clone, or the path of its file.
            kind: How a clone is sent, as in `pnc.save`; a file is sent as it is.
        Raises:
            MismatchError: it is for another target, needs a source that the server lacks, or clashes with another one.
            InputError: the file is damaged, or the token is missing or wrong.
            ServerError: the server cannot be reached, or stays busy.
        """
        content = _saved(clone, kind) if isinstance(clone, Clone) else read_file(Path(clone), "clone")
        self._ask("PUT", f"/clones/{quote(name, safe='')}", content=content)

    def detach(self, name: str) -> None:
        """Detach a clone; errors as for `attach`."""
        self._ask("DELETE", f"/clones/{quote(name, safe='')}")

    def is_ready(self) -> bool:
        """Whether the server answers requests."""
        try:
            return bool(self._http.get("/ready").status_code == 200)
        except self._httpx.TransportError:
            return False

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(
        self, method: str, path: str, *, params: Any = None, files: Any = None, content: bytes | None = None
    ) -> Any:
        """Send a request, and again while the server is busy."""
        end = time.monotonic() + self._patience
        while True:
            try:
                answer = self._http.request(method, path, params=params, files=files, content=content)
            except self._httpx.HTTPError as error:
                raise ServerError(f"{self._http.base_url} does not answer: {error or type(error).__name__}") from error
            if answer.status_code not in _BUSY or time.monotonic() > end:
                break
            time.sleep(min(float(answer.headers.get("Retry-After", 1)), 1.0) / 4)
        if answer.is_success:
            return answer.json() if answer.content else None
        raise _error(answer)


def _file(image: Image) -> tuple[str, bytes]:
    """Name and content."""
    if isinstance(image, bytes):
        return "image", image
    return Path(image).name, read_file(Path(image), "images")


def _saved(clone: Clone, kind: FileKind) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clone.safetensors"
        save(clone, path, kind)
        return path.read_bytes()


def _prediction(image: str | None, facts: Mapping[str, Any]) -> Prediction:
    classes = facts["classes"]
    probabilities = {one["class"]: one["probability"] for one in classes}
    owners = {one["class"]: one["clone"] for one in classes if one["clone"] is not None}
    return Prediction(image, classes[0]["class"], classes[0]["probability"], facts["clone"], probabilities, owners)


def _error(answer: Any) -> InputError | MismatchError | ServerError:
    """The error for a refused request."""
    try:
        reason = str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):  # not from our server, perhaps a proxy's page
        reason = f"status {answer.status_code}"
    if answer.status_code == 409:
        return MismatchError(reason)
    return InputError(reason) if answer.status_code < 500 and answer.status_code != 429 else ServerError(reason)
