"""Text and JSON files: the only place that reads them. Every fault is a ``UserError`` that names file and line.

Files come from anywhere, so the sizes that they ask for are bounded: at most ``MAX_BYTES`` of a file, values nested at
most ``MAX_DEPTH`` deep, numbers of at most ``MAX_DIGITS`` digits and within the range of a float64. Text is UTF-8, with
or without a byte order mark; an object names a key once; a string holds whole characters.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from jaxsteer.errors import FileError, UserError
from jaxsteer.files.whole import reading

MAX_BYTES = 1 << 30
MAX_DEPTH = 64
MAX_DIGITS = 300
_PIECES = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)
_LONG_NUMBER = re.compile(rf"\d{{{MAX_DIGITS + 1}}}|[eE]\+?\d{{3}}")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file, without its byte order mark and with ``\\n`` at the ends of lines.

    Raises ``UserError`` for a file that cannot be read, is larger than ``MAX_BYTES``, or is not UTF-8 (with the line).
    """
    try:
        with reading(path), open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileError:
        raise
    except ValueError as error:  # a name that no file can have
        raise UserError(f"{os.fspath(path)!r} is not the name of a file: {error}.") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES >> 20} MiB. Give a smaller file, or split it.")
    return decoded(data, path)


def decoded(data: bytes, where: str | os.PathLike[str]) -> str:
    """The text of UTF-8 bytes, as ``read_text`` gives it; ``where`` names them in the error."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        utf_16 = data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]
        raise UserError(
            f"{where}, line {line}: the text is not UTF-8 ({error.reason} at byte {error.start})"
            f"{'; it looks like UTF-16' if utf_16 else ''}. Save the file as UTF-8."
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file. Raises ``UserError`` for what cannot be read, is not JSON, or is not an object."""
    value = read_json_value(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {kind_of(value)} where a JSON object was expected.")
    return value


def read_json_value(path: str | os.PathLike[str]) -> Any:
    """The JSON value in a file. Raises ``UserError`` for what cannot be read or is not JSON."""
    return parse_json(read_text(path), path)


def read_json_lines(path: str | os.PathLike[str], *, nan: bool = False) -> Iterator[tuple[int, Any]]:
    """(line, value) of every line of a JSON Lines file that is not blank; see ``json_lines``."""
    return json_lines(read_text(path), path, nan=nan)


def json_lines(text: str, where: str | os.PathLike[str], *, nan: bool = False) -> Iterator[tuple[int, Any]]:
    """(line, value) of every line of JSON Lines that is not blank. Raises ``UserError`` with the line."""
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a string may hold U+2028
        if line.strip():
            yield number, parse_json(line, where, line=number, nan=nan)


def parse_json(text: str, where: str | os.PathLike[str], *, line: int | None = None, nan: bool = False) -> Any:
    """The value of a JSON text; ``where`` names the text in errors; ``line`` is where it stands.

    ``nan`` accepts the constants NaN, Infinity and -Infinity, which JSON does not have and Python writes. Raises
    ``UserError`` for all that the heading of this module excludes.
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
        rest = text[error.pos : error.pos + 20]
        what = f"{error.msg}, got {rest!r}" if rest else "it ends too early" if text.strip() else "it is empty"
        _refuse(where, (line or 1) + error.lineno - 1, f"not JSON: {what} at column {error.colno}")
    except RecursionError:
        _refuse(where, line, f"values are nested more than {MAX_DEPTH} deep")
    if _SURROGATE_ESCAPE.search(text):
        _check_surrogates(value, where, line)
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, in the words of JSON: for errors."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


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


def _check_surrogates(value: Any, where: str | os.PathLike[str], line: int | None) -> None:
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            left += [*part, *part.values()]
        elif isinstance(part, list):
            left += part
        elif isinstance(part, str) and (found := _SURROGATE.search(part)):
            _refuse(where, line, f"a string holds half a character (\\u{ord(found[0]):04x}), which is no text")
