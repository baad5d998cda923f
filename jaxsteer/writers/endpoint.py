"""A language model behind an OpenAI-compatible HTTP endpoint: a judge, or a writer of prompts.

The other side is not trusted: no redirect is followed (it would take the key along), a reply has a deadline and a
largest size, and whatever goes wrong is one ``UserError`` that names the URL and never the key. Replies never hold the
key either, though the other side knows it.
"""

from __future__ import annotations

import dataclasses
import functools
import http.client
import json
import os
import random
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from jaxsteer.display import short
from jaxsteer.errors import UserError
from jaxsteer.files import parse_json
from jaxsteer.ranges import CountFrom0
from jaxsteer.writers.writer import Keep, Messages

KEY = "OPENAI_API_KEY"
"""Environment variable whose value, if it is set, is sent as the bearer token."""
AGAIN = (408, 409, 429, 500, 502, 503, 504)
"""HTTP states after which asking again may help."""
NAME_IT = "name one with --judge-model (in Python Endpoint(model=...))"
MAX_BYTES = 16 << 20
"""Of one reply."""
LEAST_KEY = 8
"""Letters of a key that is kept out of replies; what is shorter is no secret ("EMPTY"), and a word of many replies."""
MAX_WAIT_S = 30.0
"""Longest wait before another attempt, whatever the server asks for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a model is asked: ``url`` up to and including its version, e.g. ``http://127.0.0.1:8000/v1``."""

    url: str
    model: str = ""
    """Its name there (default: the first that the endpoint lists)."""
    timeout_s: float = 60.0
    """Longest time for one whole reply, from looking up the host to the last byte."""
    retries: CountFrom0 = 2
    """Further attempts after a failure that may pass."""
    workers: int = 4
    """Requests at the same time."""

    def __post_init__(self) -> None:
        """Refuse what is no address."""
        example = "expected e.g. http://127.0.0.1:8000/v1"
        try:
            parts = urllib.parse.urlsplit(self.url)
            _ = parts.port  # raises where it is no number, or out of range
        except ValueError as error:
            raise UserError(f"{self.url!r} is no address of an endpoint ({error}): {example}") from None
        if parts.username is not None or parts.password is not None:
            raise UserError(f"the address of an endpoint holds a user or password: give the key in {KEY}; {example}")
        plain = self.url.isascii() and self.url.isprintable() and " " not in self.url
        if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
            raise UserError(f"{self.url!r} is no address of an endpoint: {example}")
        if parts.query or parts.fragment:
            raise UserError(f"{parts.geturl().partition('?')[0]!r} has a query or fragment behind it: {example}")

    @functools.cached_property
    def name(self) -> str:
        """The model's name: ``model``, or the first that the endpoint lists, asked for once."""
        if self.model:
            return self.model
        found = self._call("/models", None)
        try:
            return str(found["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{self.url} lists no model: {NAME_IT}") from None

    def reply(
        self,
        messages: Messages,
        n: int = 1,
        *,
        temperature: float = 0.0,
        max_tokens: int = 512,
        seed: int | None = None,
    ) -> list[str]:
        """``n`` replies to chat messages, as texts. Raises ``UserError`` when the endpoint gives none."""
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [dict(message) for message in messages],
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        texts = self._texts(body | ({"n": n} if n > 1 else {}) | ({} if seed is None else {"seed": seed}))
        while len(texts) < n:  # some servers ignore n
            texts += self._texts(body | ({} if seed is None else {"seed": seed + len(texts)}))[:1]
        return texts[:n]

    def reply_each(
        self, conversations: Sequence[Messages], *, max_tokens: int = 512, keep: Keep | None = None
    ) -> list[str]:
        """One greedy reply to each conversation, ``workers`` requests at a time.

        When one fails, those that are under way are still waited for and kept.
        """
        left = list(enumerate(conversations))[::-1]
        came: SimpleQueue[tuple[int, str] | Exception | None] = SimpleQueue()

        def work() -> None:
            while left:
                try:
                    i, messages = left.pop()
                    came.put((i, self.reply(messages, max_tokens=max_tokens)[0]))
                except IndexError:  # another one took the last
                    break
                except Exception as error:
                    came.put(error)
                    break
            came.put(None)

        replies, failure = [""] * len(left), None
        working = min(self.workers, len(left))
        for _ in range(working):
            threading.Thread(target=work, daemon=True).start()  # daemons: Ctrl-C waits for no reply
        try:
            while working:
                match came.get():
                    case None:
                        working -= 1
                    case (i, reply):
                        replies[i] = reply
                        if keep is not None:
                            keep(i, reply)
                    case error:
                        failure = failure or error
                        left.clear()
        finally:
            left.clear()
        if failure is not None:
            raise failure
        return replies

    def _texts(self, body: dict[str, Any]) -> list[str]:
        """The texts of the choices, at least one."""
        found = self._call("/chat/completions", body)
        try:
            texts = [str(choice["message"]["content"] or "") for choice in found["choices"]]
        except (KeyError, TypeError):
            texts = []
        if not texts:
            raise UserError(f"{self.url} answered without choices: {short(found, 200)}")
        return texts

    def _call(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The JSON object that the endpoint answers with."""
        url, key = self.url.rstrip("/") + path, os.environ.get(KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{KEY} holds characters that no key has: set it to the key alone")
        advice = "is its address right, and is it up?"
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            wait = min(2.0**attempt, 8.0) * random.uniform(0.5, 1.0)
            try:
                got = _within(
                    self.timeout_s,
                    functools.partial(_exchange, urllib.request.Request(url, data, headers), self.timeout_s),
                )
            except (http.client.HTTPException, OSError, ValueError, ImportError) as error:
                again = isinstance(error, http.client.HTTPException | OSError)
                reason = str(getattr(error, "reason", error)).strip()
                if not reason or isinstance(error, http.client.HTTPException):
                    reason = f"{type(error).__name__}: {reason}"
            else:
                if len(got.data) > MAX_BYTES:
                    raise UserError(f"{url} answered with more than {MAX_BYTES >> 20} MiB, which is no reply")
                if got.status == 200:
                    found = _value_of(got.data, key, url)
                    if not isinstance(found, dict):
                        raise UserError(f"{url} answered with no JSON object: {short(found, 200)}")
                    return found
                reason = f"HTTP {got.status}: {got.data.decode(errors='replace').strip()}"
                if got.location is not None:
                    reason = f"HTTP {got.status}: it redirects to {got.location}, and no redirect is followed"
                if got.status in (401, 403):
                    advice = f"is the key in the environment variable {KEY} one that it takes?"
                elif got.status == 404 and body is None:
                    advice += f" An endpoint that lists no models: {NAME_IT}"
                again, wait = got.status in AGAIN, max(wait, got.retry_after)
            if not again:
                break
            if attempt < self.retries:
                time.sleep(min(wait, MAX_WAIT_S))
        reason = short(reason.replace(key, "(the key)") if key else reason, 400)
        raise UserError(f"the endpoint {url} gives no answer ({reason}); {advice}")


def _value_of(data: bytes, key: str, url: str) -> Any:
    """The JSON value of a reply without the key, and with "?" for half a character, which no file can hold."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(
            f"{url} answered with bytes that are not UTF-8 (perhaps compressed, which was not asked for); expected "
            "JSON as text: is its address right?"
        ) from None
    for _ in range(2):  # as it came, for the errors; and once no letter of it is written as an escape
        if len(key) >= LEAST_KEY:
            text = text.replace(json.dumps(key)[1:-1], "(the key)")
        text = json.dumps(parse_json(text, url, half=True), ensure_ascii=False)
    return json.loads(text.encode(errors="replace"))


class _Got(NamedTuple):
    status: int
    data: bytes
    location: str | None
    retry_after: float


def _exchange(request: urllib.request.Request, seconds: float) -> _Got:
    """One request and the whole of its reply, up to a little more than ``MAX_BYTES``, through the proxies of the
    environment, if there are any. Raises ``OSError``, ``HTTPException`` or ``ValueError``."""
    until, data = time.monotonic() + seconds, bytearray()
    opener = urllib.request.OpenerDirector()  # without the handlers of redirects, errors, files and FTP
    for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
        opener.add_handler(handler())
    with opener.open(request, timeout=seconds) as response:
        while len(data) <= MAX_BYTES and (piece := response.read1(1 << 16)):
            data += piece
            if time.monotonic() > until:
                raise TimeoutError
        if len(data) <= MAX_BYTES and response.length:
            raise http.client.IncompleteRead(bytes(data), response.length)
        wait = response.headers.get("Retry-After") or ""
        location = response.headers.get("Location") if 300 <= response.status < 400 else None
        return _Got(response.status, bytes(data), location, float(wait) if wait.isascii() and wait.isdigit() else 0.0)


def _within(seconds: float, work: Callable[[], _Got]) -> _Got:
    """What ``work`` returns or raises; ``TimeoutError`` when that takes longer. A thread is left to end by itself: no
    limit of the sockets holds for looking up a host, or for headers that come letter by letter."""
    done: SimpleQueue[_Got | Exception] = SimpleQueue()

    def run() -> None:
        try:
            done.put(work())
        except Exception as error:
            done.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        found = done.get(timeout=seconds)
    except Empty:
        found = TimeoutError()
    if isinstance(found, TimeoutError):
        raise TimeoutError(f"no whole reply within {seconds:g} s")
    if isinstance(found, Exception):
        raise found
    return found
