"""``RoleSet``: characters as instructions, the questions that all of them are asked, and traits as pairs."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from jaxsteer.errors import UserError
from jaxsteer.files.records import Record
from jaxsteer.ranges import Range

MODEL_NAME = "{model_name}"
"""Stands in a default prompt for the model's own name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Role(Record):
    """A character. Raises ``UserError`` for one without a name or without an instruction."""

    name: str
    instructions: tuple[str, ...]
    """System messages that ask for it, one conversation each."""
    rubric: str = ""
    """One line for a judge: what a reply in this role is like."""
    family: str = ""
    """What kind of character it is, for example "profession" or "creature"."""
    human: bool | None = None
    """Whether the character is a human being."""
    assistant_like: Annotated[int, Range(0, 3)] | None = None
    """How much it is like an assistant, by people, before anything was run: 0 not at all, 3 much."""

    def __post_init__(self) -> None:
        """Check that something can be asked for."""
        if not self.name:
            raise UserError("a role has no name: expected a text, for example 'librarian'")
        if not self.instructions or not all(text.strip() for text in self.instructions):
            raise UserError(
                f"role {self.name!r} has an empty instruction, or none: expected at least one system message"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraitPair(Record):
    """A trait as instructions for it and against it. Raises ``UserError`` where one of the sides is empty."""

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    rubric: str = ""

    def __post_init__(self) -> None:
        """Check that there is a difference to be read."""
        for side, texts in (("positive", self.positive), ("negative", self.negative)):
            if not texts or not all(text.strip() for text in texts):
                raise UserError(f"trait {self.name!r}: there are no {side} instructions, or an empty one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoleSet(Record):
    """What a study of characters asks. Raises ``UserError`` for names that stand twice, and for missing parts."""

    name: str
    roles: tuple[Role, ...]
    questions: tuple[str, ...]
    """Asked in every role."""
    default: tuple[str, ...] = ("",)
    """System messages of the Assistant as it is; "" is none, and ``{model_name}`` the model's name."""
    traits: tuple[TraitPair, ...] = ()

    def __post_init__(self) -> None:
        """Check that every name means one thing."""
        for what, found in (("role", self.roles), ("question", self.questions), ("default prompt", self.default)):
            if not found:
                raise UserError(f"{self.name}: there is no {what}")
        names = [*(role.name for role in self.roles), *(trait.name for trait in self.traits), *self.questions]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{self.name}: {twice[0]!r} stands twice: give every role, trait and question once")
