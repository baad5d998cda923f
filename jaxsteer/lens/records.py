"""Texts and conversations from files, with what is known of each: a label, a group, tokens that are asked for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsteer.display import short
from jaxsteer.errors import UserError
from jaxsteer.files import read_text
from jaxsteer.files.records import Record
from jaxsteer.lens.texts import Text
from jaxsteer.personas import Persona
from jaxsteer.personas.dataset_files import place, read_rows
from jaxsteer.personas.pairs import both_orders

FIELDS = ("label", "group", "type", "target", "minus")
"""Of a row, beside its text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRecord(Record):
    """A text or a conversation, exactly one of the two, and what is known of it."""

    text: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    """Turns as ``{"role": ..., "content": ...}``."""
    label: str = ""
    """What a probe is to tell."""
    group: str = ""
    """What it belongs to: texts of a group are never on both sides of a split."""
    type: str = ""
    """What a control task gives a random label: a word, a question. By default the token that is read."""
    target: str = ""
    """Token whose logit is attributed, where it has its own."""
    minus: str = ""
    """Token whose logit is subtracted."""

    @property
    def said(self) -> Text:
        """What the model reads."""
        return self.messages or self.text


def read_texts(path: str | os.PathLike[str], *, chat: bool = False) -> tuple[TextRecord, ...]:
    """The texts of a file: lines of a .txt file; rows of CSV, JSON Lines, JSON or Parquet.

    A row has "text", "messages", or "question" (what the user says, with "answer" where the assistant has answered),
    and if wanted the other fields of ``TextRecord``. With ``chat`` a plain text is what a user says. Raises
    ``UserError``, with the line, for a row without one of these or with more, and for a file without rows.
    """
    path = Path(path)
    if path.suffix.lower() == ".txt":
        found = [TextRecord(text=line) for line in read_text(path).split("\n") if line.strip()]
    else:
        found = [_record(path, line, row) for line, row in read_rows(path, ())]
    if not found:
        raise UserError(f"{path} holds no text: expected one in each line or row")
    return tuple(asked(record) if chat else record for record in found)


def asked(record: TextRecord) -> TextRecord:
    """The record with its plain text as what a user says."""
    if record.messages:
        return record
    return dataclasses.replace(record, text="", messages=({"role": "user", "content": record.text},))


SHOWS, OTHER = "shows", "does not"
"""Labels of a persona's answers."""


def persona_texts(persona: Persona) -> tuple[TextRecord, ...]:
    """Both answers to every question of a persona, labelled by whether they show it; the question is the group.

    Questions with lettered choices come in both orders, so that no letter tells the label. Raises ``UserError`` for a
    persona whose answers have not been written yet.
    """
    if not persona.items:
        raise UserError(f"persona {persona.name!r} has no answers yet: let a model write them (personas.with_replies)")
    found = []
    for _, item in both_orders(persona.items):
        before = [{"role": role, "content": text} for role, text in item.before]
        for answer, label in ((item.matching, SHOWS), (item.not_matching, OTHER)):
            turns = [*before, {"role": "user", "content": item.question}, {"role": "assistant", "content": answer}]
            found.append(TextRecord(messages=tuple(turns), label=label, group=item.group))
    return tuple(found)


def _record(path: Path, line: int, row: Mapping[str, Any]) -> TextRecord:
    where = place(path, line)
    given = [name for name in ("text", "messages", "question") if row.get(name) not in (None, "", [])]
    if len(given) != 1:
        raise UserError(
            f"{where}: expected exactly one of text, messages and question, got {' and '.join(given) or 'none'}; the "
            f"row has {', '.join(map(str, row)) or 'nothing'}"
        )
    facts: dict[str, Any] = {name: str(row[name]) for name in FIELDS if row.get(name) not in (None, "")}
    value = row[given[0]]
    if given[0] == "messages":
        right = isinstance(value, list) and all(
            isinstance(m, Mapping) and all(isinstance(m.get(key), str) for key in ("role", "content")) for m in value
        )
        if not right:
            raise UserError(
                f'{where}: messages must be a list of {{"role": ..., "content": ...}} of texts, got {short(value)}'
            )
        return TextRecord(messages=tuple({"role": m["role"], "content": m["content"]} for m in value), **facts)
    if not isinstance(value, str):
        raise UserError(f"{where}: {given[0]} must be a text, got {short(value)}")
    if given[0] == "text":
        return TextRecord(text=value, **facts)
    turns = [{"role": "user", "content": value}]
    if isinstance(row.get("answer"), str) and row["answer"]:
        turns.append({"role": "assistant", "content": row["answer"]})
    return TextRecord(messages=tuple(turns), **facts)
