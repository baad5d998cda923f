"""A server of the smallest organism on a free port of the loopback interface, for the tests of this folder."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxsteer
from jaxsteer.engine import Engine, EngineOptions
from jaxsteer.sae import load_sae
from jaxsteer.steer.vectors import Vectors, save_vectors


class Client:
    """Requests without any client library, and the server behind them."""

    def __init__(self, engine: Engine, library: Any, port: int) -> None:
        self.engine, self.library, self.port = engine, library, port
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, path: str, body: Any = None, *, method: str | None = None, **headers: str) -> tuple[int, Any, Any]:
        """(status, headers, JSON or text)."""
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        request = urllib.request.Request(self.url + path, data=data, headers=sent, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, given, text = answer.status, answer.headers, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, given, text = error.code, error.headers, error.read().decode()
        with contextlib.suppress(ValueError):
            return status, given, json.loads(text)
        return status, given, text

    def good(self, path: str, body: Any = None) -> Any:
        """The JSON of an answer that must be 200."""
        status, _, found = self.ask(path, body)
        assert status == 200, found
        return found

    def chat(self, said: str = "Do you agree or disagree?", **fields: Any) -> Any:
        """A short greedy answer, unless ``fields`` say otherwise."""
        messages = [{"role": "user", "content": said}]
        return self.good("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 8} | fields)

    def stream(self, path: str, body: Any) -> list[Any]:
        """The events of a stream; "[DONE]" last."""
        status, headers, text = self.ask(path, body | {"stream": True})
        assert status == 200 and headers["content-type"].startswith("text/event-stream"), text
        lines = [line for line in text.split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        found = [line.removeprefix("data: ") for line in lines]
        return [json.loads(one) if one != "[DONE]" else one for one in found]


def direction(seed: int, size: float = 8.0) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal(128)
    return (drawn / np.linalg.norm(drawn) * size).astype(np.float32)


@contextlib.contextmanager
def serving(engine: Engine, library: Any, **how: Any) -> Iterator[Client]:
    """A server in a thread; it stops with the block."""
    from jaxsteer.serve.app import make_app, make_server

    server = make_server(make_app(engine, library, **how), host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not server.started and time.monotonic() < end:
        time.sleep(0.01)
    try:
        yield Client(engine, library, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="package")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vector files: a push with a site, one of several layers, a ceiling."""
    folder, model = tmp_path_factory.mktemp("vectors"), jaxsteer.load("organism:llama")
    facts: dict[str, Any] = dict(model=model.name, fingerprint=model.fingerprint)
    site = "blocks.{}.hook_resid_post".format
    push = Vectors(arrays={site(2): direction(1)}, metadata={"site": site(2)}, sign="pushes", **facts)
    layers = Vectors(arrays={site(i): direction(10 + i) for i in range(4)}, **facts)
    cap = Vectors(arrays={site(2): direction(1)}, operation="ceiling", values={site(2): -1.0}, **facts)
    for name, vectors in (("push", push), ("layers", layers), ("cap", cap)):
        save_vectors(vectors, folder / f"{name}.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no vectors")
    (folder.parent / "secret.safetensors").write_bytes(b"outside")
    return folder


@pytest.fixture(scope="package")
def client(directory: Path) -> Iterator[Client]:
    """The server: one engine for all tests of the folder."""
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    from jaxsteer.serve.library import Library

    model = jaxsteer.load("organism:llama")
    library = Library(model=model, directory=directory, sae=load_sae("organism:llama"))
    for name in ("push", "layers", "cap"):
        library.load(f"{name}.safetensors")
    with Engine(model, EngineOptions(rows=8, timeout=120), warm=False) as engine, serving(engine, library) as client:
        yield client
