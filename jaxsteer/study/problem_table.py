"""Many searches as rows: the product that ``--vary`` asks for, or a table from a file."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from jaxsteer.errors import UserError

COLUMNS = ("persona", "method", "direction", "site", "fluency", "seed", "restart")
"""What may differ between the searches of one command."""
NUMBERS = ("seed", "restart")
MOST = 1_000_000


def rows_of(vary: Sequence[str], table: Path | None, options: Any) -> list[dict[str, Any]]:
    """One dict per search, with those of ``COLUMNS`` that were given; the last of ``--vary`` changes fastest.

    ``options`` has the fields that the values replace, with their types. Raises ``UserError`` for an unknown column, a
    value that its column cannot have, a file that cannot be read, and rows that say the same.
    """
    if vary and table is not None:
        raise UserError("--vary and --problems both say which searches to do: give one of them")
    rows = _product(vary) if table is None else _read(table)
    kinds = get_type_hints(type(options))
    for number, row in enumerate(rows):
        where = f"--vary {' '.join(vary)}" if table is None else f"{table}, problem {number}"
        if unknown := sorted(row.keys() - set(COLUMNS)):
            raise UserError(f"{where}: there is no column {', '.join(unknown)}; there are {', '.join(COLUMNS)}")
        for name, value in row.items():
            allowed = get_args(kinds[name]) if name in kinds else ()
            if allowed and isinstance(allowed[0], str) and value not in allowed:
                raise UserError(f"{where}: {name} is {value!r}, but may be {', '.join(allowed)}")
    seen: dict[str, int] = {}
    for number, row in enumerate(rows):
        if (first := seen.setdefault(json.dumps(row, sort_keys=True), number)) != number:
            raise UserError(f"problems {first} and {number} are the same: give them another seed or restart")
    return rows


def _product(vary: Sequence[str]) -> list[dict[str, Any]]:
    columns: dict[str, list[Any]] = {}
    for entry in vary:
        name, _, text = entry.partition("=")
        if not text or name in columns:
            raise UserError(f"--vary expects name=value,value,... once per name, got {entry!r}")
        columns[name] = [value for part in text.split(",") for value in _values(name, part, entry)]
    size = 1
    for values in columns.values():
        size *= len(values)
    if size > MOST:
        raise UserError(f"--vary {' '.join(vary)} makes {size} searches; at most {MOST} are possible")
    return [dict(zip(columns, values, strict=True)) for values in itertools.product(*columns.values())]


def _values(name: str, text: str, entry: str) -> list[Any]:
    if name not in NUMBERS:
        return [text.strip()]
    try:
        if ":" in text:
            low, high = text.split(":")
            found = list(range(int(low), int(high)))
            if not found:
                raise ValueError
            return found
        return [int(text)]
    except ValueError:
        raise UserError(f"--vary {entry}: {text!r} is neither a number nor a range A:B with A below B") from None


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--problems {path} cannot be read: {error}") from error
    rows: list[Mapping[str, Any]] = []
    if path.suffix == ".csv":
        rows = [row for row in csv.DictReader(text.splitlines())]
    elif path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            try:
                rows.append(json.loads(line) if line.strip() else {})
            except ValueError as error:
                raise UserError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(rows[-1], dict):
                raise UserError(f"{path}, line {number} is not a JSON object")
        rows = [row for row in rows if row]
    else:
        raise UserError(f"--problems expects a .csv or .jsonl file, got {path}")
    if not rows:
        raise UserError(f"--problems {path} holds no problem")
    return [_typed(row, path, number) for number, row in enumerate(rows)]


def _typed(row: Mapping[str, Any], path: Path, number: int) -> dict[str, Any]:
    if None in row:
        raise UserError(f"{path}, problem {number} has more values than there are columns")
    found: dict[str, Any] = {}
    for name, value in row.items():
        if value is None or value == "":
            continue  # as in the options
        try:
            found[name] = int(value) if name in NUMBERS else str(value)
        except (TypeError, ValueError):
            raise UserError(f"{path}, problem {number}: {name} is {value!r}, not a whole number") from None
    return found
