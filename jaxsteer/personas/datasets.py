"""Persona datasets: built-in names, Anthropic JSON Lines, CAA lists and CSV."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxsteer.errors import UserError
from jaxsteer.personas.items import LABELS, Item, Persona, count_choices, data_hash, group_of, swap

log = logging.getLogger(__name__)

BUILT_IN_ITEMS = 600
"""Questions of a built-in persona."""
FIELDS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
_LETTER = re.compile(r"\(?([A-Z])\)?[.:]?")

Row = tuple[int, dict[str, Any]]


def load_persona(
    name_or_path: str | os.PathLike[str],
    *,
    counter_cues: Sequence[str] = (),
    pro_cues: Sequence[str] = (),
    n: int = BUILT_IN_ITEMS,
    seed: int = 0,
) -> Persona:
    """A persona by built-in name or from a file.

    Built-in (no network; generated, ``n`` questions from ``seed``): sycophancy, hallucination, myopic. Files: JSON
    Lines or a JSON list in the Anthropic schema (question, answer_matching_behavior, answer_not_matching_behavior;
    labels with or without spaces), the same as CSV, or a persona file ``{"name", "data", "counter_cues",
    "pro_cues"}`` whose ``data`` is a path beside it. ``counter_cues`` and ``pro_cues`` replace those of the source.
    Exact duplicates and questions with other than two choices are dropped and counted in the log. Raises
    ``UserError``, with the line, for anything else that is wrong.
    """
    from jaxsteer import organisms  # here, so that files can be read without the generator

    name = str(name_or_path)
    if name in organisms.BEHAVIOURS:
        rows = organisms.items(name, n=n, seed=seed, split="held_out")
        return _persona(
            name,
            tuple(Item(**dict[str, Any](row)) for row in rows),
            counter_cues or organisms.counter_cues(name),
            pro_cues or organisms.pro_cues(name),
            "generated for the organisms that ship with jaxsteer",
        )
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"unknown persona {name!r}: expected {', '.join(organisms.BEHAVIOURS)}, or the path of a .jsonl, .json or "
            f".csv file (there is no file of this name)"
        )
    description = path.stem
    if path.suffix == ".json":
        whole = _json_object(path)
        if whole is not None:
            description = str(whole.get("description", path.stem))
            counter_cues = counter_cues or _sentences(path, whole, "counter_cues")
            pro_cues = pro_cues or _sentences(path, whole, "pro_cues")
            name, path = str(whole.get("name", path.stem)), path.parent / str(whole["data"])
            return _persona(name, read_items(path), counter_cues, pro_cues, description)
    return _persona(path.stem, read_items(path), counter_cues, pro_cues, description)


def _persona(
    name: str, items: tuple[Item, ...], counter: Sequence[str], pro: Sequence[str], description: str
) -> Persona:
    return Persona(
        name=name,
        items=items,
        counter_cues=tuple(counter),
        pro_cues=tuple(pro),
        data_hash=data_hash(items),
        description=description,
    )


def _json_object(path: Path) -> dict[str, Any] | None:
    """The file as one JSON object with a "data" key, or ``None`` for lists and JSON Lines."""
    text = _text(path)
    if not text.lstrip().startswith("{"):
        return None
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return None  # JSON Lines, or broken: the row reader names the line
    if isinstance(whole, dict) and "data" in whole:
        return whole
    return None


def _sentences(path: Path, whole: dict[str, Any], key: str) -> tuple[str, ...]:
    value = whole.get(key, [])
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise UserError(f"{path}: {key} must be a list of sentences, got {value!r}")
    return tuple(value)


def read_items(path: str | os.PathLike[str]) -> tuple[Item, ...]:
    """The two-choice items of a dataset file, in its order. Raises ``UserError`` naming file and line."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the dataset {path} does not exist")
    items: list[Item] = []
    by_group: dict[str, Item] = {}
    seen: dict[tuple[str, str], int] = {}
    duplicates = others = rows = 0
    for line, row in _rows(path):
        rows += 1
        _require(path, line, row)
        question = row["question"].strip()
        if count_choices(question) > 2:
            others += 1
            continue
        matching, not_matching = (_label(path, line, row, field) for field in FIELDS[1:])
        if matching == not_matching:
            raise UserError(f"{path}, line {line}: both answers are {matching}; they must differ")
        if count_choices(question) != 2:
            others += 1
            continue
        item = Item(
            id=str(row.get("id") or f"{path.stem}-{line}"),
            question=question,
            matching=matching,
            not_matching=not_matching,
            group=group_of(question),
            line=line,
        )
        if (question, matching) in seen:
            duplicates += 1
            continue
        _refuse_contradiction(path, item, by_group.setdefault(item.group, item))
        seen[question, matching] = line
        items.append(item)
    if not rows:
        raise UserError(f"{path} is empty: expected one question per line with {', '.join(FIELDS)}")
    if duplicates or others:
        log.warning(
            "%s: dropped %d exact duplicates and %d questions that do not offer two choices; %d of %d rows are used",
            path, duplicates, others, len(items), rows,
        )  # fmt: skip
    if not items:
        raise UserError(f"{path}: none of its {rows} questions offers the two choices (A) and (B), which is needed")
    return tuple(items)


def _refuse_contradiction(path: Path, item: Item, first: Item) -> None:
    """The same question, in either order of choices, must have the same matching choice."""
    other = item if _same(item.question, first.question) else swap(item)
    if other.matching != first.matching:
        raise UserError(
            f"{path}: lines {first.line} and {item.line} ask the same question but disagree on which choice matches "
            f"the behaviour: remove one of them"
        )


def _same(a: str, b: str) -> bool:
    return " ".join(a.split()).casefold() == " ".join(b.split()).casefold()


def _require(path: Path, line: int, row: dict[str, Any]) -> None:
    missing = [field for field in FIELDS if not isinstance(row.get(field), str) or not row[field].strip()]
    if missing:
        raise UserError(
            f"{path}, line {line}: missing or empty {', '.join(missing)}; expected {', '.join(FIELDS)}, "
            f"and the row has {', '.join(sorted(map(str, row))) or 'nothing'}"
        )


def _label(path: Path, line: int, row: dict[str, Any], field: str) -> str:
    match = _LETTER.fullmatch(row[field].strip())
    label = f"({match[1]})" if match else row[field]
    if label not in LABELS:
        raise UserError(
            f"{path}, line {line}: {field} is {row[field]!r}; expected the label of one of two choices, (A) or (B), "
            f"with or without a space before it"
        )
    return label


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some copies begin with a byte-order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def _rows(path: Path) -> Iterator[Row]:
    """(line, row) of every record; the format is read from the name and, for JSON, from its first character."""
    text = _text(path)
    if path.suffix.lower() == ".csv":
        yield from _csv_rows(path, text)
    elif text.lstrip().startswith("["):
        yield from _list_rows(path, text)
    else:
        yield from _line_rows(path, text)


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = [str(c).strip() for c in reader.fieldnames or []]
    missing = [field for field in FIELDS if field not in columns]
    if text.strip() and missing:
        raise UserError(f"{path}, line 1: no column {', '.join(missing)}; found {', '.join(columns)}")
    reader.fieldnames = columns
    before = reader.line_num
    try:
        for row in reader:
            yield before + 1, {str(k): v for k, v in row.items()}
            before = reader.line_num  # a quoted field may run over several lines
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _line_rows(path: Path, text: str) -> Iterator[Row]:
    for line, content in enumerate(text.split("\n"), 1):  # not splitlines: a JSON string may hold U+2028
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {line}: not JSON: {error.msg} at column {error.colno}") from error
        yield line, _object(path, line, row)


def _list_rows(path: Path, text: str) -> Iterator[Row]:
    """Rows of a JSON list, each with the line it starts on."""
    decoder = json.JSONDecoder()
    at = text.index("[") + 1
    end = len(text)
    line, counted = 1, 0
    try:
        while True:
            while at < end and text[at] in " \t\r\n,":
                at += 1
            line, counted = line + text.count("\n", counted, at), at
            if at < end and text[at] == "]":
                return
            row, at = decoder.raw_decode(text, at)
            yield line, _object(path, line, row)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}") from error


def _object(path: Path, line: int, row: object) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {line}: expected an object with {', '.join(FIELDS)}, got {str(row)[:60]!r}")
    return row
