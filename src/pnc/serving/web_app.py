"""The routes of a server: predictions for everybody, changes of the clones for whoever has the token."""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pnc.foundation.errors import PNCError
from pnc.serving.admission import Admission, Bytes
from pnc.serving.answers import ClonesAnswer, ErrorAnswer, PredictAnswer, StateAnswer
from pnc.serving.batching import Batcher
from pnc.serving.deployment import Deployment
from pnc.serving.image_bodies import decoded, has_few_pixels, is_small, uploads_of
from pnc.serving.limits import Limits
from pnc.serving.meters import Meters
from pnc.serving.page import page
from pnc.serving.refusals import BAD_TOKEN, BUSY, NO_ADMINISTRATION, TOO_LARGE, TOO_SLOW, UNUSABLE, Refusal, status_of
from pnc.serving.watched_folder import SECONDS, WatchedFolder

_LOG = logging.getLogger(__name__)
_FILE = {"schema": {"type": "string", "format": "binary"}}
_TEXT = {"type": "string", "format": "base64-image", "description": "An image file in base64."}
_SEVERAL = {"images": {"type": "array", "items": _TEXT, "minItems": 1}}
_IMAGES = {
    "application/octet-stream": _FILE,
    "image/png": _FILE,
    "image/jpeg": _FILE,
    "multipart/form-data": {
        "schema": {"type": "object", "properties": {"images": {"type": "array", "items": _FILE["schema"]}}}
    },
    "application/json": {
        "schema": {
            "oneOf": [
                {"type": "object", "properties": {"image": _TEXT}, "required": ["image"]},
                {"type": "object", "properties": _SEVERAL, "required": ["images"]},
            ]
        }
    },
}
_TOKEN = Depends(HTTPBearer(scheme_name="token", auto_error=False))
"""Only for the OpenAPI: `Server` checks the token itself, to answer as it does elsewhere."""


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer} for status in statuses}


class Server:
    """A deployment behind HTTP.

    Args:
        deployment: What it serves.
        limits: What requests may take.
        token: Whoever has it may change the clones; None: nobody may.
        watched: A folder to follow, if any.
    """

    def __init__(
        self,
        deployment: Deployment,
        limits: Limits,
        token: str | None = None,
        watched: WatchedFolder | None = None,
    ) -> None:
        self.deployment, self.limits, self._token, self._watched = deployment, limits, token, watched
        self.admission = Admission(limits)
        self.meters = Meters(
            lambda: self.admission.n_requests,
            lambda: len(deployment.current.clones),
            lambda: deployment.current.generation,
        )
        self._ready = False
        self._batcher: Batcher | None = None
        self._changes = ThreadPoolExecutor(1, "pnc-changes")
        self._decoders = ThreadPoolExecutor(2, "pnc-decode")

    # ---------------------------------------------------------------------------------------------------- life
    @asynccontextmanager
    async def life(self, app: object) -> AsyncIterator[None]:
        """Serve within the block; afterwards what is queued is still answered."""
        self._batcher = Batcher(lambda: self.deployment.current, self.limits, self.deployment.device, self.meters.batch)
        self._batcher.start()
        watching = asyncio.create_task(self._watch())
        if self._watched is None:
            self._ready = True
        try:
            yield
        finally:
            self._ready = False
            watching.cancel()
            await asyncio.wait([watching])
            await self._batcher.stop()
            await asyncio.to_thread(self._changes.shutdown)
            self._decoders.shutdown()
            self.deployment.close()

    async def _watch(self) -> None:
        while self._watched is not None:
            try:
                await self._change(self._watched.look)
            except (PNCError, OSError) as error:  # the folder is gone, for example: look again
                _LOG.warning("watch: %s", error)
            self._ready = True  # what was in the folder is attached
            await asyncio.sleep(SECONDS)

    async def _change(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run a change of the clones, after those before it, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._changes, work, *arguments)

    # ------------------------------------------------------------------------------------------------- answers
    async def predict(
        self,
        request: Request,
        top: Annotated[int, Query(ge=1, le=1000, description="Number of classes to answer for each image.")] = 5,
        clones: Annotated[
            list[str] | None,
            Query(
                description="Clones whose classes may be answered, besides the target's own; repeat it for several, "
                "and leave it empty for the target alone. By default all attached clones."
            ),
        ] = None,
    ) -> Response:
        """Classify images, sent as they are, as a form with files, or as base64 in JSON."""
        client = request.client.host if request.client is not None else ""
        with self.admission.bytes_of() as held:
            body = await self._body(request, self.limits.body_bytes, held)
            with self.admission.place(client):
                content_type = request.headers.get("content-type", "")
                uploads = await uploads_of(content_type, request.headers, body, self.limits)
                target = self.deployment.target
                arguments = uploads, target.input_shape, target.normalization, self.limits.pixels
                if is_small(uploads) and has_few_pixels(uploads):
                    images = decoded(*arguments)
                else:
                    images = await asyncio.get_running_loop().run_in_executor(self._decoders, decoded, *arguments)
                wanted = None if clones is None else frozenset(clones) - {""}
                assert self._batcher is not None
                answer = await self._batcher.answer(images, [one.name for one in uploads], wanted)
        for one in answer.predictions:
            self.meters.answer(one.clone)
        served = answer.served
        facts = {
            "predictions": [one.facts(top) for one in answer.predictions],
            "clones": served.names,
            "generation": served.generation,
            "batch": answer.batch,
        }
        return Response(json.dumps(facts), media_type="application/json")

    async def clones(self) -> Response:
        """List the attached clones."""
        served, target = self.deployment.current, self.deployment.target
        owners = self.deployment.owners
        refused = {} if self._watched is None else self._watched.refused
        listed = [{**asdict(one), "owner": owners.get(one.name, "http")} for one in served.clones]
        for one in listed:
            del one["enabled"]
        facts = {
            "generation": served.generation,
            "base_classes": target.classes,
            "clones": listed,
            "input_shape": target.input_shape,
            "refused": [{"file": file, "reason": reason} for file, reason in refused.items()],
        }
        return JSONResponse(facts)

    async def attach(self, request: Request, name: str) -> Response:
        """Attach a clone file under a name, or replace the clone of that name."""
        self._check_token(request)
        with self.admission.bytes_of() as held:
            content = await self._body(request, self.limits.clone_bytes, held)
            is_new = await self._change(self.deployment.attach, name, content)
        return JSONResponse({"status": "attached" if is_new else "replaced"}, 201 if is_new else 200)

    async def detach(self, request: Request, name: str) -> Response:
        """Detach a clone."""
        self._check_token(request)
        await self._change(self.deployment.detach, name)
        return Response(status_code=204)

    async def health(self) -> Response:
        """Whether the process works."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """Whether requests are answered; 503 while the server starts and stops."""
        if not self._ready:
            raise Refusal(BUSY, "the server is starting or stopping", 1)
        return JSONResponse({"status": "ready"})

    async def metrics(self) -> Response:
        """Counts and times, for Prometheus."""
        return Response(self.meters.text(), headers={"Content-Type": self.meters.content_type})

    async def page(self) -> Response:
        """The page."""
        content, headers = page()
        return Response(content, headers=headers, media_type="text/html; charset=utf-8")

    # --------------------------------------------------------------------------------------------------- parts
    async def _body(self, request: Request, most: int, held: Bytes) -> bytes:
        """Read a body.

        Raises:
            Refusal: 413 if it is too long, 408 if it takes too long, 503 if there are too many in memory.
        """
        length = request.headers.get("content-length", "")
        too_large = Refusal(TOO_LARGE, f"the body has more than {most:,} bytes; send less")
        if length.isdecimal() and int(length) > most:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise too_large
                    held.add(len(part))
                    parts.append(part)
        except TimeoutError as error:
            raise Refusal(TOO_SLOW, f"the body did not arrive within {self.limits.body_seconds:g} s") from error
        except ClientDisconnect as error:
            raise Refusal(TOO_SLOW, "the client is gone") from error
        return b"".join(parts)

    def _check_token(self, request: Request) -> None:
        if self._token is None:
            raise Refusal(NO_ADMINISTRATION, "this server has no token, so nobody may change its clones over HTTP")
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = secrets.compare_digest(given.strip().encode(), self._token.encode())
        if scheme.lower() != "bearer" or not right:
            raise Refusal(BAD_TOKEN, "changing the clones needs the server's token: Authorization: Bearer TOKEN")


def make_app(server: Server) -> FastAPI:
    """The ASGI application of a server."""
    app = FastAPI(
        title="pnc serve",
        description="A classifier with clones: parts of other networks that give it new classes.",
        lifespan=server.life,
        redirect_slashes=False,
        docs_url=None,  # the pages of FastAPI load scripts of other hosts
        redoc_url=None,
    )
    add = app.add_api_route
    bad = UNUSABLE
    add(
        "/predict",
        server.predict,
        methods=["POST"],
        response_model=PredictAnswer,
        responses=_errors(408, 413, 415, bad, 429, 503),
        openapi_extra={"requestBody": {"content": _IMAGES, "required": True}},
    )
    add("/clones", server.clones, methods=["GET"], response_model=ClonesAnswer)
    body = {"requestBody": {"content": {"application/octet-stream": _FILE}, "required": True}}
    add(
        "/clones/{name:path}",
        server.attach,
        methods=["PUT"],
        response_model=StateAnswer,
        responses={201: {"model": StateAnswer}, **_errors(401, 403, 404, 408, 409, 413, bad, 503)},
        openapi_extra=body,
        dependencies=[_TOKEN],
    )
    add(
        "/clones/{name:path}",
        server.detach,
        methods=["DELETE"],
        status_code=204,
        response_class=Response,
        responses=_errors(401, 403, 404, 409, bad),
        dependencies=[_TOKEN],
    )
    add("/health", server.health, methods=["GET"], response_model=StateAnswer)
    add("/ready", server.ready, methods=["GET"], response_model=StateAnswer, responses=_errors(503))
    add("/metrics", server.metrics, methods=["GET"], response_class=Response, include_in_schema=False)
    add("/", server.page, methods=["GET"], include_in_schema=False)  # fmt: skip
    app.add_exception_handler(PNCError, _refused)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(RequestValidationError, _bad_query)
    app.add_middleware(_Counted, meters=server.meters)
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, PNCError)
    headers = {}
    if isinstance(error, Refusal) and error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    status = status_of(error)
    if status == BAD_TOKEN:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": " ".join(str(error).split())}, status, headers)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)


async def _bad_query(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}"}, UNUSABLE)


class _Counted:
    """An ASGI application whose requests are counted."""

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self._app, self._meters = app, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._meters.request(route, scope["method"], status, time.perf_counter() - start)
