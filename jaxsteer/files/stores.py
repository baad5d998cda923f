"""Files in object stores: ``gs://bucket/name``, ``s3://bucket/name`` and whatever else TensorStore has a URL for.

An object is written whole or not at all. Credentials are those of TensorStore's drivers: Google's application default
credentials, AWS' environment and configuration files.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxsteer.errors import UserError

PATIENCE_S = 300.0
"""How long a store may take to answer."""
_PROBE = "jaxsteer-may-write-here"


def is_url(source: str) -> bool:
    """Whether ``source`` names a place in a store rather than a file."""
    return re.match(r"[a-z][a-z0-9+.-]*://", source) is not None


class Bucket:
    """The objects under a URL, by the rest of their names. Its methods raise ``UserError`` when the store fails."""

    def __init__(self, url: str) -> None:
        if url.startswith(("http://", "https://")):  # TensorStore would ask for minutes
            raise UserError(
                f"{url} is a page of the web, which is no place of models and results: give a directory, or a place in "
                "an object store (gs://bucket/name, s3://bucket/name); a model of the Hugging Face hub is owner/name."
            )
        import tensorstore as ts

        self.url = url.rstrip("/")
        self._range = ts.KvStore.KeyRange
        self._store = self._result(lambda: ts.KvStore.open(f"{self.url}/"), "read")

    def names(self, *, but: str | None = None) -> Iterator[str]:
        """All names, those in the folder ``but`` left out."""
        ranges = [self._range("", "")]
        if but is not None:
            ranges = [self._range("", f"{but}/"), self._range(but + chr(ord("/") + 1), "")]
        for range_ in ranges:
            for key in self._result(functools.partial(self._store.list, range_), "read"):
                name = key.decode()
                if name != _PROBE and name and not name.endswith("/"):  # which consoles put there for a folder
                    yield name

    def read(self, name: str) -> bytes | None:
        """An object, or ``None`` if there is none of that name."""
        found = self._result(lambda: self._store.read(name), "read")
        return None if found.state == "missing" else bytes(found.value)

    def write(self, name: str, data: bytes | None, *, patience_s: float = PATIENCE_S) -> None:
        """Write an object in place of any other; ``None`` deletes it."""
        self._result(lambda: self._store.write(name, data), "written", patience_s)

    def check_writable(self) -> None:
        """Write an object and delete it."""
        self.write(_PROBE, b"")
        self.write(_PROBE, None)

    def _result(self, start: Callable[[], Any], done: str, patience_s: float = PATIENCE_S) -> Any:
        began = time.monotonic()
        try:
            return start().result(timeout=patience_s)
        except (ValueError, OSError, NotImplementedError) as error:  # TensorStore's; TimeoutError is an OSError
            waited = f"no answer in {time.monotonic() - began:.0f} s"
            reason = (str(error).strip().splitlines() or [waited])[0]
            raise UserError(
                f"{self.url} cannot be {done} ({reason}). Check the address, the access rights and the network."
            ) from error
