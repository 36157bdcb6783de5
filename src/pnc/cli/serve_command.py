"""The command `pnc serve`: a target with clones behind HTTP."""

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pnc.cli.arguments import (
    ModelOptions,
    check_trained,
    load_network,
    parse_shape,
    read_clone_facts,
    read_device,
    use_threads,
)
from pnc.cli.options import Device, SourceNames, SourceWeights, Target, TargetNames, TargetWeights, Threads
from pnc.cli.output import complain, say
from pnc.data.image_files import read_file, required
from pnc.data.normalization import Normalization
from pnc.foundation.argument_checks import check_finite
from pnc.foundation.errors import InputError
from pnc.serving.deployment import Deployment
from pnc.serving.deployment import Target as ServedTarget
from pnc.serving.limits import MIB, Limits
from pnc.serving.watched_folder import WatchedFolder

_TOKEN = "PNC_TOKEN"
_EXTRA = ("fastapi", "uvicorn", "httptools", "python_multipart", "prometheus_client", "PIL")
_LIMITS = Limits()


def serve_clones(
    target: Target,
    clones: Annotated[
        list[Path] | None,
        typer.Option("--clone", help="Clone file to attach at the start, under its own name; may be repeated."),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option("--source", help="Network that clone files may need; may be repeated."),
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Folder for the clones that come over HTTP: they survive a restart.")
    ] = None,
    watch: Annotated[
        Path | None, typer.Option(help="Folder to follow: its clone files are attached, and detached when removed.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(help=f"File with the token that changes of the clones need; by default {_TOKEN}, or a new one."),
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Mean that the target's loader subtracts, such as .5 or .485,.456,.406.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation that it divides by.")] = None,
    batch: Annotated[int, typer.Option(help="Images computed at a time, and most images of a request.", min=1)] = (
        _LIMITS.batch
    ),
    wait_ms: Annotated[float, typer.Option(help="Time that an image waits for others.", min=0)] = _LIMITS.wait_ms,
    queue: Annotated[int, typer.Option(help="Requests in the server; more get 503.", min=1)] = _LIMITS.queue,
    per_client: Annotated[int, typer.Option(help="Of one address; more get 429.", min=1)] = _LIMITS.per_client,
    max_body: Annotated[float, typer.Option(help="MiB of a request; more get 413.", min=0.001)] = (
        _LIMITS.body_bytes / MIB
    ),
    max_pixels: Annotated[int, typer.Option(help="Pixels of an image; more get 413.", min=1)] = _LIMITS.pixels,
    input_shape: Annotated[
        str | None,
        typer.Option(help="Shape of the images, such as 3,32,32, if neither the target's file nor a --clone has it."),
    ] = None,
    source_weights: SourceWeights = None,
    target_weights: TargetWeights = None,
    source_classes: SourceNames = None,
    target_classes: TargetNames = None,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Serve a target and its clones over HTTP; clones come and go while it runs.

    POST /predict classifies images; PUT and DELETE /clones/NAME change the clones, with the token; / is a page. Needs
    the extra `serve`.
    """
    for package in _EXTRA:
        required(package, "serve", "serve")
    networks = [ModelOptions("source", spec, source_weights, source_classes, device) for spec in source or []]
    own = ModelOptions("target", target, target_weights, target_classes, device)
    check_trained(own, *networks)
    read_device(device)
    check_finite(max_body, "max_body")
    limits = Limits(
        batch=batch,
        wait_ms=wait_ms,
        queue=queue,
        per_client=per_client,
        body_bytes=int(max_body * MIB),
        pixels=max_pixels,
    )
    normalization = _normalization(mean, std)
    for path in clones or []:
        read_file(path, "clones")
    known = read_clone_facts(clones[0]) if clones else None
    names, shape = (None, None) if known is None else (known.base_classes, known.input_shape)
    model = load_network(own, names, parse_shape(input_shape) or shape)
    if normalization is not None:
        normalization.per_channel(model.input_shape[0])  # refuses a wrong number of values
    sources = [(one.spec, load_network(one, input_shape=model.input_shape).module) for one in networks]
    with use_threads(threads):
        served = ServedTarget(model.module, model.classes, model.input_shape, normalization)
        deployment = Deployment(served, sources, state)
        for path in clones or []:
            deployment.attach_from(path)
        watched = None if watch is None else WatchedFolder(watch, deployment, limits.clone_bytes)
        from pnc.serving.running import run
        from pnc.serving.web_app import Server

        secret = _token(token_file)
        server = Server(deployment, limits, secret, watched)
        run(server, host, port, lambda *where: _announce(where, deployment.current.names))


def _announce(where: tuple[str, int], clones: Sequence[str]) -> None:
    host, port = where
    place = f"[{host}]" if ":" in host else host
    say(f"http://{place}:{port}: serving; clones: {', '.join(clones) or 'none'}")


def _token(file: Path | None) -> str:
    """The token from a file or the environment; otherwise a new one, which is shown on standard error."""
    if file is not None:
        try:
            found = read_file(file, "token-file").decode("ascii").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"token-file: {file} is not ASCII text; write a new token") from error
    else:
        found = os.environ.get(_TOKEN, "").strip()
        if not found:
            found = secrets.token_urlsafe(24)
            complain(f"token for changes of the clones, new at each start: {found} (or set {_TOKEN})")
    if len(found) < 8 or not found.isascii() or not found.isprintable():
        where = "token-file" if file is not None else _TOKEN
        raise InputError(f"{where}: expected at least 8 printable ASCII characters, got {len(found)} characters")
    return found


def _normalization(mean: str | None, std: str | None) -> Normalization | None:
    if mean is None and std is None:
        return None
    return Normalization(_numbers(mean, "mean", 0.0), _numbers(std, "std", 1.0))


def _numbers(text: str | None, option: str, default: float) -> float | list[float]:
    try:
        return default if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option}: expected numbers separated by commas, got {text!r:.80}") from error
