"""Records of a dataset file, each with where it stands: CSV, JSON Lines, a JSON list, Parquet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxsteer.errors import UserError
from jaxsteer.files import csv_records, json_records, kind_of, read_text

Row = tuple[int, dict[str, Any]]
"""(line, record); in a Parquet file, and in a list inside an object, the number of the row."""


def place(path: Path, line: int) -> str:
    """How an error names a record."""
    return f"{path}, {'row' if path.suffix.lower() == '.parquet' else 'line'} {line}"


def read_rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    """(line, record) of every record, in order; the format follows from the name and, for JSON, the first character.

    A JSON object may hold the records as a list under "data".

    ``fields`` are named where a file is not what was expected; a CSV file must have them all as columns. Raises
    ``UserError``, with the line, for what cannot be read.
    """
    if not path.is_file():
        raise UserError(f"the dataset {path} does not exist")
    if path.suffix.lower() == ".parquet":
        yield from _parquet_rows(path)
        return
    text = read_text(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        yield from _csv_rows(path, text, fields)
    else:
        for line, row in json_records(text, path, nan=True):
            inner = row.get("data") if isinstance(row, dict) else None
            for at, record in enumerate(inner, 1) if isinstance(inner, list) else [(line, row)]:
                yield at, _object(path, at, record, fields)


def require(path: Path, line: int, row: dict[str, Any], fields: Sequence[str]) -> None:
    """Raise ``UserError`` unless all ``fields`` of the record are texts with something in them."""
    missing = [field for field in fields if not isinstance(row.get(field), str) or not row[field].strip()]
    if missing:
        raise UserError(
            f"{place(path, line)}: missing or empty {', '.join(missing)}; expected {', '.join(fields)}, "
            f"and the row has {', '.join(sorted(map(str, row))) or 'nothing'}"
        )


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path} is a Parquet file, and reading one needs pyarrow: pip install pyarrow, or give the "
            f"same data as CSV or JSON Lines"
        ) from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from error
    yield from enumerate(table.to_pylist(), 1)


def _csv_rows(path: Path, text: str, fields: Sequence[str]) -> Iterator[Row]:
    for line, row in csv_records(text, path):
        if missing := [field for field in fields if field not in row]:
            raise UserError(
                f"{path}, line 1: no column {', '.join(missing)}; found {', '.join(row)} (a public dataset is "
                f"read by its name, NAME:{path}: see jaxsteer data list)"
            )
        yield line, row


def _object(path: Path, line: int, row: object, fields: Sequence[str]) -> dict[str, Any]:
    if not isinstance(row, dict):
        wanted = f"an object with {', '.join(fields or ('a question', 'two answers'))}"
        raise UserError(f"{place(path, line)}: expected {wanted}, got {kind_of(row)}: {str(row)[:60]!r}")
    return row
