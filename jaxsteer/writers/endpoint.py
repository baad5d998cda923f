"""A language model behind an OpenAI-compatible HTTP endpoint: a judge, or a writer of prompts."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxsteer.errors import UserError
from jaxsteer.writers.writer import Advance, Messages

KEY = "OPENAI_API_KEY"
"""Environment variable whose value, if it is set, is sent as the bearer token."""
AGAIN = (408, 409, 429, 500, 502, 503, 504)
"""HTTP states after which asking again may help."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a model is asked: ``url`` up to and including its version, e.g. ``http://127.0.0.1:8000/v1``."""

    url: str
    model: str = ""
    """Its name there (default: the first that the endpoint lists)."""
    timeout_s: float = 60.0
    """Longest wait for one reply."""
    retries: int = 2
    """Further attempts after a failure that may pass."""
    workers: int = 4
    """Requests at the same time."""

    def __post_init__(self) -> None:
        """Refuse what is no address."""
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"{self.url!r} is no address of an endpoint: expected e.g. http://127.0.0.1:8000/v1")

    @functools.cached_property
    def name(self) -> str:
        """The model's name: ``model``, or the first that the endpoint lists, asked for once."""
        if self.model:
            return self.model
        found = self._call("/models", None)
        try:
            return str(found["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{self.url} lists no model: name one") from None

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
        body |= ({"n": n} if n > 1 else {}) | ({} if seed is None else {"seed": seed})
        found = self._call("/chat/completions", body)
        try:
            texts = [str(choice["message"]["content"] or "") for choice in found["choices"]]
        except (KeyError, TypeError):
            raise UserError(f"{self.url} answered without choices: {str(found)[:200]}") from None
        while texts and len(texts) < n:  # some servers ignore n
            more = {**body, "n": 1} | ({} if seed is None else {"seed": seed + len(texts)})
            texts.append(str(self._call("/chat/completions", more)["choices"][0]["message"]["content"] or ""))
        if not texts:
            raise UserError(f"{self.url} answered without choices: {str(found)[:200]}")
        return texts[:n]

    def reply_each(
        self, conversations: Sequence[Messages], *, max_tokens: int = 512, progress: Advance | None = None
    ) -> list[str]:
        """One greedy reply to each conversation, ``workers`` requests at a time."""
        replies: list[str] = []
        with ThreadPoolExecutor(max_workers=self.workers) as pool:
            for (reply,) in pool.map(functools.partial(self.reply, max_tokens=max_tokens), conversations):
                replies.append(reply)
                if progress is not None:
                    progress(len(replies), len(conversations))
        return replies

    def _call(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            self.url.rstrip("/") + path, None if body is None else json.dumps(body).encode(), headers
        )
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    found = json.loads(response.read())
                if not isinstance(found, dict):
                    raise UserError(f"{self.url}{path} answered with no JSON object: {str(found)[:200]}")
                return found
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {error.read(300).decode(errors='replace').strip()}"
                if error.code not in AGAIN:
                    break
            except ValueError as error:
                reason = f"no JSON: {error}"
                break
            except OSError as error:  # refused, unreachable, timed out
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < self.retries:
                time.sleep(min(2.0**attempt, 8.0) / 4)
        raise UserError(
            f"the endpoint {self.url}{path} gives no answer ({reason}); is its address right, and is it up?"
        )
