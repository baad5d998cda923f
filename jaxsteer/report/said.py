"""What pages show as it is: tables in words, and what a model wrote side by side."""

from __future__ import annotations

import dataclasses

from jaxsteer.errors import UserError
from jaxsteer.files.records import Record

SHOWN = 10
"""Questions whose replies are shown."""
MARKS = {True: ("in character", "persona"), False: ("not in character", "other"), None: ("unread", "")}
"""Of a text, by whether it is in character: the words, and the style."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownTable(Record):
    """A table in words."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Said(Record):
    """What a model wrote in answer to every question, under one prompt."""

    name: str
    texts: tuple[str, ...]
    in_character: tuple[bool | None, ...] = ()
    """Whether a rule read the persona's character; None where it found nothing. Empty where none read."""

    def marked(self, at: int) -> tuple[str, str]:
        """The name with the mark of one text, and the mark's style."""
        if not self.in_character:
            return self.name, ""
        mark, style = MARKS[self.in_character[at]]
        return f"{self.name}: {mark}", style


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideBySide(Record):
    """The same questions answered under several prompts."""

    title: str = ""
    questions: tuple[str, ...]
    columns: tuple[Said, ...]
    split: str = "test"
    """Whose questions they are."""

    @classmethod
    def from_json(cls, record: object, where: str = "") -> SideBySide:
        """The object that ``to_json`` wrote. Raises ``UserError`` where texts and questions do not go together."""
        found = super().from_json(record, where)
        for column in found.columns:
            texts, marks, asked = len(column.texts), len(column.in_character), len(found.questions)
            if texts != asked or marks not in (0, asked):
                raise UserError(
                    f"{where}: {column.name!r} has {texts} texts and {marks} marks for {asked} questions; expected one "
                    "text each, and one mark each or none"
                )
        return found

    @property
    def shown(self) -> list[tuple[str, list[tuple[str, str, str]]]]:
        """(question, [(name and mark, style of the mark, text)]) of the first questions."""
        return [
            (question, [(*one.marked(at), one.texts[at]) for one in self.columns])
            for at, question in enumerate(self.questions[:SHOWN])
        ]
