"""The HTTP side: routes, keys, errors, and clients that go away."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jaxalign.extras import optional
from jaxalign.serve.answer import Answering, prepare
from jaxalign.serve.errors import ApiError
from jaxalign.serve.given import Reader
from jaxalign.serve.schema import Asking, read
from jaxalign.serve.shapes import SHAPES, Json, Shape
from jaxalign.serve.worker import Worker

LARGEST = 64 << 20  # bytes of a request

Handler = Callable[[Any], Awaitable[Any]]


@dataclass(frozen=True)
class Service:
    """What is served: a model by its name, behind a key or "" for none."""

    name: str
    worker: Worker
    reader: Reader
    key: str = ""
    since: int = field(default_factory=lambda: int(time.time()))


def starlette(module: str) -> Any:
    """A module of starlette. Raises `UserError` where it is not installed."""
    return optional(f"starlette.{module}", "starlette", extra="serve", place="serve")


def make_app(service: Service) -> Any:
    """The ASGI application; the worker runs as long as it does."""
    route = starlette("routing").Route
    handlers: dict[str, tuple[str, Handler]] = {
        "/health": ("GET", partial(_health, service)),
        "/v1/models": ("GET", partial(_models, service)),
        **{path: ("POST", partial(_complete, service, shape)) for path, shape in SHAPES.items()},
    }
    routes = [route(path, _endpoint(handler), methods=[how]) for path, (how, handler) in handlers.items()]
    refused = {starlette("exceptions").HTTPException: _refused, ApiError: _wrong, Exception: _failed}

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        service.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.worker.close)

    return starlette("applications").Starlette(
        routes=routes, exception_handlers=refused, lifespan=lifespan, max_body_size=LARGEST
    )


def _endpoint(handler: Handler) -> Handler:
    """A plain function around the handler: starlette takes anything else for an application."""

    async def endpoint(request: Any) -> Any:
        return await handler(request)

    return endpoint


def _json(body: Json, status: int = 200, headers: dict[str, str] | None = None) -> Any:
    return starlette("responses").JSONResponse(body, status_code=status, headers=headers)


async def _wrong(request: Any, error: Any) -> Any:
    return _json(error.body, error.status, {"WWW-Authenticate": "Bearer"} if error.status == 401 else None)


async def _refused(request: Any, error: Any) -> Any:
    told = f"{request.method} {request.url.path}: {error.detail}"
    return _json(ApiError(error.status_code, told).body, error.status_code, error.headers)


async def _failed(request: Any, error: Any) -> Any:
    return _json(ApiError(500, f"a fault of the server: {error!r}").body, 500)


async def _health(service: Service, request: Any) -> Any:
    return _json({"status": "ok", "requests": service.worker.under_way})


async def _models(service: Service, request: Any) -> Any:
    _check_key(service, request)
    model = {"id": service.name, "object": "model", "created": service.since, "owned_by": "jaxalign"}
    return _json({"object": "list", "data": [model | {"max_model_len": service.worker.engine.max_length}]})


async def _complete(service: Service, shape: Shape, request: Any) -> Any:
    _check_key(service, request)
    asked = read(shape.asking, await request.body())
    _check_model(service, asked)
    answering = prepare(service.worker, service.reader, shape, asked)
    if asked.stream:
        kind = starlette("responses").StreamingResponse
        return kind(_server_sent(answering), media_type="text/event-stream")
    return await _unless_gone(request, answering)


def _check_key(service: Service, request: Any) -> None:
    given = request.headers.get("authorization", "").encode()
    if service.key and not hmac.compare_digest(given, f"Bearer {service.key}".encode()):
        told = "the key is wrong or missing: send the header Authorization: Bearer KEY"
        raise ApiError(401, told, code="invalid_api_key")


def _check_model(service: Service, asked: Asking) -> None:
    if asked.model != service.name:
        told = f"no model {asked.model!r} here: this is {service.name!r}"
        raise ApiError(404, told, "model", "model_not_found")


async def _server_sent(answering: Answering) -> AsyncIterator[str]:
    """Server-sent events. A client that goes away cancels this, which frees its slots."""
    try:
        async for part in answering.stream():
            yield _event(part)
    except ApiError as error:  # the status line is sent long since
        yield _event(error.body)
    finally:
        answering.drop()
    yield "data: [DONE]\n\n"


def _event(part: Json) -> str:
    return f"data: {json.dumps(part, ensure_ascii=False)}\n\n"


async def _unless_gone(request: Any, answering: Answering) -> Any:
    """The whole answer; nothing for a client that does not wait for it."""
    work, gone = asyncio.ensure_future(answering.whole()), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return _json(work.result()) if work.done() else starlette("responses").Response(status_code=499)
    finally:
        answering.drop()
        for task in (work, gone):
            task.cancel()


async def _gone(request: Any) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
