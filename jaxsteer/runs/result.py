"""``Result``: what a piece of work found, as an object that shows itself."""

from __future__ import annotations

import html
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from jaxsteer.errors import UserError
from jaxsteer.files import make_directory, write_bytes
from jaxsteer.files.records import Record


class Shown:
    """What shows itself: as text, in a notebook, and as rows for pandas."""

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


class Result(Shown, Record):
    """A record that shows itself, and that files hold."""

    _files: ClassVar[Mapping[str, bytes]] = {}

    def with_files(self, files: Mapping[str, bytes]) -> Result:
        """The result itself, which from now on can be saved: ``files`` are those of its directory, by name."""
        object.__setattr__(self, "_files", files)
        return self

    def save(self, out: str | os.PathLike[str]) -> Path:
        """Write the directory that the work would have written with ``out``, for ``jaxsteer report`` and others.

        Raises ``UserError`` where ``out`` is there and not empty, and for a result whose files are on the disk already
        or that was read from one."""
        path = Path(out)
        if not self._files:
            raise UserError("there is nothing to save: this result was made with out=..., or read, and its files exist")
        if path.exists() and any(path.iterdir()):
            raise UserError(f"{path} is not empty: give a new directory")
        for name, content in self._files.items():
            make_directory((path / name).parent)
            write_bytes(path / name, content)
        return path


KEPT = "What came is kept in {}: the same command goes on."


class Unfinished(UserError):
    """The judge gave no answer. ``result`` holds what was measured before."""

    def __init__(self, message: str, result: Result, kept: str = "") -> None:
        """As the message says; ``kept`` is a sentence that follows it."""
        stop = "" if message.endswith((".", "?")) else "."
        super().__init__(f"{message}{stop} {kept}" if kept else message)
        self.result = result
