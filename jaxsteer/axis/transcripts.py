"""``Transcript``: a conversation of a character, as a line of a JSON Lines file that other tools read too."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxsteer.files.records import Record
from jaxsteer.ranges import CountFrom0

DEFAULT = "default"
"""The Assistant as it is, where the name of a role stands."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transcript(Record):
    """One conversation; its last turn is the assistant's."""

    role: str
    """Name of the role, ``DEFAULT``, or "<trait>+" and "<trait>-" for the two sides of a trait."""
    prompt: CountFrom0 = 0
    """Which of the role's instructions."""
    question: CountFrom0 = 0
    """Which of the questions; of a conversation of several turns, the first."""
    messages: tuple[Mapping[str, str], ...]
    """Turns as ``{"role": ..., "content": ...}``, the system message first where there is one."""
    score: int | None = None
    """A judge's: 0 refuses, 1 stays the assistant, 2 somewhat in the role, 3 wholly."""

    @property
    def asked(self) -> str:
        """What the user said first."""
        return next((turn["content"] for turn in self.messages if turn.get("role") == "user"), "")

    @property
    def said(self) -> str:
        """What the assistant said, turn after turn."""
        return "\n".join(turn["content"] for turn in self.messages if turn.get("role") == "assistant")
