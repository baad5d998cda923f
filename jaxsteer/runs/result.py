"""``Result``: what a piece of work found, as an object that shows itself."""

from __future__ import annotations

import html
import importlib
from typing import Any

from jaxsteer.errors import UserError
from jaxsteer.files.records import Record


class Result(Record):
    """A record that shows itself: as text, in a notebook, and as rows for pandas."""

    def table(self) -> str:
        """The numbers as aligned text."""
        raise NotImplementedError

    def to_rows(self) -> list[dict[str, Any]]:
        """The same as flat rows: plain values by the name of their column."""
        raise NotImplementedError

    def to_frame(self) -> Any:
        """``to_rows`` as a ``pandas.DataFrame``. Raises ``UserError`` where pandas is not installed."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError:
            raise UserError("to_frame needs pandas, which is not installed: pip install pandas") from None
        return pandas.DataFrame(self.to_rows())

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.table())}</pre>"


KEPT = "What came is kept in {}: the same command goes on."


class Unfinished(UserError):
    """The judge gave no answer. ``result`` holds what was measured before."""

    def __init__(self, message: str, result: Result, kept: str = "") -> None:
        """As the message says; ``kept`` is a sentence that follows it."""
        stop = "" if message.endswith((".", "?")) else "."
        super().__init__(f"{message}{stop} {kept}" if kept else message)
        self.result = result
