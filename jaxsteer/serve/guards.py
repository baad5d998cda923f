"""What stands before every request: key, host and origin, size and time of the body, headers of the answer.

Without a key the server listens on the loopback interface alone and answers to its names alone, so that no web page can
reach it under a name of its own (DNS rebinding). A page of another origin is refused in any case.
"""

from __future__ import annotations

import asyncio
import hmac
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxsteer.serve.errors import Refused

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN = ("/health", "/")
"""Paths that need no key, beside those of the page's files."""
MOST_BODY = 4 << 20
SECONDS_FOR_BODY = 30.0
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that is bound to ``host``."""
    return host in LOOPBACK


class Guard:
    """ASGI middleware that does all that."""

    def __init__(self, app: ASGIApp, *, host: str, key: str | None) -> None:
        """``host`` is what the server is bound to; ``key`` is asked of everybody where there is one."""
        self.app, self.key = app, key
        self.names = {*LOOPBACK, host} if is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on with the whole body read."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message.get("headers", [])}
                message["headers"] = [*message.get("headers", []), *(h for h in _HEADERS.items() if h[0] not in own)]
            await send(message)

        try:
            self._check(scope)
            body = await self._body(scope, receive)
        except Refused as refused:
            await refused.response()(scope, receive, guarded)
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()  # which tells that the client has gone
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, guarded)

    def _check(self, scope: Scope) -> None:
        headers: dict[str, str] = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        host = headers.get("host", "")
        if self.names is not None and _name(host) not in self.names:
            raise Refused(f"This server does not answer to the host {host[:80]!r}.", status=403, code="wrong_host")
        if (origin := headers.get("origin")) is not None and urlsplit(origin).netloc != host:
            raise Refused(f"Pages of {origin[:80]!r} may not call this server.", status=403, code="wrong_origin")
        path = scope["path"]
        if self.key is None or path in OPEN or path.startswith("/page/"):
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
            raise Refused("The key is missing or wrong: send Authorization: Bearer KEY.", status=401, code="wrong_key")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        too_large = Refused(f"The body has more than {MOST_BODY} bytes.", status=413, code="body_too_large")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MOST_BODY:
            raise too_large
        parts: list[bytes] = []

        async def read() -> None:
            size = 0
            while True:
                message: Any = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused("The client has gone.", status=408)
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > MOST_BODY:
                    raise too_large
                if not message.get("more_body", False):
                    return

        try:
            await asyncio.wait_for(read(), SECONDS_FOR_BODY)
        except TimeoutError:
            raise Refused("The body came too slowly.", status=408, code="slow_body") from None
        return b"".join(parts)


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host
