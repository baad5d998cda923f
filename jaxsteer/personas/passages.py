"""``Passage``: a conversation, a reply or a plain text that somebody wrote and a model reads."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from jaxsteer.display import short
from jaxsteer.errors import UserError
from jaxsteer.files.records import Record
from jaxsteer.personas.dataset_files import place, read_rows
from jaxsteer.prompts import encode_texts, encode_turns

if TYPE_CHECKING:
    from jaxsteer.models.model import Model

PROMPTS, ANSWERS = ("prompt", "question"), ("answer", "response", "completion")
"""Columns of a row that holds one reply: what stands before it, rendered or as the user said it, and the reply."""
CONVERSATIONS = ("messages", "conversation")
"""Columns of a row that holds a whole conversation."""
GROUPS = ("group", "domain", "role")
"""Columns that say what a row belongs to, the first that it has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passage(Record):
    """One of three things: ``messages``; a reply (``text``) behind a rendered ``prompt``; or a plain ``text``.

    Raises ``UserError`` for one in which nobody says anything.
    """

    id: str
    messages: tuple[Mapping[str, str], ...] = ()
    """Turns as ``{"role": ..., "content": ...}``."""
    prompt: str = ""
    """A conversation as its template writes it, up to the reply."""
    text: str = ""
    group: str = ""
    """What it belongs to: a role, a domain."""

    def __post_init__(self) -> None:
        """Check that there is something to be read."""
        said = [m["content"] for m in self.messages if m["role"] == "assistant"] if self.messages else [self.text]
        if not any(text.strip() for text in said):
            nobody = f"{len(self.messages)} messages and no reply" if self.messages else "no text"
            raise UserError(
                f"{self.id}: there are {nobody} of an assistant in it: expected messages with at least one assistant's "
                f"that is not empty, or a text"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """One assistant turn of a passage, or its text, in token space."""

    turn: int
    """Number of the message, from 0."""
    text: str
    mask: Bool[np.ndarray, " T"]
    """Its tokens; the first token of the row is none of them, because it is an attention sink of outsize norm."""


def encode_passage(model: Model, passage: Passage) -> tuple[Int[np.ndarray, " T"], tuple[Span, ...]]:
    """Ids of the whole passage, and the assistant's turns in it that have tokens.

    Raises ``UserError``, which names the passage, where it is longer than the model's positions or its template
    refuses it, where there is no template, and where no turn has a token.
    """
    try:
        if passage.messages:
            row = encode_turns(model.tokenizer, [dict(m) for m in passage.messages], generation_prompt=False)
            ids = row.ids
            turns = [(i, m["content"]) for i, m in enumerate(passage.messages) if m["role"] == "assistant"]
            spans = [Span(turn=i, text=text, mask=row.mask("assistant", turns=[i])) for i, text in turns]
        else:
            ids = encode_texts(
                model.tokenizer, [passage.prompt + passage.text], style="chat" if passage.prompt else "plain"
            )[0]
            before = len(encode_texts(model.tokenizer, [passage.prompt], style="chat")[0]) if passage.prompt else 0
            spans = [Span(turn=0, text=passage.text, mask=np.arange(len(ids)) >= before)]
    except UserError as error:
        raise UserError(f"{passage.id}: {error}") from error
    if len(ids) > model.config.max_positions:
        raise UserError(
            f"{passage.id} has {len(ids)} tokens, but {model.name} has {model.config.max_positions} positions: shorten "
            f"or divide it"
        )
    first = np.arange(len(ids)) > 0
    spans = [dataclasses.replace(span, mask=span.mask & first) for span in spans]
    found = tuple(span for span in spans if span.mask.any())
    if not found:
        raise UserError(f"{passage.id} has no token behind its first one that could be read: {short(passage.text)!r}")
    return ids, found


def read_passages(path: str | os.PathLike[str]) -> tuple[Passage, ...]:
    """The rows of a CSV, JSON Lines, JSON or Parquet file, each as ``passage_of`` takes it.

    A row is called by its "id", else by its line. Raises ``UserError`` for a file without rows, and for a row that is
    none, with its line.
    """
    path = Path(path)
    found = tuple(passage_of(path, line, row) for line, row in read_rows(path, ()))
    if not found:
        raise UserError(f"{path} holds no conversation: expected one in each row")
    return found


def passage_of(path: Path, line: int, row: Mapping[str, Any]) -> Passage:
    """A row of a file: "messages" or "conversation"; "prompt" (rendered) or "question" with "answer", "response" or
    "completion"; or a "text". "group", "domain" or "role" say what it belongs to.

    Raises ``UserError``, with the line, for other rows.
    """
    where = place(path, line)
    facts: dict[str, Any] = {
        "id": str(row["id"]) if row.get("id") not in (None, "") else where,
        "group": next((str(row[name]) for name in GROUPS if row.get(name) not in (None, "")), ""),
    }
    for name in CONVERSATIONS:
        if isinstance(row.get(name), list):
            if not row[name]:
                raise UserError(f"{where}: the conversation is empty: expected at least one message of an assistant's")
            return Passage(messages=tuple(_message(message, where) for message in row[name]), **facts)
    asked = next((name for name in PROMPTS if isinstance(row.get(name), str) and row[name]), None)
    answer = next((row[name] for name in ANSWERS if isinstance(row.get(name), str) and row[name]), None)
    if asked and answer:
        if asked == "prompt":
            return Passage(prompt=row[asked], text=answer, **facts)
        said = (("user", row[asked]), ("assistant", answer))
        return Passage(messages=tuple({"role": role, "content": text} for role, text in said), **facts)
    if isinstance(row.get("text"), str) and row["text"]:
        return Passage(text=row["text"], **facts)
    raise UserError(
        f"{where}: expected messages, {' or '.join(PROMPTS)} with {', '.join(ANSWERS[:-1])} or {ANSWERS[-1]}, or text; "
        f"the row has {', '.join(map(str, row)) or 'nothing'}"
    )


def _message(given: Any, where: str) -> dict[str, str]:
    if not isinstance(given, Mapping) or not all(isinstance(given.get(key), str) for key in ("role", "content")):
        raise UserError(f'{where}: every message is {{"role": ..., "content": ...}} of texts, got {short(given)}')
    return {"role": given["role"], "content": given["content"]}
