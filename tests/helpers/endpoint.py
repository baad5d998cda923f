"""An OpenAI-compatible endpoint on loopback, for as long as a test needs it."""

from __future__ import annotations

import contextlib
import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], str | list[str] | int]
"""From the request's body to a reply, several, or an HTTP state to fail with."""


@contextlib.contextmanager
def endpoint(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(address, the requests that came) of a server that answers chat completions with ``answer``."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def _send(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "loopback-1"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body | {"path": self.path, "authorization": self.headers.get("Authorization")})
            found = answer(body)
            if isinstance(found, int):
                self._send(found, {"error": "as the test wants it"})
                return
            texts = [found] if isinstance(found, str) else found
            self._send(200, {"choices": [{"message": {"role": "assistant", "content": text}} for text in texts]})

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@contextlib.contextmanager
def raw_server(reply: bytes | tuple[bytes, bytes]) -> Iterator[tuple[str, list[bytes]]]:
    """(address, the requests that came) of a server that sends these bytes whatever is asked; of two, the
    second again and again."""
    asked: list[bytes] = []
    stop = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            data = b""
            while not data.endswith(b"}") and not (data.startswith(b"GET") and data.endswith(b"\r\n\r\n")):
                data += self.request.recv(1 << 16)  # all of it: who closes a socket with unread data resets it
            asked.append(data)
            with contextlib.suppress(OSError):
                self.request.sendall(reply if isinstance(reply, bytes) else reply[0])
                while not isinstance(reply, bytes) and not stop.wait(0.02):
                    self.request.sendall(reply[1])

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
        thread.join(5)
