"""The application: its routes, and the server that runs it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from jaxsteer.engine import Engine
from jaxsteer.serve.answers import Words
from jaxsteer.serve.completions import Completions
from jaxsteer.serve.connections import Connection
from jaxsteer.serve.errors import Refused
from jaxsteer.serve.fields import read_json
from jaxsteer.serve.guards import Guard
from jaxsteer.serve.library import Library
from jaxsteer.serve.project import Reading

PAGE = Path(__file__).parent / "page"
_CONNECTIONS, _KEEP_ALIVE = 1024, 30


def make_app(engine: Engine, library: Library, *, host: str = "127.0.0.1", key: str | None = None) -> Starlette:
    """The ASGI application of a server that is bound to ``host`` and asks for ``key`` where there is one."""
    words = Words(engine.model)
    completions = Completions(engine, library, words)
    reading = Reading(engine, library, words)
    served = {
        "id": engine.model.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "jaxsteer",
        "max_model_len": engine.context,
    }

    async def models(request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [served]})

    async def model(request: HttpRequest) -> Response:
        if request.path_params["name"] != engine.model.name:
            raise Refused("There is no such model here.", status=404, param="model", code="model_not_found")
        return JSONResponse(served)

    async def health(request: HttpRequest) -> Response:
        status = engine.status
        if not status.ready:
            return JSONResponse({"status": "loading", "compiling": status.compiling}, status_code=503)
        return JSONResponse({"status": "ok", "compiling": status.compiling, "rows": status.rows})

    registry = CollectorRegistry()
    registry.register(_Metrics(engine))  # type: ignore[arg-type]

    async def metrics(request: HttpRequest) -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def embeddings(request: HttpRequest) -> Response:
        raise Refused("This server writes text and makes no embeddings.", status=404, code="unsupported")

    async def steering(request: HttpRequest) -> Response:
        return JSONResponse(await asyncio.to_thread(library.list))

    async def show(request: HttpRequest) -> Response:
        if (name := request.path_params["name"]) not in library.loaded:
            raise Refused(f"No vectors {name[:80]!r} are loaded.", status=404, param="name", code="no_vectors")
        return JSONResponse(library.describe(name))

    async def index(request: HttpRequest) -> Response:
        return FileResponse(PAGE / "index.html")

    def by_name(act: Callable[[str], None]) -> Callable[[HttpRequest], Awaitable[Response]]:
        async def endpoint(request: HttpRequest) -> Response:
            body = read_json(await request.body())
            if set(body) != {"name"} or not isinstance(body["name"], str):
                raise Refused("Give the name alone: a file's of GET /v1/steering.", param="name")
            await asyncio.to_thread(act, body["name"])
            return JSONResponse(await asyncio.to_thread(library.list))

        return endpoint

    post: dict[str, Any] = {"methods": ["POST"]}
    get: dict[str, Any] = {"methods": ["GET"]}
    routes = [
        Route("/v1/chat/completions", completions.chat, **post),
        Route("/v1/completions", completions.text, **post),
        Route("/v1/embeddings", embeddings, **post),
        Route("/v1/models", models, **get),
        Route("/v1/models/{name:path}", model, **get),
        Route("/v1/project", reading.project, **post),
        Route("/v1/steering", steering, **get),
        Route("/v1/steering/load", by_name(library.load), **post),
        Route("/v1/steering/unload", by_name(library.unload), **post),
        Route("/v1/steering/{name}", show, **get),
        Route("/tokenize", reading.tokenize, **post),
        Route("/detokenize", reading.detokenize, **post),
        Route("/tokenizer_info", reading.tokenizer_info, **get),
        Route("/health", health, **get),
        Route("/metrics", metrics, **get),
        Route("/", index, **get),
        Mount("/page", StaticFiles(directory=PAGE)),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, host=host, key=key)],
        exception_handlers={Refused: _refused, HTTPException: _http, Exception: _failed},
    )


async def _refused(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response()


async def _http(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Refused(f"{request.method} {request.url.path[:80]}: {error.detail}", status=error.status_code).response()


async def _failed(request: HttpRequest, error: Exception) -> Response:
    return Refused("The server failed; its log says why.", status=500, code="server_failed").response()


class _Metrics:
    """What Prometheus reads, from the engine's status."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """The numbers now."""
        status = self._engine.status
        gauges = {
            "rows": (status.rows, "Rows that are decoded or whose prompt is run."),
            "waiting": (status.waiting, "Requests that wait for a row."),
            "width": (status.width, "Rows that the running program has room for."),
            "ready": (int(status.ready), "1 when all programs are compiled."),
        }
        counts = {
            "requests": (status.requests, "Requests that were accepted."),
            "tokens": (status.tokens, "Tokens that were decoded."),
            "prompt_tokens": (status.prompt_tokens, "Tokens of prompts."),
            "cached_tokens": (status.cached_tokens, "Tokens of prompts whose keys and values were there already."),
            "steps": (status.steps, "Calls of the device that decoded."),
            "programs": (status.compiled, "Programs that were compiled."),
        }
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(f"jaxsteer_{name}", text, value=value)
        for name, (value, text) in counts.items():
            yield CounterMetricFamily(f"jaxsteer_{name}", text, value=value)


def make_server(app: Any, *, host: str, port: int) -> uvicorn.Server:
    """The server of an application; ``run`` or ``serve`` it."""
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", limit_concurrency=_CONNECTIONS, access_log=False,
        timeout_keep_alive=_KEEP_ALIVE, timeout_graceful_shutdown=5, server_header=False, lifespan="off",
        ws="none", http=Connection,
    )  # fmt: skip
    return uvicorn.Server(config)
