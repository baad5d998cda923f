"""What one row of a dataset asks, and its two answers, in whatever form the row has.

========================  ====================================================================================
asks by                   ``question`` or ``prompt`` (a text), ``messages`` or ``prompt`` (turns, a system message
                          among them, that end with the user's); nothing at all where the answers are whole texts
answers by                ``answer_matching_behavior`` and ``answer_not_matching_behavior``, ``chosen`` and
                          ``rejected``, ``positive`` and ``negative``; the first of each shows the behaviour
========================  ====================================================================================

``chosen`` and ``rejected`` may be whole conversations, as preference datasets have them: the turns that both share are
what is asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsteer.errors import UserError
from jaxsteer.files import parse_json
from jaxsteer.personas.dataset_files import place
from jaxsteer.prompts import Turns

ANSWERS = (
    ("answer_matching_behavior", "answer_not_matching_behavior"),
    ("chosen", "rejected"),
    ("positive", "negative"),
)
ASKS = ("messages", "prompt", "question")
ROLES = ("system", "user", "assistant")
EXPECTED = (
    "question, prompt or messages with answer_matching_behavior and answer_not_matching_behavior, chosen and rejected, "
    "or positive and negative"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row in the one form that is used. ``before`` are the turns before the question, as (role, text)."""

    question: str
    before: Turns
    matching: str
    not_matching: str
    fields: tuple[str, str]
    """Names of the two answers in the file."""


def read_row(path: Path, line: int, row: Mapping[str, Any]) -> Row:
    """The row's question and answers. Raises ``UserError``, with the line, for what is missing or of another type."""
    where = place(path, line)
    row = {name: value for name, value in row.items() if value is not None and str(value).strip()}
    fields = next((pair for pair in ANSWERS if any(name in row for name in pair)), ANSWERS[0])
    ask = next((name for name in ASKS if name in row), None)
    missing = [name for name in fields if not row.get(name)]
    if ask is None and fields != ANSWERS[2] and not isinstance(row.get(fields[0]), list):
        missing.insert(0, "question")
    if missing:
        raise UserError(
            f"{where}: missing or empty {', '.join(missing)}; expected {EXPECTED}, and the row has "
            f"{', '.join(sorted(map(str, row))) or 'nothing'} (a public dataset is read by "
            f"its name, NAME:{path}: see jaxsteer data list)"
        )
    turns = _turns(row[ask], where, ask) if ask else ()
    for other in ASKS:
        if other in row and turns and _turns(row[other], where, other)[-1] != turns[-1]:
            raise UserError(f"{where}: {ask} and {other} ask different things: leave one out")
    answers = [_answer(row[name], where, name) for name in fields]
    shared = [turns_of for turns_of, _ in answers if turns_of]
    if len({*shared, *([turns] if turns and shared else [])}) > 1:
        raise UserError(f"{where}: {' and '.join(fields)} answer different conversations: give the same turns")
    turns = turns or (shared[0] if shared else ())
    if turns and turns[-1][0] != "user":
        raise UserError(f"{where}: what is asked must end with a user's turn, but it ends with the {turns[-1][0]}'s")
    return Row(
        question=turns[-1][1].strip() if turns else "",
        before=turns[:-1],
        matching=answers[0][1],
        not_matching=answers[1][1],
        fields=fields,
    )


def _turns(value: Any, where: str, field: str) -> Turns:
    """A text as one user's turn, or turns as they are; those of a CSV file are JSON."""
    if isinstance(value, str):
        if not (field == "messages" and value.lstrip().startswith("[")):
            return (("user", value),) if value.strip() else ()
        value = parse_json(value, f"{where}, {field}")
    turns = value if isinstance(value, list) else []
    good = all(
        isinstance(t, Mapping) and t.get("role") in ROLES and isinstance(t.get("content"), str) for t in turns
    )  # fmt: skip
    if not turns or not good:
        raise UserError(
            f'{where}: {field} must be a text or a list of {{"role": ..., "content": TEXT}} with the roles '
            f"{', '.join(ROLES)}, got {str(value)[:80]!r}"
        )
    return tuple((turn["role"], turn["content"]) for turn in turns)


def _answer(value: Any, where: str, field: str) -> tuple[Turns, str]:
    """(turns before it, the answer): a text, a list of one text, or a conversation that ends with it."""
    if isinstance(value, list) and value and isinstance(value[0], str):
        value = value[0]  # several wrong choices: the first
    if isinstance(value, str) and value.strip():
        return (), value.strip()
    if isinstance(value, list) and value:
        turns = _turns(value, where, field)
        if turns[-1][0] == "assistant" and turns[-1][1].strip():
            return turns[:-1], turns[-1][1].strip()
    raise UserError(
        f"{where}: {field} must be a text, or a conversation that ends with the assistant's, got {str(value)[:80]!r}"
    )
