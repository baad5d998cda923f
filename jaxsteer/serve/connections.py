"""The door, and one connection: how long the head of a request may take, and refusals before there is a request."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxsteer.errors import UserError
from jaxsteer.serve.errors import Refused

SECONDS_FOR_HEAD = 15.0


def listening(host: str, port: int) -> socket.socket:
    """A socket at this address that nobody is answered at yet; port 0 is any that is free.

    Raises ``UserError`` for an address that is no address of this machine, or is in use."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port} is no address: {error}") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise UserError(
            f"nothing can listen at {host}, port {port}: {error.strerror}; give another --port (0: any that is free)"
        ) from None
    return found


class Connection(H11Protocol):
    """Uvicorn's own, which waits for the head of a request for ever, and says in plain text what is no HTTP."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Wait on, or not where the head is whole."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._stop()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self._refuse(Refused("This is no request of HTTP/1.1.", code="not_http"))

    def _watch(self) -> None:
        if self.transport.is_closing() or self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._late is None:
            self._late = self.loop.call_later(SECONDS_FOR_HEAD, self._end)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _end(self) -> None:
        self._late = None
        if self.conn.trailing_data[0]:
            self._refuse(Refused("The head of the request came too slowly.", status=408, code="slow_head"))
        else:  # nothing was asked
            self.transport.close()

    def _refuse(self, refused: Refused) -> None:
        if self.transport.is_closing():
            return
        body = json.dumps(refused.body()).encode()
        status = {400: "400 Bad Request", 408: "408 Request Timeout"}[refused.status]
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()
