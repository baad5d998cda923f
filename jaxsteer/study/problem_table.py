"""Many searches as rows: the product that ``--vary`` asks for, or a table from a file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxsteer.errors import UserError
from jaxsteer.files import csv_records, kind_of, read_json_lines, read_text
from jaxsteer.study.option_values import convert_value
from jaxsteer.study.options import KINDS, ProblemOptions, SearchOptions

COLUMNS = ("persona", "goal", "method", "direction", "site", "fluency", "seed", "restart")
"""What may differ between the searches of one command."""
NUMBERS = ("seed", "restart")
MOST = 1_000_000


def rows_of(options: ProblemOptions) -> list[dict[str, Any]]:
    """One dict per search, with those of ``COLUMNS`` that were given; the last of ``--vary`` changes fastest.

    Raises ``UserError`` for an unknown column, a value that its column cannot have, a file that cannot be read, and
    rows that say the same.
    """
    vary, table = options.vary, options.problems
    if vary and table is not None:
        raise UserError("--vary and --problems both say which searches to do: give one of them")
    rows: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for number, row in enumerate(_product(vary) if table is None else _read(table)):
        where = f"--vary {' '.join(vary)}" if table is None else f"{table}, problem {number}"
        if unknown := sorted(row.keys() - set(COLUMNS)):
            raise UserError(f"{where}: there is no column {', '.join(unknown)}; there are {', '.join(COLUMNS)}")
        given = {name: value for name, value in row.items() if value not in (None, "")}
        try:
            rows.append({name: convert_value(name, KINDS.get(name, int), value) for name, value in given.items()})
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if (first := seen.setdefault(json.dumps(rows[-1], sort_keys=True), number)) != number:
            raise UserError(f"problems {first} and {number} are the same: give them another seed or restart")
    return rows


def number_of_searches(options: SearchOptions) -> int:
    """How many populations there will be: problems, or restarts."""
    return len(rows_of(options.problems)) if options.problems.several else options.algorithm.restarts


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
    low, colon, high = text.partition(":")
    try:
        first, end = int(low), int(high if colon else low) + (not colon)
    except ValueError:
        first, end = 0, 0
    if first >= end:
        raise UserError(f"--vary {entry}: {text!r} is neither a number nor a range A:B with A below B")
    if end - first > MOST:
        raise UserError(f"--vary {entry} makes {end - first} searches; at most {MOST} are possible")
    return list(range(first, end))


def _read(path: Path) -> list[dict[Any, Any]]:
    if path.suffix == ".csv":
        rows: list[dict[Any, Any]] = [row for _, row in csv_records(read_text(path), path)]
    elif path.suffix == ".jsonl":
        rows = []
        for line, row in read_json_lines(path):
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {line} is {kind_of(row)}, not a JSON object")
            rows.append(row)
    else:
        raise UserError(f"--problems expects a .csv or .jsonl file, got {path}")
    if not rows:
        raise UserError(f"--problems {path} holds no problem")
    return rows
