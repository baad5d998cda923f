"""Files of a run: written whole or not at all, never over another run's, and of several processes by the first."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxsteer.files import append_text, read_log, write_text
from jaxsteer.processes import is_first

CONFIG, PROGRESS = "config.json", "progress.jsonl"
DIRECTION, SIGNATURE, SOFT = "direction.safetensors", "signature.safetensors", "soft.safetensors"
PARETO, METRICS, CHOICES, REPORT = "pareto.jsonl", "metrics.json", "choices.json", "report.html"
REPLIES, PERSONA = "replies.json", "persona.json"
JUDGED = "judged.jsonl"
"""Replies of a judge as they come."""
STATE, PROBED = "search-state", "probe-state"
"""Directories of what a search and a probe that are cut off need to go on."""
FORMAT = "jaxsteer.run/1"
TABLE_FORMAT = "jaxsteer.study/1"
"""Of results.json, the table of many searches or methods (docs/report.md)."""

RunDir = str | Path
"""Where the files of a run go: a directory, or the URL of a place in an object store, which stays a text (a path would
take gs:// for gs:/)."""


def plain(value: Any) -> Any:
    """``value`` with what JSON cannot hold replaced: NaN and infinities become ``None``, NumPy numbers plain ones."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def document(value: Any) -> str:
    """One JSON document, indented."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """A file of one JSON document."""
    text = document(value) + "\n"
    if is_first():
        write_text(path, text)


def line(value: Any) -> str:
    """One line of a JSON Lines file."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False) + "\n"


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """JSON Lines."""
    text = "".join(line(row) for row in rows)
    if is_first():
        write_text(path, text)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a JSON Lines file; none of a file that is not there. A last line that was cut is left out."""
    return read_log(path)[0] if path.exists() else []


def resumed_lines(path: Path) -> list[dict[str, Any]]:
    """``read_lines`` of a log that is written on: a last line that was cut is taken out of the file first."""
    rows, cut = read_log(path) if path.exists() else ([], False)
    if cut:
        write_lines(path, rows)
    return rows


def append_line(path: Path, row: Any) -> None:
    """Add a row to a JSON Lines file."""
    if is_first():
        append_text(path, line(row))
