"""Text, JSON and CSV files: the only place that reads them. Every fault is a ``UserError`` that names file and line.

Files come from anywhere, so the sizes that they ask for are bounded: at most ``MAX_BYTES`` of a file, values nested at
most ``MAX_DEPTH`` deep, numbers of at most ``MAX_DIGITS`` digits and within the range of a float64. Text is UTF-8, with
or without a byte order mark; an object names a key once; a string holds whole characters.
"""

from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from jaxsteer.errors import FileError, UserError
from jaxsteer.files.whole import open_regular, reading

MAX_BYTES = 1 << 30
MAX_DEPTH = 64
MAX_DIGITS = 300
_PIECES = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)
_LONG_NUMBER = re.compile(rf"\d{{{MAX_DIGITS + 1}}}|[eE]\+?\d{{3}}")
_SPACE = re.compile(r"[ \t\n\r]*")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file, without its byte order mark and with ``\\n`` at the ends of lines; one named .gz is unpacked.

    Raises ``UserError`` for a file that cannot be read, is larger than ``MAX_BYTES`` (unpacked), is no whole gzip file
    though it is named so, or is not UTF-8 (with the line).
    """
    try:
        with reading(path), open_regular(path) as file:
            data = _unpacked(file, path) if os.fspath(path).endswith(".gz") else file.read(MAX_BYTES + 1)
            if data is None:  # a file of /proc that waits for what comes
                raise BlockingIOError(errno.EAGAIN, "it has no end. Give a regular file")
    except FileError:
        raise
    except ValueError as error:  # a name that no file can have
        raise UserError(f"{os.fspath(path)!r} is not the name of a file: {error}.") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES >> 20} MiB. Give a smaller file, or split it.")
    return decoded(data, path)


def _unpacked(file: BinaryIO, where: str | os.PathLike[str]) -> bytes:
    try:
        with gzip.GzipFile(fileobj=file) as unpacked:
            return unpacked.read(MAX_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{where} is no whole gzip file ({error}). Download it again, or give it unpacked.") from None


def decoded(data: bytes, where: str | os.PathLike[str]) -> str:
    """The text of UTF-8 bytes, as ``read_text`` gives it; ``where`` names them in the error."""
    zeros = b"\0\0" in (data[:4:2], data[1:4:2])  # as UTF-16 has them between Latin letters: valid UTF-8
    try:
        if zeros:
            raise UnicodeDecodeError("utf-8", data, 0, 1, "zeros between letters")
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf_16 = zeros or data.startswith((b"\xff\xfe", b"\xfe\xff"))
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{where}, line {line}: the text is not UTF-8 ({error.reason} at byte {error.start})"
            f"{'; it looks like UTF-16' if utf_16 else ''}. Save the file as UTF-8."
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | os.PathLike[str], *, nan: bool = False) -> dict[str, Any]:
    """The JSON object in a file. Raises ``UserError`` for what cannot be read, is not JSON, or is not an object."""
    value = parse_json(read_text(path), path, nan=nan)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {kind_of(value)} where a JSON object was expected.")
    return value


def read_json_lines(path: str | os.PathLike[str], *, nan: bool = False) -> Iterator[tuple[int, Any]]:
    """(line, value) of every line of a JSON Lines file that is not blank; see ``json_lines``."""
    return json_lines(read_text(path), path, nan=nan)


def json_lines(text: str, where: str | os.PathLike[str], *, nan: bool = False) -> Iterator[tuple[int, Any]]:
    """(line, value) of every line of JSON Lines that is not blank. Raises ``UserError`` with the line."""
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a string may hold U+2028
        if line.strip():
            yield number, parse_json(line, where, line=number, nan=nan)


def json_records(text: str, where: str | os.PathLike[str], *, nan: bool = False) -> Iterator[tuple[int, Any]]:
    """(line, record) of a JSON list, of JSON Lines, or of one object over several lines; the line is the first one.

    Raises ``UserError`` with the line.
    """
    first, _, rest = text.lstrip().partition("\n")
    if first.startswith("[") and not (rest.strip() and _is_json(first)):
        return _list(text, where, nan)
    if not _is_json(first) and (first.strip() == "{" or _is_json(text)):
        start = len(text) - len(text.lstrip())
        return iter([(1 + text.count("\n", 0, start), parse_json(text, where, nan=nan))])
    return json_lines(text, where, nan=nan)


def _is_json(text: str) -> bool:
    try:
        parse_json(text, "", nan=True)
    except UserError:
        return False
    return True


def _list(text: str, where: str | os.PathLike[str], nan: bool) -> Iterator[tuple[int, Any]]:
    _check_depth(text, where, None)
    end_of = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode

    def next_one(at: int) -> int:
        return _SPACE.match(text, at).end()  # type: ignore[union-attr]

    line, counted, at = 1, 0, next_one(text.index("[") + 1)
    more = text[at : at + 1] != "]"
    while more:
        line, counted = line + text.count("\n", counted, at), at
        try:
            end = end_of(text, at)[1]
        except json.JSONDecodeError as error:
            _refuse_syntax(text, error, where, 1)
        yield line, parse_json(text[at:end], where, line=line, nan=nan)
        at = next_one(end)
        more = text[at : at + 1] == ","
        if more:
            at = next_one(at + 1)
        elif text[at : at + 1] != "]":
            _refuse_syntax(text, json.JSONDecodeError("Expecting ',' delimiter", text, at), where, 1)
    if (at := next_one(at + 1)) < len(text):
        _refuse_syntax(text, json.JSONDecodeError("Extra data", text, at), where, 1)


def csv_records(text: str, where: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, str | None]]]:
    """(line, row) of every row of a CSV text whose first line names the columns; a cell that is missing is ``None``.

    Raises ``UserError`` with the line, also for a column that is named twice, for another separator than the
    comma and for more values than columns.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        columns = [column.strip() for column in reader.fieldnames or []]
        if twice := next((c for c in columns if c and columns.count(c) > 1), None):
            _refuse(where, 1, f"there are two columns {twice!r}, so that the values of one are lost")
        if len(columns) == 1 and re.search("[;\t]", columns[0]):
            _refuse(where, 1, f"there is one column, {columns[0]!r}: values must be separated by commas")
        reader.fieldnames, before = columns, reader.line_num
        for row in reader:
            if any(cell.strip() for cell in row.pop(None, None) or ()):
                _refuse(
                    where,
                    before + 1,
                    f"there are more values than there are columns ({', '.join(columns)}): quote a value with commas",
                )
            yield before + 1, row
            before = reader.line_num  # a quoted field may run over several lines
    except csv.Error as error:
        raise UserError(f"{where}, line {reader.line_num}: not CSV: {error}") from error


def read_log(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], bool]:
    """The objects of a JSON Lines file that a process adds to, and whether its last line was cut and left out.

    A process that ends while it writes leaves a part of a line, which may end inside a character. Raises ``UserError``
    for a file that cannot be read and for any other line that is no object.
    """
    with reading(path), open(path, "rb") as file:
        lines = file.read().split(b"\n")
    rows: list[dict[str, Any]] = []
    for number, data in enumerate(lines, 1):
        if not data.strip():
            continue
        try:
            value = parse_json(decoded(data, path), path, line=number, nan=True)
        except UserError:
            if any(line.strip() for line in lines[number:]):
                raise
            return rows, True
        if not isinstance(value, dict):
            _refuse(path, number, f"an object was expected, found {kind_of(value)}")
        rows.append(value)
    return rows, False


def parse_json(
    text: str, where: str | os.PathLike[str], *, line: int | None = None, nan: bool = False, half: bool = False
) -> Any:
    """The value of a JSON text; ``where`` names the text in errors; ``line`` is where it stands.

    ``nan`` accepts the constants NaN, Infinity and -Infinity, which JSON does not have and Python writes; ``half``
    accepts strings with half a character. Raises ``UserError`` for all else that the heading of this module excludes.
    """
    _check_depth(text, where, line)
    hooks: dict[str, Any] = {"object_pairs_hook": lambda pairs: _object(pairs, where, line)}
    if _LONG_NUMBER.search(text):
        hooks |= {kind: lambda digits, kind=kind: _number(digits, kind, where, line) for kind in _NUMBERS}
    if not nan:
        hooks["parse_constant"] = lambda name: _refuse(where, line, f"{name} is not a number of JSON")
    try:
        value = json.loads(text, **hooks)
    except json.JSONDecodeError as error:
        _refuse_syntax(text, error, where, line or 1)
    except RecursionError:
        _refuse(where, line, f"values are nested more than {MAX_DEPTH} deep")
    if not half and _SURROGATE_ESCAPE.search(text):
        check_surrogates(value, where, line)
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, in the words of JSON: for errors."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def _refuse_syntax(text: str, error: json.JSONDecodeError, where: str | os.PathLike[str], line: int) -> NoReturn:
    rest = text[error.pos : error.pos + 20]
    what = f"{error.msg}, got {rest!r}" if rest else "it ends too early" if text.strip() else "it is empty"
    _refuse(where, line + error.lineno - 1, f"not JSON: {what} at column {error.colno}")


def _refuse(where: str | os.PathLike[str], line: int | None, why: str) -> NoReturn:
    raise UserError(f"{where}{'' if line is None else f', line {line}'}: {why}.")


def _object(pairs: list[tuple[str, Any]], where: str | os.PathLike[str], line: int | None) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        _refuse(where, line, f"the key {twice[:80]!r} occurs twice in one object, so that one of its values is lost")
    return found


def _number(digits: str, kind: str, where: str | os.PathLike[str], line: int | None) -> int | float:
    if len(digits) <= MAX_DIGITS:
        value = _NUMBERS[kind](digits)
        if abs(value) != float("inf"):
            return value
    _refuse(where, line, f"the number {digits[:20]}{'…' if len(digits) > 20 else ''} is out of range")


_NUMBERS: dict[str, Any] = {"parse_int": int, "parse_float": float}


def _check_depth(text: str, where: str | os.PathLike[str], line: int | None) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for piece in _PIECES.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(piece[0], 0)
        if depth > MAX_DEPTH:
            _refuse(
                where, (line or 1) + text.count("\n", 0, piece.start()), f"values are nested more than {MAX_DEPTH} deep"
            )


def check_surrogates(value: Any, where: str | os.PathLike[str], line: int | None = None) -> None:
    """Raise ``UserError`` for a text inside a value that holds half a character (a surrogate), which no UTF-8 has."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            left += [*part, *part.values()]
        elif isinstance(part, list):
            left += part
        elif isinstance(part, str) and (found := _SURROGATE.search(part)):
            _refuse(where, line, f"a string holds half a character (\\u{ord(found[0]):04x}), which is no text")
